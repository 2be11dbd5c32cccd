"""The CUDA runtime: captures that fail leave the process as it was, copies run beside the graph."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from graphexec import CaptureError
from graphexec.capture.graph_set import GraphSet
from graphexec.plan import GraphKey
from graphexec.runtime import Runtime, Stream, create_runtime

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FIRST = GraphKey("decode", 8, 8, "plain")
SECOND = GraphKey("decode", 4, 4, "plain")


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


def numbers() -> torch.Tensor:
    tensor = torch.arange(1024.0, device="cuda")
    torch.cuda.synchronize()
    return tensor


def test_a_graph_repeats_its_work_over_the_same_addresses(stream: Stream, graphs: GraphSet) -> None:
    total = numbers()
    graph = graphs.capture(FIRST, lambda: total.add_(1))
    assert total[0].item() == 0, "capturing runs nothing"
    for _ in range(3):
        stream.launch(graph)
    assert stream.drain(10)
    assert torch.equal(total, torch.arange(1024.0, device="cuda") + 3)
    assert graph.describe().kernels == 1


@pytest.mark.parametrize(
    "offence",
    [
        lambda: torch.ones(2, device="cuda").sum().item(),
        lambda: torch.tensor([1.0, 2.0]).to("cuda"),
        lambda: torch.cuda.synchronize(),
        lambda: torch.empty(1 << 50, dtype=torch.int8, device="cuda"),
    ],
    ids=["item", "blocking copy", "synchronize", "out of memory"],
)
def test_a_failed_capture_leaves_the_process_usable(
    runtime: Runtime, stream: Stream, graphs: GraphSet, offence: object
) -> None:
    assert callable(offence)
    total = numbers()
    graph = graphs.capture(FIRST, lambda: total.add_(1))
    with pytest.raises(CaptureError, match="bucket 4"):
        graphs.capture(SECOND, offence)
    assert torch.cuda.get_sync_debug_mode() == 0
    torch.manual_seed(0)
    drawn = torch.rand(16, device="cuda")  # the generators are not left "capturing"
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(16, device="cuda"))
    again = graphs.capture(SECOND, lambda: total.mul_(2))  # nor is the pool left "recording"
    torch.cuda.synchronize()
    stream.launch(graph)
    stream.launch(again)
    assert stream.drain(10)
    assert torch.equal(total, (torch.arange(1024.0, device="cuda") + 1) * 2)


def test_torchs_own_capture_works_after_a_failed_one(graphs: GraphSet) -> None:
    with pytest.raises(CaptureError):
        graphs.capture(FIRST, torch.cuda.synchronize)
    total = numbers()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total.add_(torch.rand(1024, device="cuda"))
    graph.replay()
    torch.cuda.synchronize()
    assert (total >= torch.arange(1024.0, device="cuda")).all()


def test_an_error_of_memory_is_told_from_other_failures(graphs: GraphSet) -> None:
    with pytest.raises(CaptureError) as failure:
        graphs.capture(FIRST, lambda: torch.empty(1 << 50, dtype=torch.int8, device="cuda"))
    assert isinstance(failure.value.__cause__, torch.OutOfMemoryError)


def test_a_copy_waits_for_its_fence_and_not_for_later_work(runtime: Runtime, stream: Stream) -> None:
    copies = runtime.stream("copy")
    done, copied = runtime.event(), runtime.event()
    source, target = numbers().int(), runtime.pinned((1024,), torch.int32)
    source.add_(0)  # loads what the timed part launches: loading may wait for the device
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    stream.run(lambda: torch.cuda._sleep(20_000_000))  # about ten milliseconds
    stream.run(lambda: source.add_(7))
    stream.record(done)
    stream.run(lambda: torch.cuda._sleep(2_000_000_000))  # about a second
    copies.wait(done)
    copies.copy(target, source)
    copies.record(copied)
    assert not copied.query()
    assert not copied.wait(0.0001), "a wait is bounded"
    assert copied.wait(5)
    assert torch.equal(target, torch.arange(1024, dtype=torch.int32) + 7)
    assert not stream.drain(0.001), "the copy did not wait for what came after its fence"
    assert stream.drain(30)


def test_an_event_that_was_never_recorded_has_passed(runtime: Runtime, stream: Stream) -> None:
    event = runtime.event()
    assert event.query()
    stream.wait(event)
    assert event.wait(0.1)


def test_fingerprints_tell_graphs_apart(graphs: GraphSet) -> None:
    total = numbers()
    first = graphs.capture(FIRST, lambda: total.add_(1)).describe()
    same = graphs.capture(FIRST, lambda: total.add_(1)).describe()
    other = graphs.capture(SECOND, lambda: total.cos_().add_(1)).describe()
    assert first == same
    assert other.fingerprint != first.fingerprint
    assert other.nodes == 2
