"""Times launches of one kernel on a GPU, in replays of a CUDA graph that holds many of them over different memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

__all__ = ["Launch", "Record", "describe", "launches_to_rotate", "measure"]

Launch = Callable[[], torch.Tensor]
Record = dict[str, object]

_ROTATION_BYTES = 400 << 20  # what one replay reads, several times an L2 of 50 MiB, where the launches suffice
_MOST_LAUNCHES = 128
_SECONDS = 0.1  # of replays for one measurement, and of those before it


def launches_to_rotate(bytes_of_one: int) -> int:
    """Launches, each with memory of its own, with which a replay reads more than the cache holds."""
    return max(2, min(_MOST_LAUNCHES, -(-_ROTATION_BYTES // bytes_of_one)))


def measure(record: Record, launches: list[Launch]) -> Record:
    """`record` with the time, or with the error: a tile that does not fit must not end the sweep."""
    try:
        samples = _microseconds(launches)
        record["microseconds"] = statistics.median(samples)
        record["samples"] = [round(each, 3) for each in samples]
    except Exception as error:  # whatever the compiler or the driver objects to
        record["error"] = f"{type(error).__name__}: {error}"[:300]
        print("  failed:", record, flush=True)
        if _device_lost():
            raise
    return record


def describe(record: Record) -> str:
    shown = {key: value for key, value in record.items() if key not in ("tile", "samples")}
    if isinstance(tile := record.get("tile"), dict):
        shown["tile"] = "/".join(str(number) for number in tile.values())
    return "  ".join(
        f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in shown.items()
    )


def _microseconds(launches: list[Launch]) -> list[float]:
    """Microseconds of one launch, for each replay of a graph that holds all of them, in order."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and makes torch's libraries allocate, outside of capture
        for launch in launches[:2]:
            launch()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    _warm_up(graph)
    samples: list[float] = []
    deadline = time.perf_counter() + _SECONDS
    while len(samples) < 5 or (len(samples) < 50 and time.perf_counter() < deadline):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1000 / len(launches))
    return samples


def _warm_up(graph: torch.cuda.CUDAGraph) -> None:
    """Replays for _SECONDS: after a pause, as for a compilation, the first replays are up to a tenth slower."""
    deadline = time.perf_counter() + _SECONDS
    while time.perf_counter() < deadline:
        graph.replay()
        torch.cuda.synchronize()


def _device_lost() -> bool:
    """Whether the CUDA context is beyond use, as after an illegal access."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False
