"""Garbage collection while an engine lives: out of the way of its steps."""

from __future__ import annotations

import gc
from collections.abc import Callable

__all__ = ["quiet_garbage_collection"]

_OBJECTS_PER_SLOT = 16


def quiet_garbage_collection(slots: int) -> Callable[[], None]:
    """Keeps the collector from walking what loading has left on the heap, or each step's outputs.

    A full collection over transformers' modules takes a quarter of a second. And a step makes an object for each
    running request, of which some hundred would set off a collection in every step, though none is garbage in a circle.
    Both are settings of the process: where somebody has frozen the heap already, e.g. another engine, they are left
    alone.

    Returns:
        What undoes it.
    """
    if gc.get_freeze_count():
        return _leave_alone
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    if thresholds[0]:  # 0: collection is off
        gc.set_threshold(max(thresholds[0], _OBJECTS_PER_SLOT * slots), *thresholds[1:])

    def undo() -> None:
        gc.unfreeze()
        gc.set_threshold(*thresholds)

    return undo


def _leave_alone() -> None:
    """Who changed the settings will change them back."""
