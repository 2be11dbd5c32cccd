"""What a failing device costs: the engine ends with a list of its requests, or goes on, and never loses an output."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from graphexec import (
    BackendConfig,
    BucketOverflowError,
    CaptureError,
    ConfigError,
    DeviceError,
    Engine,
    EngineConfig,
    RequestError,
    RequestOutput,
    SamplingParams,
    StepTimeout,
)
from graphexec.engine.program import DecoderProgram
from graphexec.plan import GraphKey, StepHandle, StepPlan
from tests.support.checkpoints import make_checkpoint

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("small") / "model")


def open_engine(checkpoint: Path, depth: int = 1, **backend: object) -> Engine:
    values = {"verify": False, "name": "eager"} | backend
    return Engine(
        EngineConfig(
            model=str(checkpoint), device="cpu", dtype="float64", max_num_seqs=4, max_model_len=64,
            overlap_depth=depth, backend=BackendConfig(**values),
        )
    )  # fmt: skip


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[Engine]:
    with open_engine(checkpoint) as engine:
        yield engine


def run(engine: Engine) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def test_a_step_that_is_late_loses_no_output_and_can_be_waited_for_again(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    with open_engine(checkpoint, step_timeout_s=0.3) as engine:
        expected = [output.token_ids for output in engine.generate([[5], [6]], GREEDY)]
        real_step = DecoderProgram.step

        def gated_step(self: DecoderProgram, key: GraphKey) -> None:
            gate.wait(20)
            real_step(self, key)

        monkeypatch.setattr(DecoderProgram, "step", gated_step)
        ids = [engine.add_request([5], GREEDY), engine.add_request([6], GREEDY), engine.add_request([7], GREEDY)]
        engine.step()
        engine.abort(ids[2])
        for _ in range(12):  # more often than there are ring slots
            with pytest.raises(StepTimeout, match="Step"):
                engine.step()
        gate.set()
        outputs = run(engine)
    assert [outputs[request_id][-1].token_ids for request_id in ids[:2]] == expected
    assert outputs[ids[2]][-1].finish_reason == "abort"


@pytest.mark.parametrize("error", [RuntimeError("boom"), torch.OutOfMemoryError("no memory")])
def test_a_submit_that_fails_ends_the_engine_with_its_requests(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    request_id = engine.add_request([5], GREEDY)

    def refuse(plan: object) -> None:
        raise error

    monkeypatch.setattr(engine._backend, "submit", refuse)
    (output,) = engine.step()
    assert (output.request_id, output.finish_reason) == (request_id, "error")
    assert str(error) in (output.error or "")
    for _ in range(3):
        with pytest.raises(DeviceError, match=f"{error}.*running or waiting: {request_id}"):
            engine.step()


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_step_that_meets_a_failure_returns_what_was_collected_and_an_error_for_every_request(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    with open_engine(checkpoint, depth=depth) as engine:
        expected = [output.token_ids for output in engine.generate([[5], [6], [7]], GREEDY)]
        streamed = engine.stream([7], GREEDY)
        ids = [engine.add_request([5], GREEDY), engine.add_request([6], GREEDY)]
        received: dict[str, list[int]] = {request_id: [] for request_id in ids}
        for _ in range(4 + depth):
            for output in engine.step():
                received[output.request_id] += output.new_token_ids
        waiting = engine.add_request([9], GREEDY)

        def fail(*_: object) -> None:
            raise RuntimeError("device on fire")

        monkeypatch.setattr(engine._backend, "submit", fail)
        last = {output.request_id: output for output in engine.step()}
        assert set(last) == {*ids, waiting}
        for request_id, tokens in zip(ids, expected, strict=False):
            output = last[request_id]
            assert (output.finished, output.finish_reason) == (True, "error")
            assert "device on fire" in (output.error or "")
            assert output.token_ids == received[request_id] + output.new_token_ids == tokens[: len(output.token_ids)]
            assert len(output.token_ids) >= 4
        assert last[waiting].token_ids == []
        assert not engine.has_unfinished()
        pieces = list(streamed)
        assert pieces[-1].finish_reason == "error"
        assert [token for piece in pieces for token in piece.new_token_ids] == expected[2][: len(pieces[-1].token_ids)]
        for call in (engine.step, lambda: engine.generate([[5]], GREEDY)):
            with pytest.raises(DeviceError, match="device on fire"):
                call()
        with pytest.raises(RequestError, match="has failed.*device on fire"):
            engine.add_request([5])


def test_generate_returns_what_it_has_when_the_engine_fails(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = engine._backend.submit, iter(range(100))

    def fail_late(plan: StepPlan) -> StepHandle:
        if next(calls) == 5:
            raise RuntimeError("device on fire")
        return real(plan)

    monkeypatch.setattr(engine._backend, "submit", fail_late)
    params = [SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True) for tokens in (2, 30)]
    short, long = engine.generate([[5], [6]], params)
    assert (short.finish_reason, len(short.token_ids)) == ("length", 2)
    assert long.finish_reason == "error"
    assert 3 <= len(long.token_ids) < 30


def test_a_wait_within_submit_that_is_in_vain_ends_the_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a StepTimeout it would say that the call can be repeated; the plan of that step cannot be made again."""
    engine.add_request([5], GREEDY)

    def wait_in_vain(plan: object) -> None:
        raise StepTimeout("The streams did not drain within 0.1 s.")

    monkeypatch.setattr(engine._backend, "submit", wait_in_vain)
    (output,) = engine.step()
    assert "could not be submitted: The streams did not drain" in (output.error or "")
    with pytest.raises(DeviceError, match="could not be submitted"):
        engine.step()


def test_an_overflow_ends_the_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.add_request([5], GREEDY)
    engine.step()
    monkeypatch.setattr(engine._backend._pipeline.controller, "next_bound", lambda: 0)
    (outputs,) = run(engine).values()
    assert outputs[-1].finish_reason == "error"
    for _ in range(4):
        with pytest.raises(BucketOverflowError, match="running or waiting"):
            engine.step()


def test_strict_is_settled_before_anything_runs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"strict.*ends at 2.*max_num_seqs=4"):
        open_engine(checkpoint, name="cudagraph", strict=True, capture_sizes=(1, 2))
    with open_engine(checkpoint, name="cudagraph", strict=True) as engine:
        assert [len(output.token_ids) for output in engine.generate([[5], [6], [7]], GREEDY)] == [8, 8, 8]


def test_a_graph_that_writes_no_kv_is_found_out(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphexec.runtime import CpuRuntime
    from graphexec.runtime.base import Stream

    real_capture = CpuRuntime.capture

    def capture_without_kv(self: CpuRuntime, work: partial[None], stream: Stream, pool: object, *rest: Any) -> object:
        def replay() -> None:
            import graphexec.kernels.attention as attention

            with monkeypatch.context() as patch:
                nowhere = torch.full((4096,), -1)
                real = attention.rope_write
                patch.setattr(attention, "rope_write", lambda *args: real(*args[:8], nowhere[: len(args[8])], args[9]))
                work()

        return real_capture(self, replay, stream, pool, *rest)

    monkeypatch.setattr(CpuRuntime, "capture", capture_without_kv)
    with pytest.raises(CaptureError, match="computes something else"):
        open_engine(checkpoint, name="cudagraph", verify=True)


def test_outputs_that_nobody_takes_are_joined_and_not_piled_up(engine: Engine) -> None:
    other = engine.add_request([9], SamplingParams(max_tokens=30, temperature=0, ignore_eos=True))
    (mine,) = engine.generate([[5]], GREEDY)
    assert mine.finished
    held = [output for output in engine.step() if output.request_id == other]
    rest = run(engine).get(other, [])
    tokens = [token for output in (*held, *rest) for token in output.new_token_ids]
    assert tokens == (rest or held)[-1].token_ids
    assert len(tokens) == 30
    assert len(held[0].new_token_ids) >= 7


def test_an_abort_right_behind_its_request_is_never_lost(engine: Engine) -> None:
    stop = threading.Event()
    ids: list[str] = []

    def add_and_abort() -> None:
        while not stop.is_set():
            ids.append(engine.add_request([5], SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)))
            engine.abort(ids[-1])

    thread = threading.Thread(target=add_and_abort)
    thread.start()
    reasons = {}
    for _ in range(150):
        reasons |= {output.request_id: output.finish_reason for output in engine.step() if output.finished}
    stop.set()
    thread.join()
    reasons |= {request_id: outputs[-1].finish_reason for request_id, outputs in run(engine).items()}
    assert set(reasons) == set(ids)
    assert set(reasons.values()) == {"abort"}


class Brittle:
    """A tokenizer of letters that cannot decode some of them."""

    def __init__(self, broken: set[int]) -> None:
        self.broken = broken

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) % 90 + 2 for letter in text]

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        if self.broken & set(token_ids):
            raise ValueError("no such token")
        return "".join(chr(97 + token % 26) for token in token_ids)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_tokenizer_that_fails_in_the_search_for_stop_strings_fails_that_request_alone(
    checkpoint: Path, depth: int
) -> None:
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, stop="???")
    with open_engine(checkpoint, depth=depth) as engine:
        expected = [list(output.token_ids) for output in engine.generate([[5], [6], [7]], GREEDY)]
        broken = expected[1][3]
        assert broken not in expected[0] + expected[2], "or the test would need other prompts"
        engine._intake._tokenizer = Brittle({broken})
        outputs = engine.generate([[5], [6], [7]], params)
        assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
        assert [outputs[index].token_ids for index in (0, 2)] == [expected[0], expected[2]]
        assert "tokenizer cannot decode" in (outputs[1].error or "")
        assert outputs[1].token_ids == expected[1][:4]
        assert engine._scheduler._allocator.free == engine.num_kv_blocks
        assert engine.generate([[6]], GREEDY)[0].token_ids == expected[1], "the slot serves its next owner"


def test_a_tokenizer_that_fails_when_a_text_is_read_fails_that_request_alone(engine: Engine) -> None:
    expected = [list(output.token_ids) for output in engine.generate([[5], [6]], GREEDY)]
    broken = expected[1][3]
    assert broken not in expected[0]
    engine._intake._tokenizer = Brittle({broken})
    ids = [engine.add_request([5], GREEDY), engine.add_request([6], GREEDY)]
    texts: dict[str, str] = dict.fromkeys(ids, "")
    last: dict[str, RequestOutput] = {}
    while engine.has_unfinished():
        for output in engine.step():
            texts[output.request_id] += output.new_text
            last[output.request_id] = output
    good, bad = (last[request_id] for request_id in ids)
    assert (good.finish_reason, good.token_ids, len(good.text)) == ("length", expected[0], 8)
    assert (bad.finish_reason, len(texts[ids[1]])) == ("error", 3), "what could be decoded was shown"
    assert "no such token" in (bad.error or "")
    assert 4 <= len(bad.token_ids) < 8, "it ended soon after the reading that failed"


def test_a_tokenizer_that_fails_on_the_last_output_shows_in_its_reason(engine: Engine) -> None:
    (full,) = engine.generate([[5]], GREEDY)
    engine._intake._tokenizer = Brittle({full.token_ids[-1]})
    (output,) = engine.generate([[5]], GREEDY)
    assert output.finish_reason == "length"
    assert len(output.text) < 8
    assert (output.finish_reason, output.token_ids) == ("error", full.token_ids)
    assert "no such token" in (output.error or "")
