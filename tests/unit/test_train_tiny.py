"""The trainer of the bundled model, on synthetic files: clean split, lossless tokenizer, loadable checkpoint."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from bench.tiny import corpus
from bench.tiny.evaluation import accepted, cross_entropy
from bench.tiny.packing import IGNORED, attention_mask, pack
from bench.tiny.renaming import local_names, name_pool, renamed_copies
from bench.tiny.tokens import END, encode_documents, train_tokenizer
from bench.tiny.trainer import Settings, build_model, learning_rate_share, token_losses
from bench.train_tiny import Plan, run

SOURCE = '''\
import functools


@functools.cache
def area(width, height):
    """Return the area of a rectangle.

    Both sides are numbers.
    """
    def inner(a, b):
        """Multiply what the caller passed, whatever its type may be."""
        return a * b
    return inner(width, height)


class Shape:
    async def describe(self, stream):
        """Write a line about this shape to the stream."""
        # A comment stays.
        await stream.write(f"{self!r}\\n")

    def undocumented(self, other):
        if other is None:
            return NotImplemented
        return self.size == other.size

    def stub(self):
        """Only a docstring, which leaves no statement to complete."""

    def left_edge(self):
        """Return a text that starts left of the function."""
        return """
at column 0
"""
'''


@pytest.fixture(scope="module")
def documents() -> list[corpus.Document]:
    made = []
    for number in range(60):
        prompt = f'def add_{number}(left, right):\n    """Return the sum of left, right and {number}."""\n'
        text = prompt + f"    total = left + right\n    return total + {number}\n"
        made.append(corpus.Document(f"module_{number}.py", text, prompt, "documented"))
    return made


@pytest.fixture(scope="module")
def tokenizer(documents: list[corpus.Document]) -> PreTrainedTokenizerFast:
    return train_tokenizer((document.text for document in documents), 400)


def write_tree(root: Path) -> None:
    (root / "package" / "test").mkdir(parents=True)
    (root / "site-packages").mkdir()
    (root / "shapes.py").write_text(SOURCE)
    (root / "package" / "copy.py").write_text(SOURCE)
    (root / "package" / "test" / "test_shapes.py").write_text(SOURCE.replace("Shape", "Form").replace("size", "extent"))
    (root / "site-packages" / "installed.py").write_text(SOURCE.replace("area", "installed"))
    (root / "broken.py").write_text("def (:\n")
    (root / "latin.py").write_bytes(b"# no coding line\nname = '\xe9'\n")


def test_outer_functions_become_dedented_documents_once(tmp_path: Path) -> None:
    write_tree(tmp_path)
    found = list(corpus.read_documents(tmp_path, corpus.source_files(tmp_path)))
    names = [ast.parse(document.text).body[0].name for document in found if document.kind != "test"]
    assert names == ["area", "describe", "undocumented", "stub"]  # package/copy.py comes first, shapes.py repeats it
    assert {document.path for document in found} == {"package/copy.py", "package/test/test_shapes.py"}
    for document in found:
        assert document.text.startswith(("def ", "async def "))
        assert document.text.endswith("\n")
        assert not document.text.endswith("\n\n")


def test_a_prompt_is_header_and_docstring_where_a_body_follows(tmp_path: Path) -> None:
    write_tree(tmp_path)
    found = list(corpus.read_documents(tmp_path, corpus.source_files(tmp_path)))
    area, describe, undocumented, stub = found[:4]
    assert area.prompt.endswith('    Both sides are numbers.\n    """\n')
    assert describe.prompt.count("\n") == 2
    assert area.text.startswith(area.prompt)
    assert describe.text.startswith(describe.prompt)
    assert [document.kind for document in found[:4]] == ["documented", "documented", "plain", "documented"]
    assert undocumented.prompt == stub.prompt == ""


def test_a_renamed_copy_is_python_with_other_names_in_the_same_places(documents: list[corpus.Document]) -> None:
    assert local_names(documents[0].text) == ["left", "right", "total"]
    assert {"left", "right", "total"} == set(name_pool(documents))
    others = ["first", "second", "third", "left"]
    copies = renamed_copies(documents[:1], others, 20, seed=1)
    assert renamed_copies(documents[:1], others, 20, seed=1) == copies
    assert len(set(copies)) > 1
    for copy in copies:
        function = ast.parse(copy).body[0]
        left, right = (argument.arg for argument in function.args.args)
        assert left != right
        assert f"sum of {left}, {right} and 0" in copy
        assert ast.unparse(function.body[1].value) == f"{left} + {right}"


def test_the_split_is_by_file_and_always_the_same(documents: list[corpus.Document]) -> None:
    doubled = documents + [document._replace(text="# two\n" + document.text) for document in documents]
    split = corpus.split_documents(doubled, 0.2)
    train_files = {document.path for document in split.train}
    held_out_files = {document.path for document in split.held_out}
    assert train_files.isdisjoint(held_out_files)
    assert train_files | held_out_files == {document.path for document in documents}
    assert corpus.split_documents(reversed(doubled), 0.2).held_out == split.held_out[::-1]
    assert corpus.split_documents(doubled, 0.2, split_seed=1).held_out != split.held_out


def test_a_tree_without_documented_functions_is_refused(documents: list[corpus.Document]) -> None:
    with pytest.raises(ValueError, match="--stdlib"):
        corpus.split_documents(documents[:1], 0.0)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8")) | st.text(" \n\tab_.09()é\r"))
def test_the_tokenizer_gives_back_any_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_prompt_cut_at_a_newline_or_an_indentation_is_a_prefix_in_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    text = 'def add(left, right):\n    """Return the sum."""\n    if left:\n        return right\n'
    whole = tokenizer(text)["input_ids"]
    for cut in (text.index("\n    if"), text.index("    if"), text.index("if"), text.index("return")):
        part = tokenizer(text[:cut])["input_ids"]
        assert whole[: len(part)] == part


def test_end_and_padding_are_one_entry(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.eos_token == tokenizer.pad_token == END
    assert tokenizer.bos_token is None
    assert len(tokenizer) <= 400


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=60))
def test_packing_keeps_every_document_whole_up_to_the_window(lengths: list[int]) -> None:
    encoded = [np.full(length, 10 + index) for index, length in enumerate(lengths)]
    rows = pack(encoded, window=32, pad=0)
    for index, length in enumerate(lengths):
        here = rows.tokens == 10 + index
        kept = min(length, 32)
        assert rows.positions[here].tolist() == list(range(kept))
        assert len(here.any(1).nonzero()) == 1
        assert (rows.targets[here] == 10 + index).sum() == kept - 1
    assert bool((rows.targets[rows.tokens == 0] == IGNORED).all())


def test_a_packed_document_is_scored_as_if_it_were_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = build_model(Settings(hidden=64, layers=2, heads=2, key_value_heads=1, intermediate=64), 400, 0).eval()
    encoded = encode_documents(tokenizer, ["def first():\n    return 1\n", "def second(x):\n    return x\n"])
    together = pack(encoded, 64, 0)
    assert together.tokens.shape == (1, 64)
    assert attention_mask(together.documents).shape == (1, 1, 64, 64)
    with torch.no_grad():
        packed = token_losses(model, together)[together.targets != IGNORED]
        alone = [token_losses(model, rows)[rows.targets != IGNORED] for rows in (pack([ids], 64, 0) for ids in encoded)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_the_learning_rate_warms_up_and_ends_low() -> None:
    plan = Settings(steps=100, warm_up_steps=10)
    shares = [learning_rate_share(step, plan) for step in range(100)]
    assert shares.index(max(shares)) in (9, 10)
    assert max(shares) == 1.0
    assert shares[-1] < 0.03


@pytest.mark.parametrize(("text", "verdict"), [("x = 1\n", True), ("def f(:\n", False), ("x = '\0'", False)])
def test_only_python_is_accepted(text: str, verdict: bool) -> None:
    assert accepted(text) is verdict


def test_a_short_training_leaves_a_checkpoint_that_loads_and_its_figures(
    documents: list[corpus.Document], tmp_path: Path
) -> None:
    tiny = Settings(
        steps=12, rows=4, window=64, hidden=64, layers=2, heads=2, key_value_heads=1, intermediate=64, vocabulary=300,
        warm_up_steps=2, score_every=4,
    )  # fmt: skip
    metrics = run(documents, Plan(tiny, samples=3, max_new_tokens=8), tmp_path, torch.device("cpu"))

    assert metrics["training"]["steps_done"] == 12
    curve = metrics["training"]["curve"]
    assert [point["step"] for point in curve] == [4, 8, 12]
    assert curve[-1]["held_out"] < curve[0]["held_out"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert (tmp_path / "loss.png").stat().st_size > 0
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 6
    assert f"{metrics['held_out']['nats_per_token']:.3f}" in (tmp_path / "README.md").read_text()

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.model_type == "qwen3"
    assert model.config.tie_word_embeddings
    assert model.config.head_dim == 64
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o044 == 0o044


def test_the_number_of_steps_follows_from_the_corpus_alone(documents: list[corpus.Document], tmp_path: Path) -> None:
    tiny = Settings(
        epochs=2, rows=4, window=64, hidden=64, layers=1, heads=2, key_value_heads=1, intermediate=64, vocabulary=300
    )
    metrics = run(documents, Plan(tiny, samples=1, max_new_tokens=2), tmp_path, torch.device("cpu"))
    assert metrics["training"]["steps_done"] == metrics["settings"]["steps"] > 0
    assert metrics["training"]["epochs"] == pytest.approx(2, abs=0.5)


def test_the_loss_per_byte_counts_the_bytes_of_what_was_scored(
    documents: list[corpus.Document], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build_model(Settings(hidden=64, layers=1, heads=2, key_value_heads=1, intermediate=64), 400, 0).eval()
    figures = cross_entropy(model, tokenizer, documents[:5], window=256, rows_per_batch=2)
    first_token = len("def")  # given, not scored
    assert figures.bytes == sum(len(document.text.encode()) - first_token for document in documents[:5])
    assert figures.nats_per_token == pytest.approx(np.log(400), abs=0.5)
