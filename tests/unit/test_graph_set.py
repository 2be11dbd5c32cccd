"""The graph set and the verification of its graphs: the mechanism alone, without a program."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from graphexec.capture.graph_set import GraphSet, frozen_garbage_collection
from graphexec.capture.manifest import CapturedGraph, Manifest
from graphexec.capture.verify import compare, poison, snapshot
from graphexec.errors import CaptureError
from graphexec.plan import GraphKey
from graphexec.runtime import Stream
from graphexec.runtime.base import Pool
from graphexec.runtime.breaks import Cuts
from graphexec.runtime.cpu import CpuGraph, CpuStream
from tests.support.instant_program import PATIENCE_S, WatchedRuntime

LARGE, SMALL = (GraphKey("decode", size, size, "plain") for size in (8, 2))


class PoolWatchingRuntime(WatchedRuntime):
    """Notes which pool each capture used."""

    def __init__(self) -> None:
        super().__init__()
        self.pools: list[Pool] = []

    def pool(self) -> Pool:
        return object()

    def capture(self, work: Callable[[], None], stream: Stream, pool: Pool, cuts: Cuts = Cuts.NONE) -> CpuGraph:
        self.pools.append(pool)
        return super().capture(work, stream, pool, cuts)


@pytest.fixture
def runtime() -> PoolWatchingRuntime:
    return PoolWatchingRuntime()


@pytest.fixture
def stream(runtime: PoolWatchingRuntime) -> Iterator[CpuStream]:
    stream = runtime.stream("compute")
    yield stream
    stream.close()


@pytest.fixture
def graphs(runtime: PoolWatchingRuntime, stream: CpuStream) -> GraphSet:
    return GraphSet(runtime, stream)


def test_a_captured_graph_is_found_by_its_key_alone(graphs: GraphSet) -> None:
    graph = graphs.capture(LARGE, lambda: None)
    assert graphs.get(GraphKey("decode", 8, 8, "plain")) is graph
    for other in (SMALL, GraphKey("decode", 8, 8, "doubled"), GraphKey("mixed", 8, 8, "plain")):
        assert graphs.get(other) is None


def test_all_graphs_share_one_pool(graphs: GraphSet, runtime: PoolWatchingRuntime) -> None:
    graphs.capture(LARGE, lambda: None)
    graphs.capture(SMALL, lambda: None)
    graphs.capture_unkeyed(lambda: None)
    assert len(runtime.pools) == 3
    assert len(set(map(id, runtime.pools))) == 1


def test_a_failed_capture_names_bucket_and_cause_and_spares_the_others(graphs: GraphSet, stream: CpuStream) -> None:
    cause = RuntimeError("operation not permitted")
    replays: list[int] = []
    graph = graphs.capture(LARGE, lambda: replays.append(1))

    def fail() -> None:
        raise cause

    with pytest.raises(CaptureError, match="decode step, bucket 2, 2 rows, plain failed: RuntimeError: oper") as raised:
        graphs.capture(SMALL, fail)
    assert raised.value.__cause__ is cause
    assert graphs.get(SMALL) is None
    stream.launch(graph)
    assert stream.drain(PATIENCE_S)
    assert len(replays) == 2  # the watched runtime calls the work once to capture it
    assert graphs.capture(SMALL, lambda: None) is graphs.get(SMALL)


def test_an_interrupt_in_a_capture_is_not_dressed_up_as_a_capture_error(graphs: GraphSet) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        graphs.capture(SMALL, interrupt)


def test_a_sealed_set_never_captures(graphs: GraphSet, runtime: PoolWatchingRuntime) -> None:
    graph = graphs.capture(LARGE, lambda: None)
    assert not graphs.sealed
    graphs.seal()
    with pytest.raises(CaptureError, match="sealed.*bucket 2"):
        graphs.capture(SMALL, lambda: pytest.fail("captured"))
    assert len(runtime.pools) == 1
    assert graphs.get(LARGE) is graph


def test_a_discarded_graph_is_freed_and_gone(graphs: GraphSet, runtime: PoolWatchingRuntime) -> None:
    graphs.capture(LARGE, lambda: None)
    graphs.discard(LARGE)
    assert graphs.get(LARGE) is None
    assert runtime.freed == ["graph"]


def test_closing_frees_every_graph_once(graphs: GraphSet, runtime: PoolWatchingRuntime) -> None:
    graphs.capture(LARGE, lambda: None)
    graphs.capture(SMALL, lambda: None)
    graphs.close()
    graphs.close()
    assert runtime.freed == ["graph", "graph"]


def test_garbage_collection_is_frozen_inside_and_as_before_outside() -> None:
    assert gc.isenabled()
    with frozen_garbage_collection():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    with pytest.raises(ValueError, match="inside"), frozen_garbage_collection():
        raise ValueError("inside")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_garbage_collection_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with frozen_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_was_garbage_before_a_capture_is_collected_before_it() -> None:
    """vLLM 54646: a module freed in the middle of a capture."""
    freed: list[str] = []

    class Cycle:
        def __del__(self) -> None:
            freed.append("cycle")

    cycle = Cycle()
    cycle.itself = cycle
    del cycle
    with frozen_garbage_collection():
        assert freed == ["cycle"]


def test_equal_results_pass_and_broken_numbers_equal_themselves() -> None:
    values = [torch.tensor([1.0, float("nan")]), torch.tensor([3, 4])]
    compare(LARGE, ["a", "b"], values, snapshot(values))


@pytest.mark.parametrize(
    "wrong", [torch.tensor([1.0, 2.5]), torch.tensor([1.0, float("nan")]), torch.tensor([float("inf"), 2.0])]
)
def test_a_difference_names_the_key_and_the_output(wrong: torch.Tensor) -> None:
    same = torch.tensor([7])
    with pytest.raises(CaptureError, match="bucket 8.*1 of 2 elements of logits"):
        compare(LARGE, ["tokens", "logits"], [same, torch.tensor([1.0, 2.0])], [same, wrong])


def test_an_output_that_is_missing_is_a_difference() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare(LARGE, ["tokens"], [torch.zeros(1)], [])


def test_poison_equals_no_output_of_a_step() -> None:
    tensors = [torch.zeros(2), torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)]
    poison(tensors)
    assert tensors[0].isnan().all()
    assert all((tensor < -1).all() for tensor in tensors[1:])


def test_a_snapshot_is_not_changed_by_what_comes_after() -> None:
    tensor = torch.zeros(2)
    (copy,) = snapshot([tensor])
    tensor.fill_(5)
    assert copy.tolist() == [0, 0]


def test_the_manifest_says_what_was_captured_and_what_is_missing(tmp_path: Path) -> None:
    graph = CapturedGraph(
        key=LARGE,
        nodes=12,
        kernels=10,
        pool_bytes=1 << 20,
        warmup_s=3.0,
        capture_s=0.25,
        fingerprint="abc",
        verified=True,
    )
    manifest = Manifest.of(torch.device("cpu"), [graph, graph], {SMALL: "out of memory"})
    assert (manifest.capture_s, manifest.pool_bytes) == (0.5, 2 << 20)
    manifest.write(tmp_path / "manifest.json")
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert written["missing"] == {"decode step, bucket 2, 2 rows, plain": "out of memory"}
    assert written["graphs"][0]["key"]["bucket"] == 8
    assert written["capture_s"] == 0.5
