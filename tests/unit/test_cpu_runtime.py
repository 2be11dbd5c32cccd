"""The CPU runtime: what streams and events promise, so that a missing fence can fail without a GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from graphexec.errors import ConfigError, DeviceError
from graphexec.runtime import CpuRuntime, create_runtime
from graphexec.runtime.cpu import CpuStream
from tests.support.instant_program import PATIENCE_S, Gate


@pytest.fixture
def runtime() -> CpuRuntime:
    return CpuRuntime()


@pytest.fixture
def stream(runtime: CpuRuntime) -> Iterator[CpuStream]:
    stream = runtime.stream("first")
    yield stream
    stream.close()


@pytest.fixture
def other(runtime: CpuRuntime) -> Iterator[CpuStream]:
    other = runtime.stream("second")
    yield other
    other.close()


def test_a_wait_before_the_first_record_passes(runtime: CpuRuntime, stream: CpuStream) -> None:
    event = runtime.event()
    assert event.query()
    assert event.wait(0)
    stream.wait(event)
    assert stream.drain(PATIENCE_S)


def test_an_event_that_is_recorded_again_is_out_again(runtime: CpuRuntime, stream: CpuStream) -> None:
    event, gate = runtime.event(), Gate()
    stream.record(event)
    assert event.wait(PATIENCE_S)
    stream.run(gate)
    stream.record(event)
    assert not event.query()
    assert not event.wait(0.02)
    gate.open()
    assert event.wait(PATIENCE_S)


def test_a_stream_waits_for_the_record_that_was_the_latest_when_it_was_told_to(
    runtime: CpuRuntime, stream: CpuStream, other: CpuStream
) -> None:
    event, gate, later = runtime.event(), Gate(), Gate()
    stream.run(gate)
    stream.record(event)
    other.wait(event)
    stream.run(later)
    stream.record(event)  # a second generation, which the wait above must not wait for
    assert not other.drain(0.02)
    gate.open()
    assert other.drain(PATIENCE_S)
    assert not event.query()
    later.open()
    assert event.wait(PATIENCE_S)


def test_a_generation_that_arrives_late_does_not_take_a_newer_one_back(runtime: CpuRuntime) -> None:
    event = runtime.event()
    older, newer = event.ask(), event.ask()
    event.reach(newer)
    event.reach(older)
    assert event.query()


def test_two_streams_run_at_the_same_time_and_beside_the_host(stream: CpuStream, other: CpuStream) -> None:
    meeting = threading.Barrier(3, timeout=PATIENCE_S)
    stream.run(meeting.wait)
    other.run(meeting.wait)
    meeting.wait()  # passes only if all three are there at once
    assert stream.drain(PATIENCE_S)
    assert other.drain(PATIENCE_S)
    stream.check()
    other.check()


def test_a_stream_keeps_the_order_of_its_work(stream: CpuStream) -> None:
    seen: list[int] = []
    for number in range(100):
        stream.run(lambda number=number: seen.append(number))
    assert stream.drain(PATIENCE_S)
    assert seen == list(range(100))


def test_waits_of_the_host_are_bounded(runtime: CpuRuntime, stream: CpuStream) -> None:
    event, gate = runtime.event(), Gate()
    stream.run(gate)
    stream.record(event)
    started = time.perf_counter()
    assert not event.wait(0.05)
    assert not stream.drain(0.05)
    assert 0.1 <= time.perf_counter() - started < 5
    gate.open()


def test_an_exception_in_a_worker_is_raised_by_the_next_calls(runtime: CpuRuntime, stream: CpuStream) -> None:
    cause = ValueError("no such token")
    stream.run(lambda: _raise(cause))
    assert stream.drain(PATIENCE_S)
    for call in (
        stream.check,
        lambda: stream.run(lambda: None),
        lambda: stream.copy(torch.zeros(1), torch.zeros(1)),
        lambda: stream.launch(runtime.capture(lambda: None, stream, None)),
    ):
        with pytest.raises(DeviceError, match="ValueError: no such token") as raised:
            call()
        assert raised.value.__cause__ is cause


def test_a_failed_stream_skips_later_work_but_reaches_its_fences(
    runtime: CpuRuntime, stream: CpuStream, other: CpuStream
) -> None:
    gate, event, ran = Gate(), runtime.event(), []
    stream.run(gate)
    stream.run(lambda: _raise(ValueError()))
    stream.run(lambda: ran.append("after the failure"))
    stream.record(event)
    other.wait(event)
    gate.open()
    assert event.wait(PATIENCE_S)
    assert other.drain(PATIENCE_S)
    assert ran == []
    other.check()


def test_every_worker_enters_no_grad_by_itself(stream: CpuStream) -> None:
    weight = torch.ones(2, requires_grad=True)
    made: list[torch.Tensor] = []
    with torch.enable_grad():
        stream.run(lambda: made.append(weight * 2))
        assert stream.drain(PATIENCE_S)
    assert not made[0].requires_grad
    assert not made[0].is_inference()  # such tensors could not be changed in place elsewhere


def test_a_graph_replays_over_the_same_buffers(runtime: CpuRuntime, stream: CpuStream) -> None:
    total, term = torch.zeros(1), torch.ones(1)
    graph = runtime.capture(lambda: total.add_(term), stream, runtime.pool())
    assert total.item() == 0, "a capture runs nothing"
    stream.launch(graph)
    stream.run(lambda: term.fill_(5))
    stream.launch(graph)
    assert stream.drain(PATIENCE_S)
    assert total.item() == 6
    assert graph.describe() == graph.describe()


def test_a_closed_stream_ends_its_worker(runtime: CpuRuntime) -> None:
    stream = runtime.stream("closing")
    worker = _worker("graphexec-closing")
    runtime.close_stream(stream)
    assert not worker.is_alive()


def test_other_devices_are_refused() -> None:
    assert create_runtime(torch.device("cpu")).device.type == "cpu"
    with pytest.raises(ConfigError, match="meta"):
        create_runtime(torch.device("meta"))


def _worker(name: str) -> threading.Thread:
    return next(thread for thread in threading.enumerate() if thread.name == name)


def _raise(error: Exception) -> None:
    raise error
