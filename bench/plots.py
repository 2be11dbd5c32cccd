"""Plots for the README, and whether the committed ones show what they should.

Another matplotlib draws other bytes, so a plot carries the fingerprint of what it shows, and that is what is compared.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PLOTS", "Bars", "Figure", "draw", "fingerprint_in"]

PLOTS = "bench/results/plots"
"""Where plots lie, from the repository's root."""

_DRAWING = 1  # of `draw`: another look is another plot
_KEY = "graphexec-figures"
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Figure:
    """Milliseconds by batch size, or by what else a load is measured in.

    Attributes:
        name: of the file.
        lines: points (load, milliseconds) by label.
    """

    name: str
    title: str
    lines: dict[str, tuple[tuple[float, float], ...]]
    xlabel: str = "batch"
    ylabel: str = "ms a decode step"

    @property
    def fingerprint(self) -> str:
        """Equal for figures that show the same."""
        shown = asdict(self)
        if (self.xlabel, self.ylabel) == (Figure.xlabel, Figure.ylabel):  # drawn before there were others
            del shown["xlabel"], shown["ylabel"]
        content = json.dumps([_DRAWING, shown], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class Bars:
    """What something consists of, as stacked bars.

    Attributes:
        name: of the file.
        bars: sizes of the parts by name, by label of the bar.
    """

    name: str
    title: str
    bars: dict[str, dict[str, float]]
    xlabel: str

    @property
    def fingerprint(self) -> str:
        """Equal for figures that show the same."""
        return hashlib.sha256(json.dumps([_DRAWING, asdict(self)], sort_keys=True).encode()).hexdigest()


def draw(figure: Figure | Bars, folder: Path) -> None:
    """Writes the plot. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    if isinstance(figure, Bars):
        _draw_bars(figure, axes)
    else:
        _draw_lines(figure, axes)
    axes.grid(alpha=0.3)
    axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    canvas.savefig(folder / figure.name, dpi=120, metadata={_KEY: figure.fingerprint})


def _draw_bars(figure: Bars, axes: Axes) -> None:
    labels = list(figure.bars)
    ends = dict.fromkeys(labels, 0.0)
    for part in dict.fromkeys(part for parts in figure.bars.values() for part in parts):
        sizes = [figure.bars[label].get(part, 0.0) for label in labels]
        axes.barh(labels, sizes, left=[ends[label] for label in labels], label=part)
        ends = {label: ends[label] + size for label, size in zip(labels, sizes, strict=True)}
    axes.invert_yaxis()
    axes.set(title=figure.title, xlabel=figure.xlabel)


def _draw_lines(figure: Figure, axes: Axes) -> None:
    for label, points in figure.lines.items():
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
    batches = sorted({batch for points in figure.lines.values() for batch, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [f"{batch:g}" for batch in batches])
    axes.set_ylim(bottom=0)
    axes.set(title=figure.title, xlabel=figure.xlabel, ylabel=figure.ylabel)


def fingerprint_in(path: Path) -> str | None:
    """The fingerprint that a plot carries; None if there is no such plot, or it is none of ours."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if not data.startswith(_PNG):
        return None
    position = len(_PNG)
    while position + 12 <= len(data):  # length, type, content, checksum
        length = int.from_bytes(data[position : position + 4], "big")
        kind, content = data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        checksum = int.from_bytes(data[position + 8 + length : position + 12 + length], "big")
        if zlib.crc32(kind + content) != checksum:
            return None
        key, _, value = content.partition(b"\0")
        if kind == b"tEXt" and key == _KEY.encode():
            return value.decode("latin-1")
        position += 12 + length
    return None
