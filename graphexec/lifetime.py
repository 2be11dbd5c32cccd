"""Lifetime (F7): what the device uses is freed only after both streams have drained, however its owner goes.

Invariant: no memory, event or graph that enqueued work may touch is freed under it: not by `close`, not when the last
reference to a pipeline goes, and not at the end of the interpreter.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Protocol

import torch

from graphexec.errors import DeviceError
from graphexec.plan import DeviceIO, StepProgram
from graphexec.rings import OutputRing, StagingRing
from graphexec.runtime import Runtime

__all__ = ["Closeable", "DeviceSide"]

_PATIENCE_OF_THE_DROPPED_S = 10.0


class Closeable(Protocol):
    """Something that lives on the device."""

    def close(self) -> None:
        """Frees it; the streams have drained."""


class DeviceSide:
    """The streams, rings and graphs of one pipeline, and whatever else its steps use.

    Holds no reference to the pipeline, so that it can outlive it.
    """

    def __init__(self, runtime: Runtime, program: StepProgram) -> None:
        self.runtime = runtime
        self.compute = runtime.stream("compute")
        self.copy = runtime.stream("copy")
        self.records = OutputRing(runtime, program.record)
        self.staging = StagingRing(runtime, program.staging_words)
        self.io = DeviceIO(self.records.device, torch.zeros(1, dtype=torch.int32, device=runtime.device))
        self._program = program  # its tensors
        self._owned: list[Closeable] = [self.records, self.staging]
        self._closed = False

    def own(self, part: Closeable) -> None:
        """Takes a part over: it is closed after the streams have drained, the last one first."""
        self._owned.append(part)

    def close(self, patience_s: float) -> bool:
        """Drains both streams and frees everything; False, and nothing is ever freed, if they do not drain in time."""
        if self._closed:
            return True
        with self.runtime.activated():
            if not self._drain(patience_s):
                _keep_for_ever(self)
                return False
            self._closed = True
            for part in reversed(self._owned):
                part.close()
            self.runtime.close_stream(self.compute)
            self.runtime.close_stream(self.copy)
            return True

    def release(self) -> None:
        """`close` for an owner that is gone without having called it, and for the end of the interpreter."""
        if self.runtime.is_worker():  # garbage is collected in any thread, and a stream cannot wait for itself
            threading.Thread(target=self.close, args=(_PATIENCE_OF_THE_DROPPED_S,), daemon=True).start()
        else:
            self.close(_PATIENCE_OF_THE_DROPPED_S)

    def _drain(self, patience_s: float) -> bool:
        try:
            return self.compute.drain(patience_s) and self.copy.drain(patience_s)
        except DeviceError:  # nobody knows what a failed device still does
            return False


def _keep_for_ever(owner: object) -> None:
    """Keeps `owner` and all it holds from ever being freed: the device may still write into it."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))
