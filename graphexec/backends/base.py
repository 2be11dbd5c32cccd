"""The contract of an execution backend. No state, no defaults."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from graphexec.capture.manifest import Manifest
from graphexec.capture.traffic import Traffic
from graphexec.config import CaptureMode
from graphexec.controller import ControllerStats
from graphexec.pipeline import Pipeline
from graphexec.plan import GraphKey, StepHandle, StepPlan, StepProgram

__all__ = ["BackendStats", "ExecutionBackend", "Progress"]

Progress = Callable[[int, int, GraphKey], None]
"""Called with graphs captured so far, graphs in all, and the key just captured."""


@dataclass(frozen=True)
class BackendStats:
    """Counts since the start.

    Attributes:
        controller: bounds, real sizes, padding, and eager steps by reason.
        replays: steps that ran as a graph, whole or in pieces.
        modes: which kind of graph serves "decode", steps without prompt chunks, and "prefill", those with chunks.
        traffic: steps submitted, by their size; idle ones and those of the program's `chunk_variants` are left out.
        rows: of all those steps, padding not included (as the host knew them when it chose a size).
        launched_rows: of all those steps, padding included.
    """

    controller: ControllerStats
    replays: int
    modes: Mapping[str, CaptureMode]
    traffic: Traffic = field(default_factory=Traffic)
    rows: int = 0
    launched_rows: int = 0

    @classmethod
    def of(cls, pipeline: Pipeline, replays: int, modes: Mapping[str, CaptureMode]) -> BackendStats:
        """Those of a pipeline whose steps run in such modes."""
        traffic = pipeline.traffic
        return cls(pipeline.controller.stats(), replays, modes, traffic.traffic(), traffic.rows, traffic.launched_rows)


class ExecutionBackend(ABC):
    """Runs the steps of one program. One thread owns it; the order is prepare, warmup, submit ..., close."""

    @abstractmethod
    def prepare(self, program: StepProgram) -> None:
        """Takes the program, allocates streams, rings and events, and binds the program to them.

        Raises:
            ConfigError: the configuration does not fit the program, e.g. a capture size above its slots.
        """

    @abstractmethod
    def warmup(self, progress: Progress | None = None) -> Manifest:
        """Compiles, captures and verifies what steps will need; the state of the slots is the same afterwards.

        Steps must not be in flight. Returns the description of what was captured.

        Raises:
            CaptureError: a step cannot be captured, or its graph computes something else than the step.
        """

    @abstractmethod
    def submit(self, plan: StepPlan) -> StepHandle:
        """Enqueues one step and returns without waiting for the device.

        Raises:
            PipelineFull: too many steps were not collected.
            DeviceError: the device has failed.
        """

    @abstractmethod
    def enqueue(self, work: Callable[[], None]) -> None:
        """Enqueues work of one's own, e.g. new weights: behind all steps submitted so far, before all later ones.

        On CUDA `work` is called now, with the compute stream current: what it launches there is in order by itself,
        and with events of torch's it can make that stream wait for another one, or another one for it. On the CPU it is
        called when its turn comes. It must not replace tensors that steps use; graphs hold their addresses.

        Raises:
            DeviceError: the device has failed.
            whatever `work` raises, on CUDA; steps go on behind what it enqueued until then. On the CPU an exception of
            `work` is one of the device: all later steps fail.
        """

    @property
    @abstractmethod
    def wait_us(self) -> float:
        """Host time spent waiting for records since the start, microseconds."""

    @abstractmethod
    def stats(self) -> BackendStats:
        """Counts; never touches the device."""

    @abstractmethod
    def close(self) -> None:
        """Waits for the device, then frees graphs and buffers. May be called twice."""
