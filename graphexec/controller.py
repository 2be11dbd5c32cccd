"""The replay controller: from what the host has seen and sent, an upper bound of the next step's real_bsz.

Invariant: under any interleaving of admissions, stops, aborts and parks, and at any depth, the bound of a step is at
least the number of slots that really run in it. A pure host object: no device access, microseconds a call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphexec.capture.buckets import BucketTable
from graphexec.plan import FinishCode, StepResult

__all__ = ["Controller", "ControllerStats"]

_RUNNING, _PARKED = int(FinishCode.RUNNING), int(FinishCode.PARKED)  # numpy takes its time over an enum


@dataclass(frozen=True)
class ControllerStats:
    """Counts since the start.

    Attributes:
        steps: steps whose result was observed.
        predicted_slots: sum of their bounds.
        real_slots: sum of their real_bsz.
        padding_slots: sum of launched minus real slots.
        eager_steps: steps that did not run as a graph, by reason.
    """

    steps: int
    predicted_slots: int
    real_slots: int
    padding_slots: int
    eager_steps: dict[str, int]


class Controller:
    """Predicts how large a step must be launched.

    With N the last observed step, slots that can run next are those that ran in N and did not end, and those armed
    by a delta since N. A slot enters the first set only through the second, so nothing else can run.
    """

    def __init__(self, max_num_seqs: int, buckets: BucketTable) -> None:
        self._buckets = buckets
        self._observed = -1
        self._alive = np.zeros(max_num_seqs, dtype=bool)  # ran in the last observed step and did not end
        self._armed_at = np.full(max_num_seqs, -1, dtype=np.int64)  # step whose delta armed the slot last
        self._steps = self._predicted = self._real = self._padding = 0
        self._eager: Counter[str] = Counter()

    def arm(self, step: int, slots: Sequence[int]) -> None:
        """The delta of `step` admits, re-arms, resumes or supplies blocks to `slots`."""
        if len(slots):
            self._armed_at[np.asarray(slots)] = step

    def observe(self, result: StepResult) -> None:
        """Takes in a collected step; one that is older than the last observed adds nothing."""
        if result.step <= self._observed:
            return
        self._observed = result.step
        goes_on = (result.finish == _RUNNING) | (result.finish == _PARKED)
        np.logical_and(result.num_tokens >= 0, goes_on, out=self._alive)

    def next_bound(self) -> int:
        """Upper bound of the number of slots that run in the next step submitted."""
        return int(np.count_nonzero(self._alive | (self._armed_at > self._observed)))

    def next_bucket(self) -> int:
        """The size with which the next step is launched. Not to be asked for an empty step."""
        return self.bucket_for(self.next_bound())

    def bucket_for(self, bound: int) -> int:
        """The smallest captured size that holds `bound` slots; off the ladder, all slots."""
        return self._buckets.fit(bound) or len(self._alive)

    def count(self, bound: int, launched: int, real: int) -> None:
        """Counts a collected step: what was predicted, launched and real, in slots."""
        self._steps += 1
        self._predicted += bound
        self._real += real
        self._padding += launched - real

    def count_eager(self, reason: str) -> None:
        """Counts a step that does not run as a graph: nothing falls back silently."""
        self._eager[reason] += 1

    def stats(self) -> ControllerStats:
        return ControllerStats(self._steps, self._predicted, self._real, self._padding, dict(self._eager))
