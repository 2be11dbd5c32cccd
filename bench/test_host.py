"""What the host costs: the controller, the scheduler, and whole engine steps on a device that takes no time.

    pytest bench/test_host.py --benchmark-json=PATH        (from the repository's root; runs everywhere)

Prompts differ in length, so that their KV blocks run out in different steps, as they do in real traffic.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.instant import instant_engine
from graphexec import RequestOutput, SamplingParams, StepResult
from graphexec.capture.buckets import BucketTable, default_ladder
from graphexec.controller import Controller
from graphexec.engine.generation import Generation
from graphexec.engine.request import Request
from graphexec.engine.scheduling.blocks import BlockAllocator
from graphexec.engine.scheduling.scheduler import ScheduledStep, Scheduler
from graphexec.engine.text.detokenizer import Detokenizer
from graphexec.models.loader import load_tokenizer, model_folder
from graphexec.slots import SlotLimits

RUNNING = (1, 64, 256, 1024)
BLOCK_SIZE = 16
MAX_TOKENS = 1 << 20
FOR_EVER = SamplingParams(max_tokens=MAX_TOKENS // 2, temperature=0.0, ignore_eos=True)
LENGTH = 256
"""Output tokens of requests that end."""
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
        scheduler.add(Generation(Request(str(index), tuple(prompt(index)), FOR_EVER, (), 0, MAX_TOKENS)))
    numbers = itertools.count()

    def schedule() -> ScheduledStep | None:
        number = next(numbers)
        return scheduler.schedule(number, number - 2)

    while scheduler.wants_chunks:
        schedule()
    scheduled = benchmark.pedantic(schedule, **ROUNDS)
    assert scheduled is not None
    assert len(scheduled.owners) - scheduled.owners.count(None) == running
    assert scheduled.plan.chunk_slots == 0


@pytest.mark.benchmark(group="engine step, instant device")
@pytest.mark.parametrize("traffic", ["steady", "ends", "ends, prefix cache"])
@pytest.mark.parametrize("running", RUNNING)
def test_engine_step_on_an_instant_device(benchmark: BenchmarkFixture, running: int, traffic: str) -> None:
    """schedule + submit + collect at depth 1, and every output's `token_ids` read: all but device and driver calls.

    With ends, requests get 256 tokens each, and who has ended is replaced by a new one. `host_us` in the file is a
    step's median, less what it took to play the device.
    """
    load = _Load(running, ends=traffic != "steady", prefix_caching="prefix" in traffic)
    with load.engine:
        outputs = benchmark.pedantic(load.step, setup=load.replace_ended, **ROUNDS)
        assert len(outputs) >= running * 0.9
        benchmark.extra_info["host_us"] = statistics.median(load.host_us[-ROUNDS["rounds"] :])


class _Load:
    """As many running requests as an engine has slots, and the consumer of their outputs."""

    def __init__(self, running: int, ends: bool, prefix_caching: bool) -> None:
        self.engine = instant_engine(running, prefix_caching=prefix_caching, num_blocks=1 << 17 if ends else 1 << 22)
        self.host_us: list[float] = []
        self._ends = ends
        self._rng = random.Random(0)
        self._outputs: list[RequestOutput] = []
        for index in range(running):
            self._add(index, self._rng.randrange(1, LENGTH + 1))
        while len(self.step()) < running * 0.9 or len(self.host_us) < 2 * BLOCK_SIZE:
            self.replace_ended()

    def step(self) -> list[RequestOutput]:
        device_us, started = self.engine.stats().wait_us, time.perf_counter()
        self._outputs = self.engine.step()
        for output in self._outputs:
            output.token_ids  # noqa: B018  # what a consumer reads in each step
        seconds = time.perf_counter() - started
        self.host_us.append(seconds * 1e6 - (self.engine.stats().wait_us - device_us))
        return self._outputs

    def replace_ended(self) -> None:
        for index, output in enumerate(self._outputs):
            if output.finished:
                self._add(index, LENGTH)

    def _add(self, index: int, tokens: int) -> None:
        prompt = [self._rng.randrange(32000) for _ in range(1 + index % BLOCK_SIZE)]
        params = SamplingParams(max_tokens=tokens if self._ends else MAX_TOKENS // 2, temperature=0.0, ignore_eos=True)
        self.engine.add_request(prompt, params)


@pytest.mark.benchmark(group="aborts of waiting requests, all in one step")
@pytest.mark.parametrize("waiting", [5_000, 20_000])
def test_aborts_of_waiting_requests(benchmark: BenchmarkFixture, waiting: int) -> None:
    with instant_engine(1) as engine:
        engine.add_request([5], FOR_EVER)
        engine.step()

        def queue() -> None:
            for request_id in [engine.add_request([5], FOR_EVER) for _ in range(waiting)]:
                engine.abort(request_id)

        outputs = benchmark.pedantic(engine.step, setup=queue, rounds=10)
        assert sum(output.finish_reason == "abort" for output in outputs) == waiting


@pytest.mark.benchmark(group="4,000 tokens of a text that never completes")
@pytest.mark.parametrize("kind", ["special tokens", "invalid bytes"])
def test_detokenizing_a_text_that_never_completes(benchmark: BenchmarkFixture, kind: str) -> None:
    tokenizer = load_tokenizer(model_folder("tiny"))
    assert tokenizer is not None
    ids = tokenizer.all_special_ids if kind == "special tokens" else tokenizer.encode("é", add_special_tokens=False)
    token = ids[0]

    def detokenize() -> int:
        detokenizer = Detokenizer(tokenizer)
        return sum(len(detokenizer.add(token)) for _ in range(4000))

    assert benchmark.pedantic(detokenize, rounds=3, warmup_rounds=1) < 4000
