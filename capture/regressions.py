"""What got worse between two manifests: graphs that vanished or grew, and the time and memory of all."""

from __future__ import annotations

from collections import defaultdict

from graphexec.capture.manifest import CapturedGraph, Manifest
from graphexec.plan import GraphKey

__all__ = ["regressions"]


def regressions(old: Manifest, new: Manifest, tolerance: float) -> list[str]:
    """Sentences about what is worse in `new`; none if nothing is.

    Args:
        tolerance: share by which the time and the memory of all graphs together may grow, beside 0.1 s and 32 MiB that
            are nobody's doing. Graphs may gain no node.
    """
    before, after = ({graph.key: graph for graph in manifest.graphs} for manifest in (old, new))
    worse = [f"There is no graph for the {key} any more." for key in before if key not in after]
    worse += _more_nodes(before, after)
    shared = before.keys() & after.keys()
    for what, unit, few, costs in (
        ("memory", "MiB", 32.0, [(before[key].pool_bytes / 2**20, after[key].pool_bytes / 2**20) for key in shared]),
        ("time to capture", "s", 0.1, [(before[key].capture_s, after[key].capture_s) for key in shared]),
    ):
        was, now = (sum(each) for each in zip(*costs, strict=True)) if costs else (0.0, 0.0)
        if now > was * (1 + tolerance) + few:
            worse.append(f"The {what} of the {len(shared)} graphs in both grew from {was:.2f} to {now:.2f} {unit}.")
    return worse


def _more_nodes(before: dict[GraphKey, CapturedGraph], after: dict[GraphKey, CapturedGraph]) -> list[str]:
    """A sentence for each phase, variant and pair of counts: what changes one graph mostly changes all of its kind."""
    grown: dict[tuple[str, str, int, int], list[GraphKey]] = defaultdict(list)
    for key, graph in after.items():
        was = before.get(key)
        if was is not None and graph.nodes > was.nodes:
            grown[key.phase, key.variant, was.nodes, graph.nodes].append(key)
    return [
        f"{len(keys)} graphs of {phase} steps, {variant}, grew from {was} to {now} nodes; the first is the {keys[0]}."
        for (phase, variant, was, now), keys in grown.items()
    ]
