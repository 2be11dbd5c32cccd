"""The interface of a runtime: what the pipeline needs of a device, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

from graphexec.runtime.arguments import NodeArguments
from graphexec.runtime.breaks import Cuts, RunningStep

__all__ = ["Event", "Graph", "GraphInfo", "Pool", "Runtime", "Stream"]

Pool = object
"""A handle of a memory pool that graphs share; made by `Runtime.pool`, opaque to everybody else."""


class Event(ABC):
    """A point in a stream's work. May be recorded again; waiting on an event that was never recorded passes at once."""

    @abstractmethod
    def query(self) -> bool:
        """Whether the work before the latest record has finished. Never blocks."""

    @abstractmethod
    def wait(self, timeout_s: float) -> bool:
        """Blocks the host, without the GIL, until `query()` holds; False when `timeout_s` passed first."""

    @abstractmethod
    def close(self) -> None:
        """Frees the event. Nothing may be pending on it."""


class Stream(ABC):
    """An ordered queue of device work. Errors of asynchronous work are raised by the next call."""

    @abstractmethod
    def run(self, work: Callable[[], None]) -> None:
        """Enqueues what `work` does on the device. `work` itself may run now (CUDA) or later (CPU)."""

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueues a copy between two contiguous tensors of equal size; host tensors must come from `pinned`."""

    @abstractmethod
    def record(self, event: Event) -> None:
        """Enqueues `event`."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Makes later work of this stream wait for the latest record of `event`. Does not block the host."""

    @abstractmethod
    def launch(self, graph: Graph, step: RunningStep | None = None) -> None:
        """Enqueues one replay of `graph`; a graph that `has_breaks` needs the step that they belong to."""

    @abstractmethod
    def check(self) -> None:
        """Raises DeviceError if work on this stream has failed. Never blocks."""

    @abstractmethod
    def drain(self, timeout_s: float) -> bool:
        """Blocks the host until the stream is empty; False when `timeout_s` passed first."""


@dataclass(frozen=True)
class GraphInfo:
    """What a captured graph consists of.

    Attributes:
        nodes: number of nodes of any kind.
        kernels: number of kernel nodes.
        fingerprint: hash over the nodes' kinds, kernel names and launch sizes, and the edges between them with their
            kinds; equal graphs have equal fingerprints.
        launches: how often a kernel is launched, by its name.
    """

    nodes: int
    kernels: int
    fingerprint: str
    launches: Mapping[str, int] = field(default_factory=dict)


class Graph(ABC):
    """Captured device work that replays over the same addresses, whole or in pieces with eager breaks between them."""

    @property
    @abstractmethod
    def has_breaks(self) -> bool:
        """Whether a replay calls eager breaks (on the CPU: whether it may)."""

    @property
    @abstractmethod
    def breaks(self) -> int:
        """Eager breaks that a replay calls (on the CPU: that its latest replay called)."""

    @abstractmethod
    def describe(self) -> GraphInfo:
        """Counts the nodes. Slow (it walks the graph): not for the step path."""

    @abstractmethod
    def arguments(self) -> list[NodeArguments]:
        """What each node was given, in the order of capture; where that cannot be read, the reason.

        Addresses are told from numbers by asking the driver: the memory that the graph uses must still be there.
        """

    @abstractmethod
    def close(self) -> None:
        """Frees the graph. No replay may be pending."""


class Runtime(ABC):
    """A device with its streams, events, pinned memory and graphs."""

    device: torch.device

    @abstractmethod
    def activated(self) -> AbstractContextManager[None]:
        """Enters this device and `no_grad` for the calling thread: both are thread-local, so nobody may assume them."""

    @abstractmethod
    def stream(self, name: str) -> Stream:
        """A new stream; `name` is for error messages."""

    @abstractmethod
    def event(self) -> Event:
        """A new event, which has passed until it is recorded."""

    @abstractmethod
    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeroed host memory, `[*shape]`, that the device can copy from and to asynchronously."""

    @abstractmethod
    def device_view(self, pinned: torch.Tensor) -> torch.Tensor:
        """Contiguous memory from `pinned` as a tensor of the device, which reads it where it is; does not keep it."""

    @abstractmethod
    def pool(self) -> Pool:
        """A new memory pool for graphs whose replays never overlap."""

    @abstractmethod
    def capture(self, work: Callable[[], None], stream: Stream, pool: Pool, cuts: Cuts = Cuts.NONE) -> Graph:
        """Captures what `work` enqueues, in pieces where it meets eager breaks that `cuts` honours; nothing runs.

        A failure leaves the stream, the pool and the random generators as they were before.

        Raises:
            whatever `work` raises; DeviceError when the device refuses the capture.
        """

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Free and total bytes of device memory, counting as free what the allocator holds but does not use."""

    @abstractmethod
    def used(self) -> int:
        """Bytes of device memory in use as the driver counts them: by anyone, graphs included."""

    @abstractmethod
    def trim(self) -> None:
        """Gives memory back that the allocator caches: a capture cannot use it, nor free it to make room."""

    @abstractmethod
    def settle(self) -> None:
        """Waits for all work of the device, such as initialisations on other streams. For set-up, never for a step."""

    @abstractmethod
    def is_worker(self) -> bool:
        """Whether the calling thread is one that runs the work of streams: it must not wait for them."""

    @abstractmethod
    def close_stream(self, stream: Stream) -> None:
        """Ends a drained stream."""
