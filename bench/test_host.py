"""What the host costs: the controller, the scheduler, and whole engine steps on a device that takes no time.

    pytest bench/test_host.py --benchmark-json=PATH        (from the repository's root; runs everywhere)

Prompts differ in length, so that their KV blocks run out in different steps, as they do in real traffic.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.instant import instant_engine
from graphexec import Engine, SamplingParams, StepResult
from graphexec.capture.buckets import BucketTable, default_ladder
from graphexec.controller import Controller
from graphexec.engine.blocks import BlockAllocator
from graphexec.engine.request import Request
from graphexec.engine.scheduler import ScheduledStep, Scheduler
from graphexec.slots import SlotLimits

RUNNING = (1, 64, 256, 1024)
BLOCK_SIZE = 16
MAX_TOKENS = 1 << 20
FOR_EVER = SamplingParams(max_tokens=MAX_TOKENS // 2, temperature=0.0, ignore_eos=True)
ROUNDS = {"rounds": 400, "warmup_rounds": 80}  # whole cycles of blocks, and no file of megabytes


def prompt(index: int) -> list[int]:
    return [5] * (1 + index % BLOCK_SIZE)


@pytest.mark.benchmark(group="controller")
@pytest.mark.parametrize("running", RUNNING)
def test_controller_step(benchmark: BenchmarkFixture, running: int) -> None:
    """arm + observe + next_bound, with blocks for one slot in sixteen."""
    controller = Controller(running, BucketTable(default_ladder(running)))
    controller.arm(0, range(running))
    supplied = list(range(0, running, BLOCK_SIZE))
    ones, zeros = np.ones(running, dtype=np.int32), np.zeros(running, dtype=np.int32)
    numbers = itertools.count()

    def step() -> int:
        number = next(numbers)
        controller.arm(number, supplied)
        controller.observe(StepResult(number, running, True, ones, zeros, ones[:, None], None))
        return controller.next_bound()

    assert benchmark.pedantic(step, **ROUNDS) == running


@pytest.mark.benchmark(group="scheduler")
@pytest.mark.parametrize("running", RUNNING)
def test_schedule_in_steady_decode(benchmark: BenchmarkFixture, running: int) -> None:
    limits = SlotLimits(running, MAX_TOKENS, 4096 + running, BLOCK_SIZE, 16)
    scheduler = Scheduler(limits, BlockAllocator(1 << 20), max_batched_tokens=4096, lookahead=2)
    for index in range(running):
        request = Request(str(index), tuple(prompt(index)), FOR_EVER, (), 0, MAX_TOKENS, None)
        scheduler.add(request)
    numbers = itertools.count()

    def schedule() -> ScheduledStep | None:
        number = next(numbers)
        return scheduler.schedule(number, number - 2)

    while scheduler.wants_chunks:
        schedule()
    scheduled = benchmark.pedantic(schedule, **ROUNDS)
    assert scheduled is not None
    assert np.count_nonzero(scheduled.decodes) == running
    assert scheduled.plan.chunk_slots == 0


def decoding_engine(running: int) -> Engine:
    engine = instant_engine(running)
    for index in range(running):
        engine.add_request(prompt(index), FOR_EVER)
    while len(engine.step()) < running:
        pass
    return engine


@pytest.mark.benchmark(group="engine step, instant device")
@pytest.mark.parametrize("running", RUNNING)
def test_engine_step_on_an_instant_device(benchmark: BenchmarkFixture, running: int) -> None:
    """schedule + submit + collect at depth 1: everything but the device and the calls into its driver."""
    with decoding_engine(running) as engine:
        before = engine.stats()
        outputs = benchmark.pedantic(engine.step, **ROUNDS)
        after = engine.stats()
        assert len(outputs) == running
        benchmark.extra_info["host_us_per_step"] = (after.host_us - before.host_us) / (after.steps - before.steps)
