"""Rings of reused buffers: a slot can be acquired only once it has retired, and there is no other way to get one."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from graphexec.errors import PipelineFull
from graphexec.plan import RecordLayout
from graphexec.runtime import Runtime, Stream

__all__ = ["RING_SLOTS", "OutputRing", "StagingRing"]

RING_SLOTS = 8
"""R: slots of every ring, whatever the depth."""


class OutputRing:
    """Output records of the last R steps: on the device, where steps write them, and their pinned copies.

    The slot of step N is N % R. It retires when its record has been copied out, not when the copy landed: until then
    neither a later step nor its copy may overwrite it (F3).
    """

    def __init__(self, runtime: Runtime, layout: RecordLayout) -> None:
        self.layout = layout
        self.device = torch.zeros(RING_SLOTS, layout.words, dtype=torch.int32, device=runtime.device)
        self._pinned = runtime.pinned((RING_SLOTS, layout.words), torch.int32)
        self._host: NDArray[np.int32] = self._pinned.numpy()
        self._done = [runtime.event() for _ in range(RING_SLOTS)]
        self._copied = [runtime.event() for _ in range(RING_SLOTS)]
        self._owner: list[int | None] = [None] * RING_SLOTS
        self._views: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # slicing tensors takes its time

    def acquire(self, step: int) -> None:
        """Takes the slot of `step`.

        Raises:
            PipelineFull: the step R before it has not been collected.
        """
        owner = self._owner[step % RING_SLOTS]
        if owner is not None:
            raise PipelineFull(
                f"Step {step} needs the ring slot of step {owner}, which was not collected. "
                f"Call result() on its handle first; at most {RING_SLOTS} steps can be in flight."
            )
        self._owner[step % RING_SLOTS] = step

    def release(self, step: int) -> None:
        """Gives the slot of a step back that was not enqueued."""
        self._owner[step % RING_SLOTS] = None

    def copy_out(self, step: int, compute: Stream, copy: Stream, words: int) -> None:
        """Enqueues the copy of the first `words` of the record of `step` to the host, beside what compute runs next."""
        slot = step % RING_SLOTS
        views = self._views.get((slot, words))
        if views is None:
            views = self._views[slot, words] = self._pinned[slot, :words], self.device[slot, :words]
        compute.record(self._done[slot])
        copy.wait(self._done[slot])  # F1: the copy reads the record after the step wrote it
        copy.copy(*views)
        copy.record(self._copied[slot])

    def wait(self, step: int, timeout_s: float) -> bool:
        """Blocks until the record of `step` is on the host (F2); False when the time is up."""
        return self._copied[step % RING_SLOTS].wait(timeout_s)

    def arrived(self, step: int) -> bool:
        """Whether the record of `step` is on the host (F2). Never blocks."""
        return self._copied[step % RING_SLOTS].query()

    def fences(self, step: int) -> tuple[bool, bool]:
        """Whether `done` and `copied` of `step` have passed, for an error message."""
        slot = step % RING_SLOTS
        return self._done[slot].query(), self._copied[slot].query()

    def read(self, step: int, words: int) -> NDArray[np.int32]:
        """Copies the first `words` of the record out and retires its slot."""
        slot = step % RING_SLOTS
        record: NDArray[np.int32] = self._host[slot, :words].copy()
        self._owner[slot] = None
        return record

    def close(self) -> None:
        for event in (*self._done, *self._copied):
            event.close()


class StagingRing:
    """Pinned buffers in which deltas wait for the device, which reads them where they are: no copy is enqueued.

    A slot retires by an event behind the device's read of it: before that the host must not refill it (F4).
    """

    def __init__(self, runtime: Runtime, words: int) -> None:
        self._pinned = runtime.pinned((RING_SLOTS, words), torch.int32)
        self._views = [runtime.device_view(pinned) for pinned in self._pinned]
        self._host: NDArray[np.int32] = self._pinned.numpy()
        self._read = [runtime.event() for _ in range(RING_SLOTS)]
        self._next = 0

    def acquire(self) -> tuple[int, NDArray[np.int32]]:
        """The next slot, as its index and its words.

        Raises:
            PipelineFull: the device has not read what the slot holds.
        """
        slot = self._next
        if not self._read[slot].query():
            raise PipelineFull(f"All {RING_SLOTS} staging slots hold deltas that the device has not read.")
        self._next = (slot + 1) % RING_SLOTS
        return slot, self._host[slot]

    def on_device(self, slot: int) -> torch.Tensor:
        """The words of a slot, `[words]` int32, as the device sees them."""
        return self._views[slot]

    def retire_behind(self, slot: int, compute: Stream) -> None:
        """Retires the slot once what is now on `compute` has run."""
        compute.record(self._read[slot])

    def close(self) -> None:
        for event in self._read:
            event.close()
