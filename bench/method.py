"""How every system is measured: the same prompts, runs of two lengths, and the slope between them as the step.

Imports nothing of graphexec, so that a peer can be measured where only the peer is installed.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "BATCHES",
    "STARTED",
    "TOKENS",
    "Slope",
    "integers",
    "lengths_for",
    "measure_slope",
    "random_prompts",
    "seconds_since_start",
]

BATCHES = (1, 8, 32, 64, 128, 256)
"""Requests that decode together, in the measurements that are published."""
TOKENS = (32, 288)
"""Output tokens of a short and of a long run."""
STARTED = "BENCH_STARTED"
"""Environment variable with the time, seconds since the epoch, just before this process was started."""

_HIGHEST_TOKEN = 30000
_IMPORTED = time.time()


@dataclass(frozen=True)
class Slope:
    """Runs of two lengths. What they share (prompts, set-up, the last collection) is not in the slope.

    Attributes:
        tokens: output tokens of a short and of a long run.
        short_s, long_s: seconds of the runs.
    """

    tokens: tuple[int, int]
    short_s: Sequence[float]
    long_s: Sequence[float]

    @property
    def step_ms(self) -> float:
        """Milliseconds of a decode step: difference of the medians by difference in tokens."""
        short, long = self.tokens
        return (statistics.median(self.long_s) - statistics.median(self.short_s)) / (long - short) * 1e3

    def samples(self, part: str = "run") -> dict[str, list[float]]:
        """The seconds by name, "short_run_s" and "long_run_s"; `part` says of what else than whole runs they are."""
        return {f"short_{part}_s": list(self.short_s), f"long_{part}_s": list(self.long_s)}


def lengths_for(tokens: tuple[int, int], batch: int, prompt: int, tokens_per_step: int) -> tuple[int, int]:
    """`tokens`, both longer by the same number where the short run might end before the last prompt is computed.

    Else the requests would not all decode together in the steps by which the runs differ.
    """
    prefill_steps = -(-batch * prompt // tokens_per_step)
    more = max(0, 5 * prefill_steps // 4 - tokens[0])
    return tokens[0] + more, tokens[1] + more


def measure_slope(run: Callable[[int], object], tokens: tuple[int, int], repeats: int) -> Slope:
    """Calls `run(tokens)` with the two lengths in turn, `repeats` times each, after one short run to warm up."""
    run(max(tokens[0] // 2, 2))
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for length, taken in zip(tokens, seconds, strict=True):
            started = time.perf_counter()
            run(length)
            taken.append(time.perf_counter() - started)
    return Slope(tokens, *seconds)


def random_prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """`count` prompts of `length` random token ids."""
    drawn = np.random.default_rng(seed).integers(0, min(_HIGHEST_TOKEN, vocab_size), (count, length))
    return [row.tolist() for row in drawn]


def seconds_since_start() -> float:
    """Seconds since this process was started, if who started it said when; else since this module was imported."""
    return time.time() - float(os.environ.get(STARTED) or _IMPORTED)


def integers(text: str) -> tuple[int, ...]:
    """A command line's list of numbers, "1,8,32"."""
    return tuple(int(part) for part in text.split(","))
