"""A picture of a report: time and memory of the captures, and time of the replays, by bucket."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from graphexec.capture.manifest import CapturedGraph, Manifest

__all__ = ["PANELS", "Panel", "draw", "points"]


@dataclass(frozen=True)
class Panel:
    """One of the pictures beside each other.

    Attributes:
        of: what a graph takes of it; None where nobody measured.
        together: makes one figure of those of a bucket, over variants and slots.
    """

    label: str
    of: Callable[[CapturedGraph], float | None]
    together: Callable[[Sequence[float]], float]


PANELS = (
    Panel("capture of a bucket's graphs, ms", lambda graph: graph.capture_s * 1e3, sum),
    Panel("memory of a bucket's graphs, MiB", lambda graph: graph.pool_bytes / 2**20, sum),
    Panel("a replay, mean, us", lambda graph: graph.replay_us, fmean),
)


def points(manifest: Manifest, panel: Panel) -> dict[str, dict[int, float]]:
    """A figure by bucket, in ascending order, by phase. A bucket is the slots of decode steps, and the rows of steps
    with prompt chunks; one that nobody measured is left out."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for graph in manifest.graphs:
        value = panel.of(graph)
        if value is not None:
            found[graph.key.phase][graph.key.rows if graph.key.has_chunks else graph.key.bucket].append(value)
    return {
        phase: {size: panel.together(by_size[size]) for size in sorted(by_size)} for phase, by_size in found.items()
    }


def draw(manifest: Manifest, path: Path) -> None:
    """Writes the picture as a PNG.

    Raises:
        ImportError: there is no matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        lines = points(manifest, panel)
        for phase, by_size in lines.items():
            axes.plot(list(by_size), list(by_size.values()), marker="o", markersize=3, label=phase)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(bottom=0)
        axes.set(xlabel="bucket (slots; with prompt chunks, rows)", ylabel=panel.label)
        axes.grid(alpha=0.3)
        if lines:
            axes.legend()
    totals = f"{manifest.capture_s:.2f} s, {manifest.pool_bytes / 2**20:.0f} MiB"
    figure.suptitle(f"{len(manifest.graphs)} graphs on {manifest.device}: {totals}")
    figure.savefig(path, dpi=120)
