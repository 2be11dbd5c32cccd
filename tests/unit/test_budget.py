"""The choice of sizes under a budget: the best there is, and clear words where there is none."""

from __future__ import annotations

import math
import re
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphexec.capture.budget import Budget, Candidate, Choice, Demand, SizeLadder, choose, expected_us
from graphexec.errors import ConfigError

QUARTERS = st.integers(0, 40).map(lambda each: each / 4)  # sums of quarters are exact


@st.composite
def ladders(draw: st.DrawFn, most: int = 5) -> SizeLadder:
    sizes = sorted(draw(st.sets(st.integers(1, 12), min_size=1, max_size=most)))
    candidates = tuple(Candidate(size, draw(QUARTERS), draw(QUARTERS)) for size in sizes)
    demands = tuple(
        Demand(draw(st.integers(1, 14)), draw(QUARTERS), draw(QUARTERS), [draw(QUARTERS) for _ in sizes])
        for _ in range(draw(st.integers(0, 6)))
    )
    return SizeLadder("capture_sizes", candidates, demands, draw(QUARTERS))


def subsets(ladder: SizeLadder) -> list[tuple[int, ...]]:
    """Every choice that the rules allow, as indices: none, or one with the largest."""
    *others, largest = range(len(ladder.candidates))
    found = [each for count in range(len(others) + 1) for each in combinations(others, count)]
    return [(), *((*each, largest) for each in found)]


def cost(chosen: list[SizeLadder], picks: tuple[tuple[int, ...], ...]) -> tuple[float, float, float]:
    """Expected time, MiB and seconds of a combination, straight from their definitions."""
    mib = seconds = us = 0.0
    pool_is_there = False
    for ladder, pick in zip(chosen, picks, strict=True):
        mib += sum(ladder.candidates[index].mib for index in pick)
        seconds += sum(ladder.candidates[index].seconds for index in pick)
        if pick and not pool_is_there:
            mib, pool_is_there = mib + ladder.pool_mib, True
        for demand in ladder.demands:
            serving = [index for index in pick if ladder.candidates[index].size >= demand.items]
            us += demand.steps * (demand.graph_us[serving[0]] if serving else demand.eager_us)
    return us, mib, seconds


def best_of_all(chosen: list[SizeLadder], budget: Budget) -> tuple[float, float, float]:
    costs = [cost(chosen, picks) for picks in product(*map(subsets, chosen))]
    return min(each for each in costs if each[1] <= budget.mib and each[2] <= budget.seconds)


LIMITS = st.one_of(st.just(math.inf), st.integers(1, 120).map(lambda each: each / 4))


@settings(max_examples=400, deadline=None)
@given(st.lists(ladders(), min_size=1, max_size=2), LIMITS, LIMITS)
def test_no_set_of_sizes_under_the_budget_is_faster(chosen: list[SizeLadder], mib: float, seconds: float) -> None:
    budget = Budget(mib, seconds)
    try:
        choice = choose(chosen, budget)
    except ConfigError:
        assert len(costs_within(chosen, budget)) == 0
        return
    assert choice.rounding == 0
    assert choice.mib <= mib
    assert choice.seconds <= seconds
    best_us, best_mib, _ = best_of_all(chosen, budget)
    assert choice.expected_us == pytest.approx(best_us)
    assert choice.mib <= best_mib or mib == math.inf, "of equally fast choices the cheapest"
    assert_consistent(chosen, choice)


def costs_within(chosen: list[SizeLadder], budget: Budget) -> list[tuple[float, float, float]]:
    """Costs of what a budget allows beside capturing nothing."""
    costs = [cost(chosen, picks) for picks in product(*map(subsets, chosen)) if any(picks)]
    return [each for each in costs if each[1] <= budget.mib and each[2] <= budget.seconds]


def assert_consistent(chosen: list[SizeLadder], choice: Choice) -> None:
    """What a choice says of itself is what its sizes cost."""
    picks = tuple(
        tuple(index for index, each in enumerate(ladder.candidates) if each.size in sizes)
        for ladder, sizes in zip(chosen, choice.sizes, strict=True)
    )
    assert (choice.expected_us, choice.mib, choice.seconds) == pytest.approx(cost(chosen, picks))
    assert choice.expected_us == pytest.approx(sum(map(expected_us, chosen, picks)))


@settings(max_examples=200, deadline=None)
@given(st.lists(ladders(), min_size=1, max_size=2), LIMITS, LIMITS)
def test_a_search_that_rounds_stays_within_the_budget_and_says_by_what_share_it_rounded(
    chosen: list[SizeLadder], mib: float, seconds: float
) -> None:
    budget = Budget(mib, seconds)
    if not costs_within(chosen, budget):
        return
    choice = choose(chosen, budget, most_states=2)
    assert choice.mib <= mib
    assert choice.seconds <= seconds
    assert_consistent(chosen, choice)
    if choice.rounding < 1 / 16:  # at worst, every size was rounded up by one share
        spared = 1 - choice.rounding * sum(len(each.candidates) for each in chosen)
        narrower = costs_within(chosen, Budget(mib * spared, seconds * spared))
        assert all(choice.expected_us <= us + 1e-9 for us, _, _ in narrower)


def uniform(name: str, sizes: tuple[int, ...], mib: float, pool_mib: float = 0.0) -> SizeLadder:
    """Graphs take 100 us and 1 us an item, eager steps 1000 us."""
    demands = tuple(Demand(items, 1.0, 1000.0, [100.0 + size for size in sizes]) for items in range(1, sizes[-1] + 1))
    return SizeLadder(name, tuple(Candidate(size, mib, 0.1) for size in sizes), demands, pool_mib)


def test_without_a_limit_every_size_is_chosen() -> None:
    assert choose([uniform("capture_sizes", (1, 2, 4, 8), 1.0)], Budget()).sizes == ((1, 2, 4, 8),)


def test_the_sizes_that_much_traffic_has_are_chosen_first() -> None:
    sizes = (1, 2, 4, 8)
    demands = [
        Demand(items, 100.0 if items == 2 else 1.0, 1000.0, [100.0 + size for size in sizes]) for items in (1, 2, 7)
    ]
    ladder = SizeLadder("capture_sizes", tuple(Candidate(size, 1.0, 0.1) for size in sizes), tuple(demands))
    assert choose([ladder], Budget(mib=2.0)).sizes == ((2, 8),)


def test_two_ladders_share_one_budget_and_one_pool() -> None:
    chunks = uniform("prefill_sizes", (16, 32), 8.0)
    decode = uniform("capture_sizes", (1, 2), 1.0, pool_mib=4.0)
    assert choose([chunks, decode], Budget(mib=10.0)).sizes == ((32,), (1, 2))
    alone = choose([chunks, decode], Budget(mib=6.0))
    assert (alone.sizes, alone.mib) == (((), (1, 2)), 6.0)


def test_graphs_that_are_slower_than_the_eager_step_are_not_chosen() -> None:
    slow = SizeLadder("capture_sizes", (Candidate(4, 1.0, 0.1),), (Demand(3, 1.0, 50.0, [80.0]),))
    assert choose([slow], Budget(mib=9.0)).sizes == ((),)


@pytest.mark.parametrize(
    ("budget", "message", "enough"),
    [
        (Budget(mib=0), "The budget of 0 MiB is nothing", "5 MiB"),
        (Budget(seconds=-1), "The budget of -1 s is nothing", "0.1 s"),
        (Budget(mib=4.5, seconds=3), "The budget of 4.5 MiB and 3 s does not pay for a single size", "5 MiB and 0.1 s"),
        (Budget(seconds=0.05), "The budget of 0.05 s does not pay for a single size", "0.1 s"),
    ],
)
def test_a_budget_of_nothing_is_refused_with_the_least_that_would_do(budget: Budget, message: str, enough: str) -> None:
    both = [uniform("prefill_sizes", (16, 32), 8.0), uniform("capture_sizes", (1, 2), 1.0, pool_mib=4.0)]
    words = f"{message}. The smallest that would do is {enough}, for size 2 of capture_sizes."
    with pytest.raises(ConfigError, match=re.escape(words)):
        choose(both, budget)
