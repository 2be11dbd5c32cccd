"""Graphs in pieces: breaks read the device between them, own nothing, and change no bit of a step."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from examples.collatz import Collatz, Start
from graphexec import (
    BackendConfig,
    CaptureError,
    GraphKey,
    RunningStep,
    StepHandle,
    StepPlan,
    create_backend,
    create_runtime,
    eager_break,
    running_step,
)
from graphexec.capture.graph_set import GraphSet
from graphexec.runtime import Runtime, Stream
from graphexec.runtime.breaks import Cuts
from tests.gpu.test_engine import SETTINGS, open_engine, requests, tokens
from tests.support.checkpoints import make_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FIRST, SECOND = GraphKey("decode", 8, 8, "plain"), GraphKey("decode", 4, 4, "plain")
STEP = RunningStep(FIRST, StepPlan("plain"), None)


@pytest.fixture
def runtime() -> Runtime:
    return create_runtime(torch.device("cuda"))


@pytest.fixture
def stream(runtime: Runtime) -> Stream:
    return runtime.stream("compute")


@pytest.fixture
def graphs(runtime: Runtime, stream: Stream) -> Iterator[GraphSet]:
    graphs = GraphSet(runtime, stream)
    yield graphs
    assert stream.drain(10)
    graphs.close()


@eager_break(writes=("out",))
def add_largest(source: torch.Tensor, out: torch.Tensor) -> None:
    """Waits for the device, as nothing in a graph may."""
    out.copy_(source + int(source.max()))


@eager_break
def tell_step(out: torch.Tensor) -> None:
    out.fill_(running_step().key.bucket)


def layer(hidden: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(hidden)
    add_largest(hidden * 2, out)
    return out + 1


def filled(value: float) -> torch.Tensor:
    tensor = torch.full((512, 512), value, device="cuda")
    torch.cuda.synchronize()
    return tensor


def replay(stream: Stream, graphs: GraphSet, key: GraphKey = FIRST, step: RunningStep = STEP) -> None:
    graph = graphs.get(key)
    assert graph is not None
    stream.launch(graph, step)
    assert stream.drain(10)


def test_a_break_reads_what_the_pieces_before_it_computed(stream: Stream, graphs: GraphSet) -> None:
    hidden, out = filled(1), filled(0)
    torch.cuda.synchronize()

    def work() -> None:
        value = hidden
        for _ in range(5):
            value = layer(value)
        out.copy_(value)

    graph = graphs.capture(FIRST, work, Cuts.MARKED)
    assert graph.breaks == 5
    assert out.max() == 0, "capturing runs nothing"
    for start in (1, 3):
        hidden.fill_(start)
        torch.cuda.synchronize()
        replay(stream, graphs)
        expected = start
        for _ in range(5):
            expected = 4 * expected + 1
        assert (out == expected).all()


def test_nothing_between_two_breaks_is_no_piece_and_the_step_is_told(stream: Stream, graphs: GraphSet) -> None:
    target = filled(0)

    def work() -> None:
        tell_step(target)
        tell_step(target)
        target.add_(1)

    graph = graphs.capture(FIRST, work, Cuts.MARKED)
    assert (graph.breaks, graph.describe().kernels) == (2, 1)
    for bucket in (8, 4):
        replay(stream, graphs, step=RunningStep(GraphKey("decode", bucket, bucket, "plain"), STEP.plan, None))
        assert (target == bucket + 1).all()


@eager_break
def add_prepared(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source + 7)


@add_prepared.prepare
def _(source: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
    sevens = torch.full_like(source, 7)  # a buffer of its own, filled once
    torch.cuda.current_stream().synchronize()

    def call() -> None:
        torch.add(source, sevens, out=target)

    return call


def test_what_a_break_prepares_is_made_once_and_lies_beside_the_memory_of_the_pieces(
    stream: Stream, graphs: GraphSet
) -> None:
    hidden, out = filled(1), filled(0)

    def work() -> None:
        value = hidden
        for _ in range(6):
            target = torch.empty_like(value)
            add_prepared(value * 2, target)
            value = torch.sin(target) * 0 + target
        out.copy_(value)

    graphs.capture(FIRST, work, Cuts.MARKED)
    for _ in range(3):
        replay(stream, graphs)
        expected = 1
        for _ in range(6):
            expected = 2 * expected + 7
        assert (out == expected).all()


def test_breaks_keep_addresses_and_no_memory(runtime: Runtime, stream: Stream, graphs: GraphSet) -> None:
    hidden = filled(1)
    kept: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        value = hidden
        for _ in range(40):
            value = layer(value)
            kept.append(weakref.ref(value))

    before = runtime.used()
    graphs.capture(FIRST, work, Cuts.MARKED)
    assert all(reference() is None for reference in kept)
    assert runtime.used() - before < 32 * 2**20, "40 layers of a MiB each, with three tensors a layer"
    replay(stream, graphs)


@pytest.mark.parametrize("offence", ["item", "memory", "exception"])
def test_a_capture_that_fails_in_a_later_piece_leaves_the_process_usable(
    stream: Stream, graphs: GraphSet, offence: str
) -> None:
    hidden, total = filled(1), filled(0)
    graphs.capture(FIRST, lambda: total.add_(1))

    def work() -> None:
        value = layer(layer(hidden))
        if offence == "item":
            value.sum().item()
        elif offence == "memory":
            torch.empty(1 << 50, dtype=torch.int8, device="cuda")
        raise ValueError("broken on purpose")

    with pytest.raises(CaptureError, match="bucket 4"):
        graphs.capture(SECOND, work, Cuts.MARKED)
    assert torch.cuda.get_sync_debug_mode() == 0
    replay(stream, graphs)
    graphs.capture(SECOND, lambda: total.copy_(layer(total)), Cuts.MARKED)
    replay(stream, graphs, SECOND)
    assert (total == 5).all()


def test_a_whole_capture_of_a_break_that_waits_fails_and_says_what_to_do(graphs: GraphSet) -> None:
    hidden = filled(1)
    with pytest.raises(CaptureError, match="can be an eager break"):
        graphs.capture(FIRST, lambda: layer(hidden), Cuts.NONE)


def test_compiled_code_is_cut_where_it_calls_a_break(stream: Stream, graphs: GraphSet) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4))).cuda()
    inputs, out = torch.randn(8, 64, device="cuda"), torch.zeros(8, 64, device="cuda")

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        for module in model:
            hidden = torch.relu(layer(torch.tanh(module(hidden))))
        return hidden

    compiled = torch.compile(forward, fullgraph=True)
    with torch.no_grad():
        expected = compiled(inputs)
        torch.cuda.synchronize()
        graph = graphs.capture(FIRST, lambda: out.copy_(compiled(inputs)), Cuts.MARKED)
        replay(stream, graphs)
        assert torch.equal(out, expected)
        assert graph.breaks == 4
        torch.testing.assert_close(out, forward(inputs))


class Logged(Collatz):
    """Writes down, on the device, what the host planned for each step."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.planned = torch.zeros(1, dtype=torch.int32, device=device)
        self.log = torch.zeros(256, dtype=torch.int32, device=device)
        self.plans = 0

    def before_launch(self, key: GraphKey, plan: StepPlan) -> None:
        self.plans += 1
        self.planned.fill_(self.plans)

    def step(self, key: GraphKey) -> None:
        self.log.index_copy_(0, (self.io.counter % len(self.log)).long(), self.planned)
        super().step(key)

    def state(self) -> list[torch.Tensor]:
        return [*super().state(), self.log]


@pytest.mark.parametrize("decode", ["full", "piecewise", "off"])
def test_what_the_host_plans_for_a_step_reaches_that_step_with_others_in_flight(decode: str) -> None:
    runtime = create_runtime(torch.device("cuda"))
    program = Logged(runtime.device)
    backend = create_backend(BackendConfig(decode=decode, prefill="off"), runtime)
    backend.prepare(program)
    try:
        backend.warmup()
        first = program.plans + 1
        handles: deque[StepHandle] = deque()
        for step in range(200):
            handles.append(backend.submit(StepPlan("plain", Start({0: 27}) if step % 100 == 0 else None)))
            if len(handles) > 4:
                handles.popleft().result()
        while handles:
            handles.popleft().result()
        assert program.log[:200].tolist() == list(range(first, first + 200))
    finally:
        backend.close()


@pytest.mark.parametrize("compile", ["off", "layer"])
def test_an_engine_in_pieces_gives_the_tokens_of_whole_graphs(
    tmp_path_factory: pytest.TempPathFactory, compile: str
) -> None:
    checkpoint: Path = make_checkpoint(tmp_path_factory.mktemp("pieces") / "model", **SETTINGS)
    wanted = requests(12)
    expected: list[list[int]] = []
    for mode, depth in (("full", 1), ("piecewise", 0), ("piecewise", 2)):
        backend = BackendConfig(
            name="cudagraph", decode=mode, prefill=mode, capture_sizes=(8,), prefill_sizes=(264,), verify=True
        )
        with open_engine(
            checkpoint, backend, compile=compile, overlap_depth=depth, max_num_batched_tokens=256
        ) as engine:
            expected = expected or tokens(engine, wanted)
            assert tokens(engine, wanted) == expected
            assert engine.stats().modes == {"decode": mode, "prefill": mode}
            pieces = {graph.pieces for graph in engine.manifest.graphs}
            assert pieces == ({1} if mode == "full" else {SETTINGS["num_hidden_layers"] + 1})
