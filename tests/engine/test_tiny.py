"""The bundled model behaves as a real one: it stops by itself at uneven lengths, and its tokens are transformers'."""

from __future__ import annotations

import ast
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM

from graphexec import BackendConfig, Engine, EngineConfig, RequestOutput, SamplingParams
from graphexec.models.loader import model_folder, model_license

MAX_TOKENS = 96
FUNCTIONS = [
    ("read_lines(path)", "Return the lines of a file as a list."),
    ("is_empty(self)", "Return True if there are no elements."),
    ("close(self)", "Close the stream and release its resources."),
    ("__repr__(self)", "Return a string representation."),
    ("get(self, key, default=None)", "Return the value for key if it exists, else default."),
    ("add(left, right)", "Return the sum of two numbers."),
    ("parse(self, text)", "Parse the text and return a tree."),
    ("find(sub, string)", "Return the lowest index of sub in string, or -1."),
    ("copy(self)", "Return a shallow copy of this object."),
    ("main(args=None)", "Run the command line interface."),
]
HEADS = ["def ", "async def ", "def _", "def safe_", "def _do_"]
NOTES = ["", " Raise ValueError if it is invalid.", " This is an internal helper.", " See also the manual."]


def prompts() -> list[str]:
    """200 function headers with docstrings."""
    made = []
    for head, (signature, doc), note in itertools.product(HEADS, FUNCTIONS, NOTES):
        made.append(f'{head}{signature}:\n    """{doc}{note}"""\n')
    return made


def open_engine(depth: int = 1, name: str = "cudagraph", blocks: int = 600, slots: int = 16) -> Engine:
    config = EngineConfig(
        model="tiny", device="cpu", dtype="float64", max_num_seqs=slots, max_model_len=256, num_kv_blocks=blocks,
        overlap_depth=depth, backend=BackendConfig(name=name, verify=False),
    )  # fmt: skip
    return Engine(config)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with open_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_folder("tiny"), dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def greedy(engine: Engine) -> list[RequestOutput]:
    """Greedy continuations of all prompts."""
    return engine.generate(prompts(), SamplingParams(max_tokens=MAX_TOKENS, temperature=0, logprobs=2))


def test_greedy_tokens_of_200_prompts_are_those_of_transformers(
    greedy: list[RequestOutput], reference: torch.nn.Module
) -> None:
    assert len(greedy) == 200
    end = reference.config.eos_token_id
    for batch in _batches(greedy, 50):
        longest = max(len(output.prompt_token_ids) for output in batch)
        padding = [longest - len(output.prompt_token_ids) for output in batch]
        ids = torch.tensor([[end] * pad + out.prompt_token_ids for pad, out in zip(padding, batch, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
        made = reference.generate(ids, attention_mask=mask, max_new_tokens=MAX_TOKENS, do_sample=False)
        for output, row in zip(batch, made[:, longest:].tolist(), strict=True):
            expected = row[: row.index(end) + 1] if end in row else row
            assert output.token_ids == expected


def _batches(outputs: list[RequestOutput], size: int) -> Iterator[list[RequestOutput]]:
    for begin in range(0, len(outputs), size):
        yield outputs[begin : begin + size]


def test_it_stops_by_itself_and_at_uneven_lengths(greedy: list[RequestOutput]) -> None:
    ended = [output for output in greedy if output.finish_reason == "stop"]
    assert {output.finish_reason for output in greedy} <= {"stop", "length"}
    assert len(ended) >= 0.6 * len(greedy)
    assert len({len(output.token_ids) for output in ended}) >= 15


def test_its_text_is_python_in_most_cases(greedy: list[RequestOutput]) -> None:
    def parses(text: str) -> bool:
        try:
            ast.parse(text)
        except (SyntaxError, ValueError):
            return False
        return True

    ended = [(prompt, out.text) for prompt, out in zip(prompts(), greedy, strict=True) if out.finish_reason == "stop"]
    accepted = sum(parses(prompt + text) for prompt, text in ended)
    assert accepted > 0.5 * len(ended)


def test_logprobs_are_those_of_transformers(greedy: list[RequestOutput], reference: torch.nn.Module) -> None:
    for output in greedy[::23]:
        tokens = output.token_ids
        with torch.no_grad():
            logits = reference(torch.tensor([output.prompt_token_ids + tokens])).logits[0]
        expected = logits[len(output.prompt_token_ids) - 1 : -1].log_softmax(1)
        assert output.logprobs is not None
        for entry, token, row in zip(output.logprobs, tokens, expected, strict=True):
            assert (entry.token_id, entry.rank) == (token, 1)
            assert entry.logprob == pytest.approx(float(row[token]), abs=1e-5)  # its angles are float32
            assert [pair[0] for pair in entry.top] == row.topk(2).indices.tolist()


@pytest.fixture(scope="module")
def sampled(engine: Engine) -> list[tuple[str, SamplingParams, RequestOutput]]:
    """Prompts, parameters, and what each gives alone."""
    made = []
    for index, prompt in enumerate(prompts()[::5]):
        params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.8, seed=index, logprobs=None if index % 7 else 1)
        made.append((prompt, params, engine.generate(prompt, params)[0]))
    return made


@pytest.mark.parametrize(("depth", "blocks"), [(0, 600), (2, 600), (1, 16), (4, 16)])
def test_natural_stops_in_a_crowd_change_no_token_at_any_depth(
    depth: int, blocks: int, sampled: list[tuple[str, SamplingParams, RequestOutput]]
) -> None:
    """Sequences end by themselves, at other steps than their neighbours; 16 blocks make some be preempted."""
    with open_engine(depth, blocks=blocks, slots=6) as crowded:
        outputs = crowded.generate([prompt for prompt, _, _ in sampled], [params for _, params, _ in sampled])
        assert (crowded.stats().preemptions > 0) == (blocks == 16)
    for output, (_, _, alone) in zip(outputs, sampled, strict=True):
        assert output.token_ids == alone.token_ids
        assert output.finish_reason == alone.finish_reason
    assert sum(output.finish_reason == "stop" for output in outputs) > len(outputs) // 3


def test_the_bundled_model_names_its_license_and_is_small() -> None:
    folder = model_folder("tiny")
    assert model_license(folder) == "apache-2.0"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12_000_000


def test_text_comes_without_triton() -> None:
    """As after the README's first command: the CPU build of torch does not bring it."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from graphexec import Engine, EngineConfig, SamplingParams\n"
        "with Engine(EngineConfig(device='cpu', max_num_seqs=2, max_model_len=64)) as engine:\n"
        "    (output,) = engine.generate(['def add(left, right):'], SamplingParams(max_tokens=4, temperature=0))\n"
        "print(len(output.token_ids))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr
