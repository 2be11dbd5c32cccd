"""Stop strings and stop sequences end a request where they should, and nothing behind them is ever delivered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from itertools import pairwise
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphexec import BackendConfig, Engine, EngineConfig, RequestOutput, SamplingParams
from graphexec.engine.generation import Generation
from graphexec.engine.outputs.collector import Collector
from graphexec.engine.outputs.output import AnyOutput
from graphexec.engine.program import DecoderProgram
from graphexec.engine.request import Request
from graphexec.engine.scheduling.scheduler import ScheduledStep, Scheduler
from graphexec.engine.text.output_text import OutputText
from graphexec.engine.text.stop_strings import StopStrings, held_back
from graphexec.plan import FinishCode, StepPlan, StepResult

DEPTHS = [0, 1, 2, 4]


_engines = ExitStack()


@pytest.fixture(scope="module", autouse=True)
def _close_engines() -> Iterator[None]:
    with _engines:
        yield
    engine_at.cache_clear()


@cache
def engine_at(depth: int) -> Engine:
    config = EngineConfig(
        model="tiny-random", device="cpu", dtype="float64", max_num_seqs=4, max_model_len=128,
        overlap_depth=depth, backend=BackendConfig(verify=False),
    )  # fmt: skip
    return _engines.enter_context(Engine(config))


@pytest.fixture(params=DEPTHS)
def engine(request: pytest.FixtureRequest) -> Engine:
    return engine_at(request.param)


def tokens_of(text: str) -> list[int]:
    """One for each character of an ASCII text: the bundled tokenizer is one of bytes."""
    tokenizer = engine_at(0).tokenizer
    assert tokenizer is not None
    return tokenizer.encode(text)


def free_run(seed: int = 3, max_tokens: int = 40) -> RequestOutput:
    """A readable output of single characters, one a token, that nothing ends."""
    letters = dict.fromkeys(tokens_of("abc"), 60.0)
    params = SamplingParams(max_tokens=max_tokens, seed=seed, temperature=2.0, logit_bias=letters, ignore_eos=True)
    (output,) = engine_at(0).generate("start", params)
    assert len(output.text) == max_tokens
    return output


def stopping(**stops: object) -> SamplingParams:
    letters = dict.fromkeys(tokens_of("abc"), 60.0)
    return SamplingParams(max_tokens=40, seed=3, temperature=2.0, logit_bias=letters, ignore_eos=True, **stops)


@pytest.mark.parametrize("begin", [0, 1, 7, 30])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_stop_string_across_token_borders_ends_the_output_before_it(engine: Engine, begin: int, length: int) -> None:
    full = free_run()
    stop = full.text[begin : begin + length]
    found = full.text.index(stop)
    seen: list[int] = []
    for output in engine.stream("start", stopping(stop=["zzz", stop])):
        assert full.text[:found].startswith(output.text), "a part of the stop string was shown"
        seen += output.new_token_ids
    assert output.finish_reason == "stop"
    assert output.text == full.text[:found]
    assert output.token_ids == seen == full.token_ids[: found + length]


def test_neighbours_of_a_request_that_a_string_stopped_keep_their_tokens(engine: Engine) -> None:
    full = free_run()
    stop = full.text[4:8]
    alone = [engine.generate("other", stopping())[0].token_ids, full.token_ids]
    outputs = engine.generate(["other", "start", "start"], [stopping(), stopping(stop=stop), stopping()])
    assert [outputs[0].token_ids, outputs[2].token_ids] == alone
    assert outputs[1].finish_reason == "stop"
    # The slot that was stopped by the host serves the next request from a clean state.
    assert engine.generate("start", stopping())[0].token_ids == full.token_ids


@pytest.mark.parametrize("depth", DEPTHS)
def test_samples_with_stop_strings_end_as_alone_when_they_are_preempted(depth: int) -> None:
    letters = dict.fromkeys(tokens_of("abc"), 60.0)
    params = [
        SamplingParams(
            n=2, max_tokens=60, seed=index, temperature=2.0, logit_bias=letters, ignore_eos=True,
            stop=["aaba", "ccbc", "bbbb", "z"], prompt_logprobs=1,
        )
        for index in range(6)
    ]  # fmt: skip
    alone = [engine_at(0).generate("start", each)[0] for each in params]
    config = EngineConfig(
        model="tiny-random", device="cpu", dtype="float64", max_num_seqs=8, max_model_len=128, kv_block_size=8,
        num_kv_blocks=20,
        overlap_depth=depth, backend=BackendConfig(verify=False),
    )  # fmt: skip
    with Engine(config) as engine:
        together = engine.generate(["start"] * 6, params)
        assert engine.stats().preemptions > 0
    assert {sample.finish_reason for output in alone for sample in output.samples} == {"stop", "length"}
    for output, expected in zip(together, alone, strict=True):
        for sample, wanted in zip(output.samples, expected.samples, strict=True):
            assert (sample.text, sample.token_ids) == (wanted.text, wanted.token_ids)
            assert sample.finish_reason == wanted.finish_reason
            assert len(sample.prompt_logprobs or ()) == len(sample.prompt_token_ids)


def test_a_stop_string_counts_only_behind_the_minimum(engine: Engine) -> None:
    full = free_run()
    stop = full.text[2]
    (output,) = engine.generate("start", stopping(stop=stop, min_tokens=10))
    place = full.text.index(stop, 10)
    assert output.text == full.text[:place]
    assert output.finish_reason == "stop"


def test_what_may_become_a_stop_string_is_shown_once_it_cannot() -> None:
    full = free_run()
    stop = full.text[5:8] + "!"  # never completed
    texts = [output.text for output in engine_at(1).stream("start", stopping(stop=stop))]
    assert texts[-1] == full.text
    assert any(len(text) < count for count, text in enumerate(texts, 1))
    assert all(full.text.startswith(text) for text in texts)


@pytest.mark.parametrize("begin", [0, 3, 20])
@pytest.mark.parametrize("length", [1, 3])
def test_a_stop_sequence_ends_the_output_with_it_and_its_text_without(engine: Engine, begin: int, length: int) -> None:
    full = free_run()
    sequence = full.token_ids[begin : begin + length]
    end = next(end for end in range(length, 41) if full.token_ids[end - length : end] == sequence)
    (output,) = engine.generate("start", stopping(stop_sequences=[[1, 2, 3], sequence]))
    assert output.finish_reason == "stop"
    assert output.token_ids == full.token_ids[:end]
    assert output.text == full.text[: end - length]


def test_what_may_become_a_stop_sequence_is_shown_once_it_cannot() -> None:
    """Who prints texts as they come can take nothing back."""
    full = free_run()
    never_completed = [*full.token_ids[1:4], 0]
    sequence = full.token_ids[5:9]
    outputs = list(engine_at(1).stream("start", stopping(stop_sequences=[never_completed, sequence])))
    texts = [output.text for output in outputs]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert texts[-1] == full.text[: len(outputs[-1].token_ids) - 4]
    assert full.text[:5] in texts  # nothing is held back for longer than it must be


def test_a_stop_sequence_whose_last_token_is_a_stop_token_is_hidden_whole(engine: Engine) -> None:
    full = free_run()
    place = next(place for place in range(1, 40) if full.text[place] not in full.text[:place])
    sequence = full.token_ids[place - 1 : place + 1]
    (output,) = engine.generate("start", stopping(stop_sequences=[sequence], stop_token_ids=sequence[-1:]))
    assert output.token_ids == full.token_ids[: place + 1]
    assert output.text == full.text[: place - 1]


def test_a_stop_sequence_is_not_found_in_the_prompt_nor_across_its_end(engine: Engine) -> None:
    full = free_run()
    prompt_tokens = tokens_of("start")
    first = full.token_ids[0]
    sequences = [prompt_tokens[-2:], [prompt_tokens[-1], first]]
    (output,) = engine.generate("start", stopping(stop_sequences=sequences))
    assert output.token_ids == full.token_ids


class Letters:
    """A tokenizer whose token i is the i-th text."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(self._texts[token] for token in token_ids)


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(st.text("ab", max_size=3), min_size=1, max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    min_tokens=st.integers(0, 4),
    chunk=st.integers(1, 4),
)
def test_the_search_finds_what_a_search_of_the_whole_text_finds(
    texts: list[str], stops: list[str], min_tokens: int, chunk: int
) -> None:
    strings = StopStrings(stops, Letters(texts), min_tokens)
    match, tokens = None, list(range(len(texts)))
    for end in range(chunk, len(texts) + chunk, chunk):
        match = match or strings.find(tokens[:end])
    expected = None
    for count in range(min_tokens + 1, len(texts) + 1):
        before, text = "".join(texts[: count - 1]), "".join(texts[:count])
        begins = [
            begin
            for stop in stops
            for begin in range(len(text))
            if text.startswith(stop, begin) and len(before) < begin + len(stop)
        ]
        if begins:
            expected = (count, min(begins))
            break
    assert match == expected


class Halves(Letters):
    """Token 1 is a letter and the first byte of a character, token 2 the rest of it."""

    def __init__(self) -> None:
        super().__init__([])

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return b"".join([b"a", b"b\xc3", b"\xa9", b""][token] for token in token_ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("tokens", "text", "reason"),
    [([0, 1], "", "stop"), ([0, 1, 3], "", "stop"), ([1, 3], "b\ufffd", "stop"), ([1], "b\ufffd", "length")],
)
def test_a_stop_string_before_an_incomplete_last_character_ends_the_text(
    tokens: list[int], text: str, reason: str
) -> None:
    """That text is held back until the character is complete, and shown when no token follows."""
    tokenizer = Halves()
    request = Request("0", (5,), SamplingParams(stop="ab"), (3,), 0, 9)
    strings = StopStrings(["ab"], tokenizer, 0)
    generation = Generation(request, OutputText(tokenizer, ["ab"], (), pytest.fail), strings)
    for end in range(1, len(tokens)):
        assert strings.find(tokens[:end]) is None
    generation.token_ids += tokens
    if tokens[-1] == 3:
        generation.finish_at_stop_token()
    elif (match := strings.find(tokens, final=True)) is not None:
        generation.finish_at_stop_string(match)
    else:
        generation.finish("length")
    output = AnyOutput.last_of(generation)
    assert (output.text, output.finish_reason) == (text, reason)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_stop_string_before_an_incomplete_character_counts_when_the_length_ends_the_request(depth: int) -> None:
    params = SamplingParams(max_tokens=1, temperature=0, logit_bias={1: 100}, ignore_eos=True, stop="b")
    config = EngineConfig(
        model="tiny-random", device="cpu", dtype="float64", max_num_seqs=1, max_model_len=32,
        overlap_depth=depth, backend=BackendConfig(verify=False),
    )  # fmt: skip
    with Engine(config) as engine:
        engine._intake._tokenizer = Halves()
        (output,) = engine.generate([[5]], params)
    assert (output.text, output.finish_reason, output.token_ids) == ("", "stop", [1])


def test_the_longest_beginning_of_a_stop_string_is_held_back() -> None:
    assert [held_back(text, ["abc", "cd"]) for text in ("", "xa", "xab", "xabx", "xc", "ab")] == [0, 1, 2, 0, 1, 2]


def test_the_search_does_not_share_the_consumers_detokenizer() -> None:
    """The consumer may read texts in another thread while the engine's searches."""
    engine = engine_at(1)
    engine.add_request("start", stopping(stop="zzz"))
    (generation,) = next(iter(engine._live.values())).values()
    assert generation.stop_strings is not None
    assert generation.text is not None
    assert generation.stop_strings._detokenizer is not generation.text._detokenizer
    while engine.has_unfinished():
        engine.step()


class CalledScheduler(Scheduler):
    """Remembers how it was told of an end."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def plain_slots(self, scheduled: ScheduledStep) -> tuple[np.ndarray, list[list[int]]]:
        return np.zeros(1, dtype=bool), []

    def abort(self, generation: Generation) -> None:
        self.calls.append("abort")

    def retire(self, generation: Generation) -> None:
        self.calls.append("retire")


@pytest.mark.parametrize(
    ("code", "call"), [(FinishCode.RUNNING, "abort"), (FinishCode.PARKED, "abort"), (FinishCode.LENGTH, "retire")]
)
def test_a_slot_that_only_the_host_stopped_is_released_before_its_next_owner(code: FinishCode, call: str) -> None:
    """Steps in flight may still run it, or a block that is under way wake it up, unless the device ended it, too."""
    tokenizer = Letters(["a"])
    request = Request("0", (5,), SamplingParams(), (), 0, 9)
    generation = Generation(request, stop_strings=StopStrings(["a"], tokenizer, 0))
    scheduler, outputs = CalledScheduler(), []
    one = np.ones(1, dtype=np.int32)
    scheduled = ScheduledStep(StepPlan("greedy"), (generation,), one.astype(np.int64))
    result = StepResult(0, 1, True, one, np.array([code], dtype=np.int32), np.zeros((1, 1), dtype=np.int32), None)
    Collector(scheduler, cast(DecoderProgram, None), {"0": {0: generation}}).take(scheduled, result, outputs)
    assert scheduler.calls == [call]
    assert [output.finish_reason for output in outputs] == ["stop"]
