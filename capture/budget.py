"""Which sizes are worth their graphs: the ladders that minimise the expected time of steps under a budget.

An exact dynamic program. Where the sizes of a ladder are passed in ascending order, all that counts of those chosen so
far is the last one, what they cost, and what the steps up to there take; of partial choices that end with the same
size, one that another one beats in all three cannot become the best. The largest size of a ladder is chosen wherever
one of its sizes is: it makes the memory pool as large as its steps need, which the others share.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from typing import NamedTuple

import numpy as np

from graphexec.errors import ConfigError

__all__ = ["Budget", "Candidate", "Choice", "Demand", "SizeLadder", "choose", "expected_us"]

_MOST_STATES = 4000
"""Partial choices kept for a size. With more of them, costs are rounded up to ever coarser shares of the budget."""
_FINEST_SHARE = 1 / 8192


@dataclass(frozen=True)
class Budget:
    """What the graphs may cost together: MiB of device memory, and seconds of capturing; infinity for no limit."""

    mib: float = math.inf
    seconds: float = math.inf


@dataclass(frozen=True)
class Candidate:
    """A size that may be captured, and what its graphs cost together, over variants and what else they differ in."""

    size: int
    mib: float
    seconds: float


@dataclass(frozen=True)
class Demand:
    """Steps of one kind.

    Attributes:
        items: the least size of a graph that serves them.
        steps: how many there are, or their share.
        eager_us: microseconds that one takes without a graph.
        graph_us: with the graph of each candidate of the ladder; what stands at smaller sizes than `items` is not read.
    """

    items: int
    steps: float
    eager_us: float
    graph_us: Sequence[float]


@dataclass(frozen=True)
class SizeLadder:
    """Sizes to choose from, in ascending order, for steps that have their graphs from nowhere else.

    Attributes:
        name: of the setting, for messages.
        pool_mib: MiB that its largest size costs beside its own where no ladder before this one has made the pool grow.
    """

    name: str
    candidates: tuple[Candidate, ...]
    demands: tuple[Demand, ...]
    pool_mib: float = 0.0

    @property
    def eager_us(self) -> float:
        """Microseconds of all its steps without any graph."""
        return sum(demand.steps * demand.eager_us for demand in self.demands)


@dataclass(frozen=True)
class Choice:
    """The best choice under a budget.

    Attributes:
        sizes: of each ladder, in ascending order; none where its steps had better run eagerly.
        mib, seconds: what their graphs cost together.
        expected_us: microseconds that all steps take with them.
        rounding: share of the budget to which the cost of each size was rounded up, to keep the search short; 0 where
            it was exact.
    """

    sizes: tuple[tuple[int, ...], ...]
    mib: float
    seconds: float
    expected_us: float
    rounding: float = 0.0


class _State(NamedTuple):
    """A partial choice: `last` of the candidates is the newest of it."""

    mib: float
    seconds: float
    us: float
    last: int = -1
    before: _State | None = None

    def indices(self) -> tuple[int, ...]:
        earlier = () if self.before is None else self.before.indices()
        return earlier if self.last < 0 else (*earlier, self.last)


class _TooMany(Exception):
    """More partial choices than the search can take along."""


def choose(ladders: Sequence[SizeLadder], budget: Budget, most_states: int = _MOST_STATES) -> Choice:
    """The sizes of all ladders, which share the budget, with which the steps take least; of equal ones the cheapest.

    Args:
        ladders: in the order in which they are captured; each has a candidate.
        most_states: partial choices that the search takes along for a size before it rounds costs.

    Raises:
        ConfigError: the budget is nothing, or does not pay for one size; the message has the least that would do.
    """
    _check_budget(ladders, budget)
    share = 0.0
    while True:
        try:
            fronts = [_front(ladder, _rounded(ladder, budget, share), budget, most_states) for ladder in ladders]
            break
        except _TooMany:
            share = 2 * share or _FINEST_SHARE
    picked = _combine(ladders, fronts, budget)
    chosen = [[ladder.candidates[index] for index in each] for ladder, each in zip(ladders, picked, strict=True)]
    pools = [ladder.pool_mib for ladder, each in zip(ladders, chosen, strict=True) if each]
    return Choice(
        sizes=tuple(tuple(candidate.size for candidate in each) for each in chosen),
        mib=sum(candidate.mib for each in chosen for candidate in each) + sum(pools[:1]),
        seconds=sum(candidate.seconds for each in chosen for candidate in each),
        expected_us=sum(expected_us(ladder, each) for ladder, each in zip(ladders, picked, strict=True)),
        rounding=share,
    )


def expected_us(ladder: SizeLadder, chosen: Sequence[int]) -> float:
    """Microseconds of all steps of a ladder with graphs of these candidates (indices, ascending)."""
    sizes = [ladder.candidates[index].size for index in chosen]
    total = 0.0
    for demand in ladder.demands:
        place = bisect_left(sizes, demand.items)
        total += demand.steps * (demand.graph_us[chosen[place]] if place < len(sizes) else demand.eager_us)
    return total


def _check_budget(ladders: Sequence[SizeLadder], budget: Budget) -> None:
    least = [(ladder.candidates[-1].mib + ladder.pool_mib, ladder.candidates[-1].seconds, ladder) for ladder in ladders]
    if budget.mib > 0 and budget.seconds > 0:
        if any(mib <= budget.mib and seconds <= budget.seconds for mib, seconds, _ in least):
            return
        reason = "does not pay for a single size"
    else:
        reason = "is nothing"
    mib, seconds, ladder = min(least, key=lambda each: each[:2])
    enough = Budget(
        max(1, math.ceil(mib * 100)) / 100 if budget.mib < math.inf else math.inf,
        max(1, math.ceil(seconds * 1000)) / 1000 if budget.seconds < math.inf else math.inf,
    )
    raise ConfigError(
        f"The budget of {_limits(budget)} {reason}. The smallest that would do is {_limits(enough)}, for size "
        f"{ladder.candidates[-1].size} of {ladder.name}."
    )


def _limits(budget: Budget) -> str:
    limits = [f"{budget.mib:g} MiB"] if budget.mib < math.inf else []
    limits += [f"{budget.seconds:g} s"] if budget.seconds < math.inf else []
    return " and ".join(limits)


def _rounded(ladder: SizeLadder, budget: Budget, share: float) -> list[Candidate]:
    """Candidates with costs rounded up to `share` of the budget. What has no limit costs nothing."""

    def cost(value: float, limit: float) -> float:
        if limit == math.inf:
            return 0.0
        return math.ceil(value / (limit * share)) * (limit * share) if share else value

    return [
        Candidate(each.size, cost(each.mib, budget.mib), cost(each.seconds, budget.seconds))
        for each in ladder.candidates
    ]


def _front(ladder: SizeLadder, costs: list[Candidate], budget: Budget, most_states: int) -> list[_State]:
    """Every choice of a ladder that no other one beats in memory, seconds and time at once, the empty one first."""
    candidates = ladder.candidates
    demands = sorted(ladder.demands, key=lambda demand: demand.items)
    items = [demand.items for demand in demands]
    reach = [bisect_right(items, candidate.size) for candidate in candidates]  # demands that a candidate can serve
    sums = [
        [0.0, *accumulate(demand.steps * demand.graph_us[index] for demand in demands[: reach[index]])]
        for index in range(len(candidates))
    ]
    beyond = sum(demand.steps * demand.eager_us for demand in demands[reach[-1] :])
    largest = costs[-1]
    fronts: list[list[_State]] = []
    for index, cost in enumerate(costs):
        is_last = index == len(costs) - 1
        kept_free = (0.0, 0.0) if is_last else (largest.mib, largest.seconds)
        mib_left, seconds_left = budget.mib - kept_free[0], budget.seconds - kept_free[1]
        found = [_State(cost.mib, cost.seconds, sums[index][-1], index)]
        for earlier, front in enumerate(fronts):
            us = sums[index][-1] - sums[index][reach[earlier]]
            found += [_State(s.mib + cost.mib, s.seconds + cost.seconds, s.us + us, index, s) for s in front]
        fronts.append(_unbeaten(s for s in found if s.mib <= mib_left and s.seconds <= seconds_left))
        if len(fronts[-1]) > most_states:
            raise _TooMany
    return [_State(0.0, 0.0, ladder.eager_us), *(s._replace(us=s.us + beyond) for s in fronts[-1])]


def _unbeaten(states: Iterable[_State]) -> list[_State]:
    """Those that no other one is at least as good as in memory, seconds and time."""
    kept: list[_State] = []
    seconds: list[float] = []  # ascending, with times that descend: the staircase of those kept so far
    times: list[float] = []
    for state in sorted(states, key=lambda each: each[:3]):
        place = bisect_right(seconds, state.seconds)
        if place and times[place - 1] <= state.us:
            continue
        kept.append(state)
        end = place
        while end < len(times) and times[end] >= state.us:
            end += 1
        begin = bisect_left(seconds, state.seconds, 0, place)
        seconds[begin:end] = [state.seconds]
        times[begin:end] = [state.us]
    return kept


def _combine(ladders: Sequence[SizeLadder], fronts: Sequence[list[_State]], budget: Budget) -> list[tuple[int, ...]]:
    """The best feasible combination of one choice a ladder, as indices of candidates."""
    *earlier, last = fronts
    mib, seconds, us = (np.array([state[which] for state in last]) for which in range(3))
    best: tuple[tuple[float, float, float], list[_State]] | None = None
    for states in product(*earlier):
        pools = [ladder.pool_mib for ladder, state in zip(ladders, states, strict=False) if state.last >= 0][:1]
        used_mib = sum(state.mib for state in states) + sum(pools)
        used_seconds = sum(state.seconds for state in states)
        all_mib = used_mib + mib
        if not pools:  # the last ladder is the first to capture anything, unless it is empty, too
            all_mib = all_mib + np.array([ladders[-1].pool_mib if state.last >= 0 else 0.0 for state in last])
        fits = (all_mib <= budget.mib) & (used_seconds + seconds <= budget.seconds)
        if not fits.any():
            continue
        totals = np.where(fits, us, np.inf)
        index = int(np.lexsort((seconds, all_mib, totals))[0])
        all_us, all_seconds = totals[index] + sum(state.us for state in states), used_seconds + seconds[index]
        cost = (float(all_us), float(all_mib[index]), float(all_seconds))
        if best is None or cost < best[0]:
            best = cost, [*states, last[index]]
    assert best is not None, "to capture nothing costs nothing"
    return [state.indices() for state in best[1]]
