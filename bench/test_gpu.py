"""What the device and the calls into its driver cost: replays of the engine's own decode graphs, and single calls.

    pytest bench/test_gpu.py --benchmark-json=PATH        (from the repository's root; needs a GPU)

The rounds of a replay benchmark are 64 replays each, enqueued at once and waited for; `extra_info` has milliseconds a
replay by the device's own clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.load import random_prompts, steady_decode, timed_generate
from bench.replay import Contexts, Inside, inside, timed_launches
from bench.shapes import SHAPES, engine_config, write_config
from graphexec import BackendConfig, Engine, RunningStep, StepPlan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BATCHES = (1, 64, 256)
REPLAYS = 64
TOKENS = 288
SHAPE = SHAPES["qwen3-0.6b"]
DRAIN_S = 10.0


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The engine for 0.6b, idle, with the KV of a run of 256 requests in its cache: nothing is timed on zeros."""
    folder = write_config(SHAPE, tmp_path_factory.mktemp("shape"))
    backend = BackendConfig(capture_sizes=BATCHES, prefill="off", verify=False)
    with Engine(engine_config(SHAPE, folder, backend, device="cuda")) as engine:
        timed_generate(engine, random_prompts(max(BATCHES), SHAPE.prompt_tokens, SHAPE.vocab_size), TOKENS)
        yield engine


@pytest.fixture
def parts(engine: Engine) -> Iterator[Inside]:
    parts = inside(engine)
    with parts.borrowed():
        yield parts


@pytest.mark.benchmark(group="64 replays of a decode graph")
@pytest.mark.parametrize("batch", BATCHES)
def test_replay_back_to_back(benchmark: BenchmarkFixture, parts: Inside, batch: int) -> None:
    contexts = Contexts(batch, SHAPE.prompt_tokens + TOKENS // 2, SHAPE.prompt_tokens + TOKENS)
    pipeline, graph = parts.pipeline, parts.graph(batch)
    milliseconds: list[float] = []

    def begin() -> None:
        pipeline.compute.run(lambda: parts.set_contexts(contexts))
        pipeline.synchronize()

    def replay() -> None:
        milliseconds.append(timed_launches(pipeline, graph, REPLAYS) / REPLAYS)

    benchmark.pedantic(replay, setup=begin, rounds=5, warmup_rounds=1)
    parts.check_moved(contexts, REPLAYS)
    benchmark.extra_info.update(batch=batch, nodes=graph.describe().nodes, ms_per_replay=milliseconds[1:])


@pytest.mark.benchmark(group="engine step")
@pytest.mark.parametrize("batch", BATCHES)
def test_engine_decode_step(benchmark: BenchmarkFixture, engine: Engine, batch: int) -> None:
    """A step of the whole engine in steady decode at depth 1: the slower of host and device."""
    prompts = random_prompts(batch, SHAPE.prompt_tokens, SHAPE.vocab_size)
    with steady_decode(engine, prompts, TOKENS):
        before = engine.stats()
        outputs = benchmark.pedantic(engine.step, rounds=128, warmup_rounds=4)
        after = engine.stats()
        assert len(outputs) == batch
    benchmark.extra_info["host_us_per_step"] = (after.host_us - before.host_us) / (after.steps - before.steps)


def one_call(benchmark: BenchmarkFixture, parts: Inside, call: Callable[[], object]) -> None:
    """Times single calls with nothing enqueued before them, so that what counts is the host's share."""
    benchmark.pedantic(call, setup=parts.pipeline.synchronize, rounds=300, warmup_rounds=20)


@pytest.mark.benchmark(group="host cost of a call")
@pytest.mark.parametrize("batch", BATCHES)
def test_graph_launch(benchmark: BenchmarkFixture, parts: Inside, batch: int) -> None:
    graph, compute = parts.graph(batch), parts.pipeline.compute
    one_call(benchmark, parts, lambda: compute.launch(graph))


@pytest.mark.benchmark(group="host cost of a call")
def test_launch_of_a_step_in_pieces(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """A decode step of 64 slots, cut at the attention of each of 28 layers: 29 graphs and 28 calls between them."""
    folder = write_config(SHAPE, tmp_path)
    backend = BackendConfig(capture_sizes=(64, 256), decode="piecewise", prefill="off", verify=False)
    with Engine(engine_config(SHAPE, folder, backend, device="cuda")) as engine:
        parts = inside(engine)
        key = parts.key(64)
        step = RunningStep(key, StepPlan(key.variant), None)
        contexts = Contexts(64, SHAPE.prompt_tokens, SHAPE.prompt_tokens + TOKENS)
        with parts.borrowed():
            graph, pipeline = parts.graph(64), parts.pipeline
            pipeline.compute.run(lambda: parts.set_contexts(contexts))
            launch = partial(pipeline.compute.launch, graph, step)
            benchmark.pedantic(launch, setup=pipeline.synchronize, rounds=TOKENS - 40, warmup_rounds=20)
            pipeline.synchronize()
            parts.check_moved(contexts, TOKENS - 20)
    benchmark.extra_info["breaks"] = graph.breaks


@pytest.mark.benchmark(group="host cost of a call")
def test_event_record(benchmark: BenchmarkFixture, parts: Inside) -> None:
    event, compute = parts.pipeline.runtime.event(), parts.pipeline.compute
    one_call(benchmark, parts, lambda: compute.record(event))
    assert compute.drain(DRAIN_S)
    event.close()


@pytest.mark.benchmark(group="host cost of a call")
def test_stream_waits_for_an_event(benchmark: BenchmarkFixture, parts: Inside) -> None:
    runtime, compute = parts.pipeline.runtime, parts.pipeline.compute
    event, other = runtime.event(), runtime.stream("other")
    compute.record(event)
    one_call(benchmark, parts, lambda: other.wait(event))
    assert compute.drain(DRAIN_S)
    assert other.drain(DRAIN_S)
    event.close()


@pytest.mark.benchmark(group="host cost of a call")
def test_event_query(benchmark: BenchmarkFixture, parts: Inside) -> None:
    event, compute = parts.pipeline.runtime.event(), parts.pipeline.compute
    compute.record(event)
    one_call(benchmark, parts, event.query)
    event.close()


@pytest.mark.benchmark(group="host cost of a call")
def test_copy_of_two_kilobytes_to_the_host(benchmark: BenchmarkFixture, parts: Inside) -> None:
    """About the output record of 256 slots."""
    runtime, compute = parts.pipeline.runtime, parts.pipeline.compute
    target = runtime.pinned((512,), torch.int32)
    source = torch.arange(512, dtype=torch.int32, device=runtime.device)
    runtime.settle()
    one_call(benchmark, parts, lambda: compute.copy(target, source))
    assert compute.drain(DRAIN_S)
    assert target.tolist() == list(range(512))
