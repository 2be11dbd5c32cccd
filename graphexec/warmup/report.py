"""What a reader sees of a report: its graphs in groups, and capture modes side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from graphexec.capture.manifest import CapturedGraph, Manifest

__all__ = ["graph_table", "mode_table"]

_COLUMNS = ("nodes", "kernels", "pieces", "MiB", "capture ms", "replay us", "launch us")


def graph_table(manifest: Manifest, title: str | None = None) -> Table:
    """One row a group of graphs that differ in little but their size, and the totals.

    Memory and the time of captures are those of all graphs of a row; of the other figures, which include the time of
    a replay, there are the least and the most. "-" is what nobody measured.
    """
    headings = ("step", "sampler", "slots", "rows", "graphs", *_COLUMNS, "verified")
    table = _table(headings, title)
    for group in manifest.groups():
        first, last = group.first.key, group.last.key
        table.add_row(
            first.phase,
            first.variant,
            _from_to((first.bucket, last.bucket)),
            _from_to((first.rows, last.rows)),
            str(len(group.graphs)),
            *_figures(group.graphs),
            str(sum(graph.verified for graph in group.graphs)),
        )
    table.add_section()
    verified = str(sum(graph.verified for graph in manifest.graphs))
    table.add_row("all", "", "", "", str(len(manifest.graphs)), *_figures(manifest.graphs), verified)
    return table


def mode_table(manifests: Mapping[str, Manifest]) -> Table:
    """For each kind of step, what its graphs cost and take in each capture mode; a mode without graphs has no row."""
    table = _table(("step", "sampler", "mode", "graphs", *_COLUMNS), "Capture modes")
    kinds = dict.fromkeys((each.key.phase, each.key.variant) for one in manifests.values() for each in one.graphs)
    for phase, variant in kinds:
        for mode, manifest in manifests.items():
            graphs = [each for each in manifest.graphs if (each.key.phase, each.key.variant) == (phase, variant)]
            if graphs:
                table.add_row(phase, variant, mode, str(len(graphs)), *_figures(graphs))
        table.add_section()
    return table


def _table(headings: Sequence[str], title: str | None) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table


def _figures(graphs: Sequence[CapturedGraph]) -> tuple[str, ...]:
    return (
        _from_to(graph.nodes for graph in graphs),
        _from_to(graph.kernels for graph in graphs),
        _from_to(graph.pieces for graph in graphs),
        f"{sum(graph.pool_bytes for graph in graphs) / 2**20:.1f}",
        f"{sum(graph.capture_s for graph in graphs) * 1e3:.1f}",
        _from_to(round(graph.replay_us) for graph in graphs if graph.replay_us is not None),
        _from_to(round(graph.launch_us) for graph in graphs if graph.launch_us is not None),
    )


def _from_to(values: Iterable[int]) -> str:
    found = list(values)
    if not found:
        return "-"
    least, most = min(found), max(found)
    return str(least) if least == most else f"{least}-{most}"
