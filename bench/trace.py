"""Bubbles and busy time from a device trace of steady decode."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["Span", "StepGaps", "device_spans", "kernel_ns", "step_gaps"]

_LAST_KERNEL = "_update"  # of every step: graphexec.kernels.update
_NOT_KERNELS = ("Memcpy", "Memset", "ProfilerStep")


@dataclass(frozen=True, slots=True)
class Span:
    """Something that the device did; nanoseconds on the trace's clock."""

    name: str
    start_ns: int
    end_ns: int


@dataclass(frozen=True)
class StepGaps:
    """What a trace says about the steps in it.

    Attributes:
        bubble_us: for each step but the first, the time between the last kernel before it and its first, microseconds.
        busy: share of the time in which a kernel runs.
        step_us: median time from the end of a step to the end of the next, microseconds. Tracing costs time: compare
            it with the step that was measured without.
        kernels: median number of kernels of a step.
    """

    bubble_us: tuple[float, ...]
    busy: float
    step_us: float
    kernels: int

    def as_dict(self) -> dict[str, object]:
        p50, p99 = np.percentile(self.bubble_us, [50, 99]).tolist()
        return {
            "bubble_us": {"p50": p50, "p99": p99, "max": max(self.bubble_us), "samples": list(self.bubble_us)},
            "busy": self.busy,
            "traced_step_us": self.step_us,
            "kernels_per_step": self.kernels,
        }


def device_spans(work: Callable[[], None]) -> list[Span]:
    """Traces what the device does during `work`. Needs a GPU."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        work()
        torch.cuda.synchronize()
    return list(_spans_of(traced))


def _spans_of(traced: profile) -> Iterable[Span]:
    results = getattr(traced.profiler, "kineto_results", None)
    if results is not None:  # the raw events: torch's own post-processing takes seconds for as many
        for event in results.events():
            if event.device_type() == torch.autograd.DeviceType.CUDA:
                yield Span(event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
        return
    for event in traced.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            yield Span(event.name, round(event.time_range.start * 1e3), round(event.time_range.end * 1e3))


def kernel_ns(spans: Iterable[Span]) -> int:
    """Nanoseconds in which at least one kernel runs; copies and fills are no kernels."""
    kernels = _kernels(spans)
    return _covered_ns(kernels) if kernels else 0


def step_gaps(spans: Iterable[Span], skip: int = 4) -> StepGaps:
    """Splits a trace into steps at the last kernel of each; copies and fills count neither as work nor as an end.

    Args:
        spans: in any order.
        skip: steps to leave out at the beginning, where starting the trace has held up the host.

    Raises:
        RuntimeError: the trace holds too few steps.
    """
    kernels = _kernels(spans)
    ends = [index for index, span in enumerate(kernels) if span.name.startswith(_LAST_KERNEL)]
    if len(ends) < skip + 3:
        names = sorted({span.name for span in kernels})[:8]
        raise RuntimeError(f"The trace has {len(ends)} steps and {len(kernels)} kernels, among them {names}.")
    ends = ends[skip:]
    bubbles = []
    for last in ends[:-1]:
        step_before = _end(kernels[max(0, last - 63) : last + 1])  # side branches may end after the last kernel began
        bubbles.append((kernels[last + 1].start_ns - step_before) / 1e3)
    inner = kernels[ends[0] + 1 : ends[-1] + 1]
    begin, end = kernels[ends[0]].end_ns, kernels[ends[-1]].end_ns
    finishes = [kernels[index].end_ns for index in ends]
    return StepGaps(
        bubble_us=tuple(bubbles),
        busy=_covered_ns(inner) / (end - begin),
        step_us=float(np.median(np.diff(finishes))) / 1e3,
        kernels=int(np.median(np.diff(ends))),
    )


def _kernels(spans: Iterable[Span]) -> list[Span]:
    return sorted((span for span in spans if not span.name.startswith(_NOT_KERNELS)), key=lambda span: span.start_ns)


def _end(kernels: Sequence[Span]) -> int:
    return max(span.end_ns for span in kernels)


def _covered_ns(kernels: Sequence[Span]) -> int:
    covered, reached = 0, kernels[0].start_ns
    for span in kernels:
        covered += max(0, span.end_ns - max(span.start_ns, reached))
        reached = max(reached, span.end_ns)
    return covered
