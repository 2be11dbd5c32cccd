"""What two manifests of one configuration differ in: what got worse, and which kernels came or went."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from graphexec.capture.manifest import CapturedGraph, Manifest
from graphexec.plan import GraphKey

__all__ = ["changed_kernels", "regressions"]

_SHOWN = 4
"""Names in a sentence; of the others there is the number."""


@dataclass(frozen=True)
class _Cost:
    """What a graph takes of something.

    Attributes:
        of: None where nobody measured it.
        floor_of_all: growth of all graphs together that is nobody's doing; for replays, that of each of them.
        floor: the same of a single graph, above what one measurement differs from the next by.
    """

    name: str
    unit: str
    of: Callable[[CapturedGraph], float | None]
    floor_of_all: float
    floor: float


_COSTS = (
    _Cost("memory", "MiB", lambda graph: graph.pool_bytes / 2**20, 32.0, 16.0),
    _Cost("time to capture", "s", lambda graph: graph.capture_s, 0.1, 0.5),
)
_REPLAY = _Cost("time of a replay", "us", lambda graph: graph.replay_us, 20.0, 50.0)
_Pairs = Mapping[GraphKey, tuple[CapturedGraph, CapturedGraph]]


def regressions(old: Manifest, new: Manifest, tolerance: float) -> list[str]:
    """Sentences about what is worse in `new`; none if nothing is.

    Replays on the CPU are not compared: they are the steps themselves, in whatever time other processes leave them.

    Args:
        tolerance: share by which memory and times may grow, beside what is nobody's doing: of all graphs together
            32 MiB and 0.1 s of capturing, of replays 20 us each; of a single graph 16 MiB, 0.5 s and 50 us. Graphs may
            gain no node.
    """
    pairs = _pairs(old, new)
    worse = [*_lost([each.key for each in old.graphs if each.key not in pairs]), *_more_nodes(pairs)]
    for cost in _COSTS if "cpu" in (old.device, new.device) else (*_COSTS, _REPLAY):
        worse += _grown(cost, pairs, tolerance)
    return worse


def changed_kernels(old: Manifest, new: Manifest) -> list[str]:
    """Sentences about kernels that came or went, and about graphs that differ in something else, e.g. in grids.

    A change is not worse by itself. Of manifests that do not name kernels, only the fingerprints are compared.
    """
    found: dict[tuple[str, str, str], list[GraphKey]] = defaultdict(list)
    for key, (before, after) in _pairs(old, new).items():
        if before.fingerprint != after.fingerprint:
            found[key.phase, key.variant, _difference(before, after)].append(key)
    return [
        f"In {len(keys)} graphs of {phase} steps, {variant}, {what}; the first is the {keys[0]}."
        for (phase, variant, what), keys in found.items()
    ]


def _pairs(old: Manifest, new: Manifest) -> _Pairs:
    """Graphs of equal keys, in the order of capture."""
    after = {graph.key: graph for graph in new.graphs}
    return {graph.key: (graph, after[graph.key]) for graph in old.graphs if graph.key in after}


def _difference(before: CapturedGraph, after: CapturedGraph) -> str:
    if not (before.launches and after.launches):
        return "the fingerprint changed"
    came, went = (Counter(one.launches) - Counter(other.launches) for one, other in ((after, before), (before, after)))
    parts = [f"{_names(names)} {verb}" for names, verb in ((came, "came"), (went, "went")) if names]
    if before.pieces != after.pieces:
        parts.append(f"{before.pieces} pieces became {after.pieces}")
    if before.nodes != after.nodes and not parts:
        parts.append(f"{before.nodes} nodes became {after.nodes}, and the kernels are the same")
    return ", ".join(parts) or "names and counts of the kernels are the same, and grids or edges differ"


def _names(launches: Counter[str]) -> str:
    named = [name if times == 1 else f"{name} ({times} times)" for name, times in sorted(launches.items())]
    rest = f" and {len(named) - _SHOWN} others" if len(named) > _SHOWN else ""
    return ", ".join(named[:_SHOWN]) + rest


def _lost(keys: Sequence[GraphKey]) -> Iterator[str]:
    kinds: dict[tuple[str, str], list[GraphKey]] = defaultdict(list)
    for key in keys:
        kinds[key.phase, key.variant].append(key)
    for (phase, variant), lost in kinds.items():
        if len(lost) == 1:
            yield f"There is no graph for the {lost[0]} any more."
        else:
            yield f"There are no graphs for {len(lost)} {phase} steps, {variant}, any more; the first is the {lost[0]}."


def _more_nodes(pairs: _Pairs) -> list[str]:
    """A sentence for each phase, variant and pair of counts: what changes one graph mostly changes all of its kind."""
    grown: dict[tuple[str, str, int, int], list[GraphKey]] = defaultdict(list)
    for key, (before, after) in pairs.items():
        if after.nodes > before.nodes:
            grown[key.phase, key.variant, before.nodes, after.nodes].append(key)
    return [
        f"{len(keys)} graphs of {phase} steps, {variant}, grew from {was} to {now} nodes; the first is the {keys[0]}."
        for (phase, variant, was, now), keys in grown.items()
    ]


def _grown(cost: _Cost, pairs: _Pairs, tolerance: float) -> Iterator[str]:
    """The graphs of both together, whose sum evens out the noise, and single ones that grew beyond any noise."""
    costs = list(_measured(cost, pairs))
    was, now = sum(before for _, before, _ in costs), sum(after for _, _, after in costs)
    floor = cost.floor_of_all * (len(costs) if cost is _REPLAY else 1)
    if now > was * (1 + tolerance) + floor:
        yield f"The {cost.name} of the {len(costs)} graphs in both grew from {was:.2f} to {now:.2f} {cost.unit}."
    single = [each for each in costs if each[2] > each[1] * (1 + tolerance) + cost.floor]
    yield from _named(cost, sorted(single, key=lambda each: each[1] - each[2]))


def _measured(cost: _Cost, pairs: _Pairs) -> Iterator[tuple[GraphKey, float, float]]:
    for key, (before, after) in pairs.items():
        was, now = cost.of(before), cost.of(after)
        if was is not None and now is not None:
            yield key, was, now


def _named(cost: _Cost, grown: Sequence[tuple[GraphKey, float, float]]) -> Iterator[str]:
    for key, was, now in grown[:_SHOWN]:
        yield f"The {cost.name} of the {key} grew from {was:.2f} to {now:.2f} {cost.unit}."
    if len(grown) > _SHOWN:
        yield f"So did that of {len(grown) - _SHOWN} other graphs, by less."
