"""Text of outputs: the same whatever is read when, at a price that does not grow with what was read before."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphexec import SamplingParams
from graphexec.engine.generation import Generation
from graphexec.engine.outputs.output import AnyOutput, RequestOutput
from graphexec.engine.request import Request
from graphexec.engine.text.detokenizer import Detokenizer
from graphexec.engine.text.output_text import OutputText
from graphexec.models.loader import load_tokenizer, model_folder
from graphexec.models.tokenizer import Tokenizer

WORDS = [" the", " a", "é", " 😀", "def", "(", "\n", " x", "你好"]


class Bytes:
    """A tokenizer whose token is one byte of UTF-8; from 256 on, special tokens, which are skipped."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        shown = [token for token in token_ids if token < 256]
        text = bytes(shown).decode(errors="replace")
        return text if skip_special_tokens else text + "<|special|>" * (len(token_ids) - len(shown))


class Words:
    """A tokenizer whose first word loses its leading space, as with sentencepiece; from 100 on, special tokens."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        shown = "".join(WORDS[token] for token in token_ids if token < 100)
        specials = sum(token >= 100 for token in token_ids)
        return shown.removeprefix(" ") + ("" if skip_special_tokens else "<s>" * specials)


@cache
def tiny() -> Tokenizer:
    tokenizer = load_tokenizer(model_folder("tiny"))
    assert tokenizer is not None
    return tokenizer


def generation_of(tokenizer: Tokenizer, params: SamplingParams | None = None) -> Generation:
    params = params or SamplingParams()
    return Generation(
        Request("0", (5,), params, (), 0, 9), OutputText(tokenizer, params.stop, params.stop_sequences, pytest.fail)
    )


def read(tokens: list[int], tokenizer: Tokenizer, reads: set[int]) -> tuple[str, str]:
    """`text` at the end, and all `new_text` one after the other, where each of `reads` was looked at as it came."""
    generation, pieces, begin = generation_of(tokenizer), "", 0
    for index, token in enumerate(tokens, 1):
        generation.token_ids.append(token)
        if index in reads:
            output = AnyOutput(generation, begin, index, False)
            pieces += output.new_text
            assert output.text == pieces
            begin = index
    generation.finish("length")
    last = AnyOutput(generation, begin, len(tokens), True)
    pieces += last.new_text
    assert last.text == pieces == last.text
    return last.text, pieces


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=30), specials=st.lists(st.integers(0, 60), max_size=5), data=st.data())
def test_text_that_was_encoded_comes_back_whole_whatever_is_read(
    text: str, specials: list[int], data: st.DataObject
) -> None:
    tokens: list[int] = list(text.encode(errors="replace"))
    for place in specials:
        tokens.insert(min(place, len(tokens)), 300)
    reads = data.draw(st.sets(st.integers(1, max(len(tokens), 1))))
    assert read(tokens, Bytes(), reads)[0] == Bytes().decode(tokens)


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, len(WORDS) - 1) | st.just(100), max_size=60), data=st.data())
def test_spaces_between_words_survive_special_tokens_and_windows(tokens: list[int], data: st.DataObject) -> None:
    reads = data.draw(st.sets(st.integers(1, max(len(tokens), 1))))
    assert read(tokens, Words(), reads)[0] == Words().decode(tokens)


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.integers(0, 255) | st.sampled_from([0xF0, 0x9F, 0x98, 0x80, 0xFF, 300]), max_size=80))
def test_invalid_bytes_give_the_text_that_they_give_together(tokens: list[int]) -> None:
    """Shown late or early: a byte that can still become a character is waited for, and others are not for long."""
    assert read(tokens, Bytes(), set(range(1, len(tokens) + 1)))[0] == Bytes().decode(tokens)


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(0, 4095), max_size=60))
def test_random_tokens_of_a_real_tokenizer_give_the_text_that_they_give_together(tokens: list[int]) -> None:
    assert read(tokens, tiny(), set(range(1, len(tokens) + 1)))[0] == tiny().decode(tokens, skip_special_tokens=True)


def test_invalid_bytes_are_shown_after_a_while() -> None:
    generation = generation_of(Bytes())
    generation.token_ids += [0xFF] * 40
    assert len(RequestOutput(generation, 40).text) >= 40 - 16


@pytest.mark.parametrize("token", [0xFF, 300], ids=["invalid bytes", "special tokens"])
def test_a_token_of_a_text_that_never_completes_costs_as_little_at_the_end_as_at_the_beginning(token: int) -> None:
    decoded = []

    class Counting(Bytes):
        def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            decoded.append(len(token_ids))
            return super().decode(token_ids, skip_special_tokens)

    detokenizer = Detokenizer(Counting())
    for _ in range(4000):
        detokenizer.add(token)
    assert max(decoded) <= 24
    assert len(decoded) <= 2 * 4000


@pytest.mark.parametrize("token", [0, 3], ids=["bytes", "special tokens"])
def test_a_token_of_a_text_that_never_completes_takes_at_most_50_microseconds(token: int) -> None:
    """Of a real tokenizer: `pytest bench/test_host.py` has the figures. Once it took a millisecond at 4,000 tokens."""
    tokenizer = tiny()
    detokenizer = Detokenizer(tokenizer)
    ids = {0: tokenizer.encode("é", add_special_tokens=False)[:1], 3: [getattr(tokenizer, "eos_token_id", 0)]}[token]
    started = time.perf_counter()
    for _ in range(4000):
        detokenizer.add(ids[0])
    assert (time.perf_counter() - started) / 4000 < 250e-6, "five times the target: CI's machines are what they are"


def test_new_text_reads_no_more_than_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    generation = generation_of(Bytes())
    generation.token_ids += b"x" * 4000
    assert len(RequestOutput(generation, 4000).text) == 4000
    joined: list[int] = []
    text = generation.text
    assert text is not None
    between = OutputText.between

    def watched(self: OutputText, begin: int, end: int) -> str:
        joined.append(end - begin)
        return between(self, begin, end)

    monkeypatch.setattr(OutputText, "between", watched)
    generation.token_ids += b"yz"
    assert AnyOutput(generation, 4000, 4002, False).new_text == "yz"
    assert sum(joined) <= 2


def test_token_ids_are_a_view_that_later_tokens_do_not_change() -> None:
    generation = generation_of(Bytes())
    generation.token_ids += [5, 6]
    output = RequestOutput(generation, 2)
    ids = output.token_ids
    generation.token_ids += [7, 8]
    assert ids == [5, 6]
    assert ids == (5, 6)
    assert ids == [5, 6]
    assert ids != [5, 6, 7]
    assert (len(ids), ids[0], ids[-1], ids[1:], list(ids)) == (2, 5, 6, [6], [5, 6])
    assert repr(ids) == "[5, 6]"
    assert [[4] + ids, ids + [7], ids + ids] == [[4, 5, 6], [5, 6, 7], [5, 6, 5, 6]]  # noqa: RUF005
    for index in (2, -3):
        with pytest.raises(IndexError):
            ids[index]
    with pytest.raises(TypeError):
        hash(ids)
