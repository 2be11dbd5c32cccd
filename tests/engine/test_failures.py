"""What a failing device costs: the engine ends with a list of its requests, or goes on, and never loses an output."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

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
    RequestOutput,
    SamplingParams,
    StepTimeout,
)
from graphexec.engine.program import DecoderProgram
from graphexec.plan import GraphKey
from tests.support.checkpoints import make_checkpoint

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("small") / "model")


def open_engine(checkpoint: Path, **backend: object) -> Engine:
    values = {"verify": False, "name": "eager"} | backend
    return Engine(
        EngineConfig(
            model=str(checkpoint), device="cpu", dtype="float64", max_num_seqs=4, max_model_len=64,
            backend=BackendConfig(**values),
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
    for _ in range(3):
        with pytest.raises(DeviceError, match=f"{error}.*running or waiting: {request_id}"):
            engine.step()


def test_an_overflow_ends_the_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.add_request([5], GREEDY)
    engine.step()
    monkeypatch.setattr(engine._backend._pipeline.controller, "next_bound", lambda: 0)
    for _ in range(4):
        with pytest.raises(BucketOverflowError, match="running or waiting"):
            run(engine)


def test_strict_is_settled_before_anything_runs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"strict.*ends at 2.*max_num_seqs=4"):
        open_engine(checkpoint, name="cudagraph", strict=True, capture_sizes=(1, 2))
    with open_engine(checkpoint, name="cudagraph", strict=True) as engine:
        assert [len(output.token_ids) for output in engine.generate([[5], [6], [7]], GREEDY)] == [8, 8, 8]


def test_a_graph_that_writes_no_kv_is_found_out(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphexec.runtime import CpuRuntime
    from graphexec.runtime.base import Stream

    real_capture = CpuRuntime.capture

    def capture_without_kv(self: CpuRuntime, work: partial[None], stream: Stream, pool: object) -> object:
        def replay() -> None:
            import graphexec.kernels.attention as attention

            with monkeypatch.context() as patch:
                nowhere = torch.full((4096,), -1)
                real = attention.rope_write
                patch.setattr(attention, "rope_write", lambda *args: real(*args[:8], nowhere[: len(args[8])], args[9]))
                work()

        return real_capture(self, replay, stream, pool)

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
