"""From a probe of some sizes to what every size of the ladders costs, and what traffic takes with it.

Between the sizes that were measured, times and the cost of a graph are interpolated linearly. The first graph of a
ladder makes the memory pool grow; it stands for itself, and no other graph's cost is taken from it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

import numpy as np

from graphexec.capture.budget import Candidate, Demand, SizeLadder
from graphexec.capture.manifest import CapturedGraph
from graphexec.capture.traffic import Traffic
from graphexec.errors import ConfigError
from graphexec.plan import GraphKey
from graphexec.warmup.probe import Probe

__all__ = ["size_ladders"]

_Curve = Callable[[int], float]
"""A figure by size."""


def size_ladders(probe: Probe, traffic: Traffic) -> list[SizeLadder]:
    """The ladders whose graphs were probed, in the order of their capture: that of prompt chunks, that of decode steps.

    Raises:
        ConfigError: the backend does not measure replays.
    """
    chunks = [graph for graph in probe.manifest.graphs if graph.key.has_chunks]
    decode = [graph for graph in probe.manifest.graphs if not graph.key.has_chunks]
    found = []
    if chunks:
        shapes = probe.ladders.chunk_shapes()
        counts = {size: sum(rows == size for _, rows, _ in shapes) for size in probe.ladders.rows.sizes}
        found.append(SizeLadder("prefill_sizes", _candidates(chunks, counts), _chunk_demands(probe, traffic)))
    if decode:
        counts = dict.fromkeys(probe.ladders.slots.sizes, 1)
        alone = sum(graph.pool_bytes for graph in probe.decode_alone.graphs) / 2**20
        candidates = _candidates(decode, counts)
        pool_mib = max(0.0, alone - candidates[-1].mib) if chunks else 0.0
        found.append(SizeLadder("capture_sizes", candidates, _decode_demands(probe, traffic), pool_mib))
    return found


def _candidates(graphs: Sequence[CapturedGraph], shapes: Mapping[int, int]) -> tuple[Candidate, ...]:
    """What the graphs of each size cost together.

    Args:
        graphs: of the probed sizes, in the order of capture.
        shapes: by size, the number of shapes that have graphs.
    """
    variants = len({graph.key.variant for graph in graphs})
    further: dict[int, list[CapturedGraph]] = defaultdict(list)
    for graph in graphs[1:] or graphs:
        further[_size(graph.key)].append(graph)
    mib = _curve({size: fmean(each.pool_bytes for each in some) / 2**20 for size, some in further.items()})
    seconds = _curve({size: fmean(each.capture_s for each in some) for size, some in further.items()})
    largest = [graph for graph in graphs if _size(graph.key) == max(shapes)]
    found = [
        Candidate(size, mib(size) * count * variants, seconds(size) * count * variants)
        for size, count in sorted(shapes.items())
    ]
    found[-1] = Candidate(
        max(shapes), sum(each.pool_bytes for each in largest) / 2**20, sum(each.capture_s for each in largest)
    )
    return tuple(found)


def _decode_demands(probe: Probe, traffic: Traffic) -> tuple[Demand, ...]:
    sizes = probe.ladders.slots
    keys = [graph.key for graph in probe.manifest.graphs if not graph.key.has_chunks]
    graph_us, eager_us = _times(probe, keys)
    by_size = [graph_us(size) for size in sizes.sizes]
    return tuple(
        Demand(slots, steps, eager_us(sizes.fit(slots) or slots), by_size) for slots, steps in traffic.decode.items()
    )


def _chunk_demands(probe: Probe, traffic: Traffic) -> tuple[Demand, ...]:
    """For each count of slots there are graphs of their own, and what those take is a curve by rows."""
    sizes, slot_sizes = probe.ladders.rows, probe.ladders.chunk_slots
    mixed = [graph.key for graph in probe.manifest.graphs if graph.key.phase == "mixed"]
    curves = {}
    for most in slot_sizes.sizes:
        graph_us, eager_us = _times(probe, [key for key in mixed if key.bucket == min(most, key.rows)])
        curves[most] = [graph_us(size) for size in sizes.sizes], eager_us
    found = []
    for (rows, slots), steps in traffic.chunks.items():
        fitting = slot_sizes.fit(slots)
        by_size, eager_us = curves[fitting or slot_sizes.sizes[-1]]
        # Where no graph has so many slots, no count of rows makes one fit.
        items = rows if fitting else sizes.sizes[-1] + 1
        found.append(Demand(items, steps, eager_us(sizes.fit(rows) or rows), by_size))
    return tuple(found)


def _times(probe: Probe, keys: Iterable[GraphKey]) -> tuple[_Curve, _Curve]:
    """Microseconds of a step by size, with its graph and without: means over the variants."""
    graphs = {graph.key: graph for graph in probe.manifest.graphs}
    replays: dict[int, list[float]] = defaultdict(list)
    eager: dict[int, list[float]] = defaultdict(list)
    for key in keys:
        replay_us = graphs[key].replay_us
        if replay_us is None:
            raise ConfigError("A budget needs the time of replays, and this backend does not measure it.")
        replays[_size(key)].append(replay_us)
        eager[_size(key)].append(probe.eager_us[key])
    return (
        _curve({size: fmean(each) for size, each in replays.items()}),
        _curve({size: fmean(each) for size, each in eager.items()}),
    )


def _curve(points: Mapping[int, float]) -> _Curve:
    """Linear between the points, and constant beyond them."""
    sizes = sorted(points)
    values = [points[size] for size in sizes]
    return lambda size: float(np.interp(size, sizes, values))


def _size(key: GraphKey) -> int:
    """By which a ladder orders it."""
    return key.rows if key.has_chunks else key.bucket
