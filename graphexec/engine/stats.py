"""What an engine has counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graphexec.capture.traffic import Traffic
from graphexec.config import CaptureMode

__all__ = ["EngineStats"]


@dataclass(frozen=True)
class EngineStats:
    """Counts since the start.

    Attributes:
        steps: steps submitted.
        replays: of them, those that ran as a captured graph, whole or in pieces.
        modes: which kind of graph serves "decode", steps without prompt chunks, and "prefill", those with chunks.
        eager_steps: of them, those that did not, by reason.
        padding_rows: launched slots that were padding, summed over the steps.
        predicted_slots: sum of the bounds that steps were launched with.
        real_slots: sum of the slots that really ran.
        preemptions: requests sent back to the queue for want of KV blocks.
        prefix_cached_tokens: tokens of admitted requests that were not computed, since the prefix cache held their KV;
            of a request that comes back after a preemption, its earlier output included.
        host_us: time that the step loop computed, microseconds, waits excluded.
        wait_us: time that it waited for the device, microseconds.
        traffic: steps by their size, for `graphexec warmup --trace`.
        rows: rows of all steps, padding not included, as the host knew them when it chose a size.
        launched_rows: rows of all steps, padding included.
    """

    steps: int
    replays: int
    modes: Mapping[str, CaptureMode]
    eager_steps: dict[str, int]
    padding_rows: int
    predicted_slots: int
    real_slots: int
    preemptions: int
    prefix_cached_tokens: int
    host_us: float
    wait_us: float
    traffic: Traffic
    rows: int
    launched_rows: int
