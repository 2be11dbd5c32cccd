"""What the engine does on the host, on a device that takes no time: ends, aborts and queues at their proper price."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from bench.instant import instant_engine
from graphexec import Engine, SamplingParams
from graphexec.engine.scheduling.scheduler import ScheduledStep
from graphexec.plan import FinishCode, StepHandle, StepPlan, StepResult

LONG = SamplingParams(max_tokens=1000, temperature=0, ignore_eos=True)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with instant_engine(8, 4096, prefix_caching=True, num_blocks=4096) as engine:
        yield engine


def test_aborting_many_waiting_requests_takes_no_longer_for_each_than_aborting_one() -> None:
    """A queue that is searched for each took 2.6 s for 20,000."""
    with instant_engine(4, 4096, num_blocks=4096) as engine:
        ids = [engine.add_request([5], LONG) for _ in range(20_000)]
        engine.step()
        for request_id in ids[4:]:
            engine.abort(request_id)
        started = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - started
        assert sum(output.finish_reason == "abort" for output in outputs) == 19_996
        assert seconds < 0.5, "ten times the target, which bench/test_host.py measures: CI's machines are what they are"


def test_waiting_requests_run_in_the_order_in_which_they_came_when_others_among_them_are_aborted() -> None:
    with instant_engine(1, 4096, num_blocks=4096) as engine:
        ids = [engine.add_request([5], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)) for _ in range(6)]
        for index in (0, 3, 5):
            engine.abort(ids[index])
        ended = []
        while engine.has_unfinished():
            ended += [output.request_id for output in engine.step() if output.finish_reason == "length"]
        assert ended == [ids[1], ids[2], ids[4]]


class Spy:
    """Sees every plan that is submitted and every result that is collected."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plans: list[StepPlan] = []
        self.in_flight: list[int] = []
        self.results: list[StepResult] = []
        submit, take = engine._backend.submit, engine._collector.take

        def watched_submit(plan: StepPlan) -> StepHandle:
            self.plans.append(plan)
            self.in_flight.append(len(engine._in_flight))
            return submit(plan)

        def watched_take(scheduled: ScheduledStep, result: StepResult, outputs: list[object]) -> None:
            self.results.append(result)
            take(scheduled, result, outputs)

        monkeypatch.setattr(engine._backend, "submit", watched_submit)
        monkeypatch.setattr(engine._collector, "take", watched_take)


@pytest.mark.parametrize(
    "dear",
    [{"logprobs": 1}, {"top_k": 3, "temperature": 1.0}, {"temperature": 1.0}],
    ids=["logprobs", "shaped", "sampled"],
)
@pytest.mark.parametrize("end", ["length", "abort"])
def test_a_dear_sampler_runs_no_longer_than_the_request_that_needs_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, dear: dict[str, object], end: str
) -> None:
    """One request with log-probabilities must not make every later step dear."""
    spy = Spy(engine, monkeypatch)
    engine.add_request([5], LONG)
    params = SamplingParams(**{"max_tokens": 5, "temperature": 0.0, "ignore_eos": True} | dear)
    request_id = engine.add_request([6], params)
    for _ in range(4):
        engine.step()
    assert {plan.variant for plan in spy.plans} == {next(iter(engine._live[request_id].values())).request.variant.value}
    if end == "abort":
        engine.abort(request_id)
    for _ in range(6):
        engine.step()
    spy.plans.clear()
    engine.step()
    assert [plan.variant for plan in spy.plans] == ["greedy"]


def serial_engine(num_blocks: int = 4096) -> Engine:
    engine = instant_engine(4, 4096, depth=2, num_blocks=num_blocks)
    engine.config = engine.config.model_copy(update={"overlap_prefill": False})
    return engine


def test_without_overlap_of_prefill_a_step_with_chunks_and_the_one_behind_it_find_the_pipeline_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serial_engine() as engine:
        spy = Spy(engine, monkeypatch)
        engine.add_request([5] * 3, LONG)
        for _ in range(6):
            engine.step()
        engine.add_request([6] * 3, LONG)
        for _ in range(5):
            engine.step()
    assert spy.in_flight == [0, 0, 1, 2, 2, 2, 0, 0, 1, 2, 2]


def test_with_overlap_of_prefill_nothing_is_drained_for_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    with instant_engine(4, 4096, depth=2) as engine:
        spy = Spy(engine, monkeypatch)
        engine.add_request([5] * 3, LONG)
        for _ in range(6):
            engine.step()
        engine.add_request([6] * 3, LONG)
        for _ in range(4):
            engine.step()
    assert spy.in_flight == [0, 1, *[2] * 8]


@pytest.mark.parametrize("hindrance", ["slots", "blocks"])
def test_without_overlap_of_prefill_a_queue_that_nobody_can_leave_does_not_make_decoding_serial(
    monkeypatch: pytest.MonkeyPatch, hindrance: str
) -> None:
    """29 of 29 decode steps were, since requests counted that no slot or no blocks waited for."""
    with serial_engine(4096 if hindrance == "slots" else 32) as engine:
        if hindrance == "slots":
            for number in range(4):
                engine.add_request([number], SamplingParams(max_tokens=90, temperature=0, ignore_eos=True))
        else:
            engine.add_request([5] * 200, SamplingParams(max_tokens=250, temperature=0, ignore_eos=True))
        engine.add_request([6] * 300, SamplingParams(max_tokens=90, temperature=0, ignore_eos=True))
        for _ in range(8):
            engine.step()
        spy = Spy(engine, monkeypatch)
        for _ in range(29):
            engine.step()
        assert len(engine._scheduler._waiting) == 1
        assert spy.in_flight.count(2) >= 27


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_no_slot_parks_while_there_are_free_blocks(monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    """Its blocks come before the device needs them, as far ahead as steps may be in flight."""
    from tests.support.symbolic_program import symbolic_engine

    with symbolic_engine(depth=depth) as engine:
        spy = Spy(engine, monkeypatch)
        for number in range(6):
            engine.add_request([5] * (1 + number), SamplingParams(max_tokens=60, temperature=0, ignore_eos=True))
        while engine.has_unfinished():
            engine.step()
        assert len(spy.results) > 60
        assert not any(np.any(result.finish == int(FinishCode.PARKED)) for result in spy.results)


def test_a_request_gets_its_outputs_from_a_step_in_which_others_end(engine: Engine) -> None:
    """Each slot goes its own way through the collector: the short one for one token more, the long one for an end."""
    lengths = {engine.add_request([number], SamplingParams(max_tokens=number, temperature=0, ignore_eos=True)): number
               for number in range(1, 9)}  # fmt: skip
    received: dict[str, list[int]] = {request_id: [] for request_id in lengths}
    reasons: dict[str, str | None] = {}
    while engine.has_unfinished():
        for output in engine.step():
            received[output.request_id] += output.new_token_ids
            assert output.token_ids == received[output.request_id]
            if output.finished:
                reasons[output.request_id] = output.finish_reason
    assert {request_id: len(tokens) for request_id, tokens in received.items()} == lengths
    assert set(reasons.values()) == {"length"}
