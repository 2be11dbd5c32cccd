"""The CPU runtime: a stream is a worker thread with a queue, so overlap is truly asynchronous without a GPU.

A "graph" is the recorded call over fixed buffers with its host numbers frozen.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from functools import partial

import torch

from graphexec.errors import DeviceError
from graphexec.runtime.arguments import NodeArguments
from graphexec.runtime.base import Event, Graph, GraphInfo, Pool, Runtime, Stream
from graphexec.runtime.breaks import BreakCall, Cuts, RunningStep, cutting, running

__all__ = ["CpuEvent", "CpuGraph", "CpuRuntime", "CpuStream"]

_thread = threading.local()
"""`works` is set in the workers of streams."""


class CpuEvent(Event):
    """Counts generations: each record asks for the next one, and a wait is for the latest one asked for at its call."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked = 0
        self._reached = 0

    def ask(self) -> int:
        """Begins a new generation and returns its number."""
        with self._changed:
            self._asked += 1
            return self._asked

    def reach(self, generation: int) -> None:
        with self._changed:
            self._reached = max(self._reached, generation)
            self._changed.notify_all()

    def asked(self) -> int:
        return self._asked

    def wait_for(self, generation: int, timeout_s: float | None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._reached >= generation, timeout_s)

    def query(self) -> bool:
        return self._reached >= self._asked

    def wait(self, timeout_s: float) -> bool:
        return self.wait_for(self._asked, timeout_s)

    def close(self) -> None:
        pass


class CpuGraph(Graph):
    """A call over fixed buffers, in the context of its capture. How many breaks it has, only its replays tell."""

    def __init__(self, work: Callable[[], None], name: str, cuts: Cuts = Cuts.NONE) -> None:
        self._work = work
        self._context = copy_context()  # frozen, as its numbers are
        self._name = name
        self._cuts = cuts
        self._breaks = 0

    @property
    def has_breaks(self) -> bool:
        return self._cuts is not Cuts.NONE

    @property
    def breaks(self) -> int:
        return self._breaks

    def replay(self, step: RunningStep | None = None) -> None:
        """Runs the call; its eager breaks, and nothing else, are told `step`."""
        self._context.run(self._replay, step)

    def _replay(self, step: RunningStep | None) -> None:
        met: list[BreakCall] = []

        def run(call: BreakCall) -> None:
            met.append(call)
            prepared = call.prepared()
            with nullcontext() if step is None else running(step), cutting(run, Cuts.NONE):
                prepared()

        with cutting(run, self._cuts):
            self._work()
        self._breaks = len(met)

    def describe(self) -> GraphInfo:
        fingerprint = hashlib.sha256(self._name.encode()).hexdigest()[:16]
        return GraphInfo(nodes=1, kernels=0, fingerprint=fingerprint)

    def arguments(self) -> list[NodeArguments]:
        return [NodeArguments(self._name, "call", (), None, "on the CPU a graph is a call, without parameters to read")]

    def close(self) -> None:
        pass


class CpuStream(Stream):
    """A worker thread that takes work in order.

    After a failure the remaining work is skipped, as on a device with a sticky error; events are still reached, so
    that nobody waits for ever, and every later call raises.
    """

    def __init__(self, name: str, runtime: CpuRuntime) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[[], None], bool] | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._runtime = runtime
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._serve, name=f"graphexec-{name}", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], None]) -> None:
        self.check()
        self._work.put((work, False))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.run(lambda: _copy(target, source))

    def record(self, event: Event) -> None:
        assert isinstance(event, CpuEvent)
        generation = event.ask()
        self._work.put((lambda: event.reach(generation), True))

    def wait(self, event: Event) -> None:
        assert isinstance(event, CpuEvent)
        generation = event.asked()
        self._work.put((lambda: _wait(event, generation), True))

    def launch(self, graph: Graph, step: RunningStep | None = None) -> None:
        assert isinstance(graph, CpuGraph)
        self.run(partial(graph.replay, step))

    def check(self) -> None:
        if self._failure is not None:
            raise DeviceError(
                f"Work on stream {self._thread.name!r} failed: {type(self._failure).__name__}: {self._failure}. "
                "What was enqueued after it did not run; close the engine."
            ) from self._failure

    def drain(self, timeout_s: float) -> bool:
        event = CpuEvent()
        self.record(event)
        return event.wait(timeout_s)

    def close(self) -> None:
        self._work.put(None)
        self._thread.join(timeout=10)

    def _serve(self) -> None:
        _thread.works = True
        torch.set_num_threads(self._threads)  # the setting is a thread's own, and a worker would begin with the default
        with self._runtime.activated():
            while (item := self._work.get()) is not None:
                work, is_fence = item
                if self._failure is None or is_fence:
                    try:
                        work()
                    except BaseException as failure:  # kept, and raised by the next call from the host
                        self._failure = failure
                del work, item  # or what they refer to would live until there is more work


class CpuRuntime(Runtime):
    """Worker threads as streams, plain memory as pinned memory."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    @contextmanager
    def activated(self) -> Iterator[None]:
        with torch.no_grad():
            yield

    def stream(self, name: str) -> CpuStream:
        return CpuStream(name, self)

    def event(self) -> CpuEvent:
        return CpuEvent()

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def device_view(self, pinned: torch.Tensor) -> torch.Tensor:
        return pinned

    def pool(self) -> Pool:
        return None

    def capture(self, work: Callable[[], None], stream: Stream, pool: Pool, cuts: Cuts = Cuts.NONE) -> CpuGraph:
        return CpuGraph(work, getattr(work, "__qualname__", type(work).__name__), cuts)

    def memory(self) -> tuple[int, int]:
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page

    def used(self) -> int:
        return 0

    def trim(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def is_worker(self) -> bool:
        return getattr(_thread, "works", False)

    def close_stream(self, stream: Stream) -> None:
        assert isinstance(stream, CpuStream)
        stream.close()


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)


def _wait(event: CpuEvent, generation: int) -> None:
    event.wait_for(generation, None)
