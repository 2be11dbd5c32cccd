"""The controller: its bound holds under any interleaving, against a simulated device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphexec.capture.buckets import BucketTable
from graphexec.controller import Controller
from graphexec.plan import FinishCode, StepResult

SLOTS = 6
BLOCK = 2  # tokens of a KV block: small, so that slots park often


@dataclass
class _Slot:
    """What the device knows of a slot."""

    running: bool = False
    parked: bool = False
    chunks_left: int = 0  # chunks that yield no token before the one that does
    tokens: int = 0
    blocks: int = 0
    stop_at: int = 0


@dataclass
class _Delta:
    """Changes of one step, in the terms of the device."""

    admitted: dict[int, _Slot] = field(default_factory=dict)
    rearmed: set[int] = field(default_factory=set)
    supplied: set[int] = field(default_factory=set)
    released: set[int] = field(default_factory=set)

    @property
    def armed(self) -> list[int]:
        return sorted({*self.admitted, *self.rearmed, *self.supplied})


class _Device:
    """A model of the slots; runs steps in order, and knows nothing of the host."""

    def __init__(self) -> None:
        self.slots = [_Slot() for _ in range(SLOTS)]

    def run(self, step: int, delta: _Delta) -> StepResult:
        self._apply(delta)
        num_tokens = np.full(SLOTS, -1, dtype=np.int32)
        finish = np.zeros(SLOTS, dtype=np.int32)
        for index, slot in enumerate(self.slots):
            if slot.running:
                num_tokens[index], finish[index] = self._run_slot(slot)
        alive = any(slot.running or slot.parked for slot in self.slots)
        real = int((num_tokens >= 0).sum())
        tokens = np.zeros((SLOTS, 1), dtype=np.int32)
        return StepResult(step, real, alive, num_tokens, finish, tokens, None)

    def _apply(self, delta: _Delta) -> None:
        for index, slot in delta.admitted.items():
            self.slots[index] = slot
        for index in delta.rearmed:
            self.slots[index].running = True
        for index in delta.supplied:
            slot = self.slots[index]
            slot.blocks += 1
            if slot.parked and slot.tokens < slot.blocks * BLOCK:
                slot.parked, slot.running = False, True
        for index in delta.released:
            self.slots[index].running = self.slots[index].parked = False

    @staticmethod
    def _run_slot(slot: _Slot) -> tuple[int, FinishCode]:
        if slot.chunks_left:
            slot.chunks_left -= 1
            slot.running = False  # until the next chunk arms it
            return 0, FinishCode.RUNNING
        slot.tokens += 1
        if slot.tokens >= slot.stop_at:
            slot.running = False
            return 1, FinishCode.STOP
        if slot.tokens >= slot.blocks * BLOCK:
            slot.running, slot.parked = False, True
            return 1, FinishCode.PARKED
        return 1, FinishCode.RUNNING


@dataclass
class _Owner:
    """What the host knows of a slot."""

    chunks_left: int


class _Host:
    """A host that admits, chunks, supplies and aborts at random, `depth` steps ahead of what it has collected."""

    def __init__(self, depth: int, draw: Callable[[int], int]) -> None:
        self.depth = depth
        self.draw = draw  # a number below its argument
        self.device = _Device()
        self.controller = Controller(SLOTS, BucketTable(tuple(range(1, SLOTS + 1))))
        self.owners: dict[int, _Owner] = {}
        self.retiring: dict[int, int] = {}  # slot to the step of its release
        self.flights: deque[StepResult] = deque()
        self.collected = -1

    def play(self, steps: int) -> Iterator[tuple[int, StepResult, _Delta]]:
        """Yields the bound of each step, what the device makes of it, and the delta."""
        for step in range(steps):
            delta = self.decide(step)
            if delta.armed or delta.released:
                self.controller.arm(step, delta.armed)
            bound = self.controller.next_bound()
            result = self.device.run(step, delta)
            yield bound, result, delta
            self.flights.append(result)
            while len(self.flights) > self.depth:
                self.collect(self.flights.popleft())

    def decide(self, step: int) -> _Delta:
        delta = _Delta()
        for slot in [slot for slot, released in self.retiring.items() if released - 1 <= self.collected]:
            del self.retiring[slot]
        for slot in range(SLOTS):
            action = self.draw(8)
            owner = self.owners.get(slot)
            if owner is None:
                if slot not in self.retiring and action < 4:
                    chunks = self.draw(3)
                    delta.admitted[slot] = _Slot(True, False, chunks, 0, self.draw(3), 1 + self.draw(9))
                    self.owners[slot] = _Owner(chunks)
            elif action == 0:
                delta.released.add(slot)
                del self.owners[slot]
                self.retiring[slot] = step
            elif owner.chunks_left:
                if action < 5:
                    owner.chunks_left -= 1
                    delta.rearmed.add(slot)
            elif action < 3:
                delta.supplied.add(slot)
        return delta

    def collect(self, result: StepResult) -> None:
        self.collected = result.step
        self.controller.observe(result)
        for slot in np.flatnonzero(result.finish == FinishCode.STOP).tolist():
            self.owners.pop(slot, None)


@settings(max_examples=300)
@given(depth=st.integers(0, 4), seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 40))
def test_the_bound_is_never_below_the_slots_that_really_run(depth: int, seed: int, steps: int) -> None:
    for bound, result, _ in _host(depth, seed).play(steps):
        assert result.real_bsz <= bound <= SLOTS


@settings(max_examples=100)
@given(depth=st.integers(1, 4), data=st.data())
def test_the_bound_holds_in_histories_that_hypothesis_can_shrink(depth: int, data: st.DataObject) -> None:
    host = _Host(depth, lambda limit: data.draw(st.integers(0, limit - 1)))
    for bound, result, _ in host.play(6):
        assert result.real_bsz <= bound


def test_the_simulated_device_parks_revives_chunks_stops_and_aborts() -> None:
    """The property above would be idle if these did not occur, with parks that the host does not know of yet."""
    parked = stopped = chunked = aborted = revived = 0
    for seed in range(20):
        waiting: set[int] = set()
        for _, result, delta in _host(3, seed).play(40):
            revived += len(waiting & set(delta.supplied) & set(np.flatnonzero(result.num_tokens >= 0)))
            waiting = set(np.flatnonzero(result.finish == FinishCode.PARKED).tolist())
            parked += len(waiting)
            stopped += int((result.finish == FinishCode.STOP).sum())
            chunked += int((result.num_tokens == 0).sum())
            aborted += len(delta.released)
    assert min(parked, stopped, chunked, aborted, revived) > 20


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_the_naive_rule_undercounts_when_blocks_revive_slots(depth: int) -> None:
    """real_bsz of the last step collected and the slots admitted since: what the property must be able to refute."""
    assert any(_naive_rule_breaks(depth, seed) for seed in range(50))


def _naive_rule_breaks(depth: int, seed: int) -> bool:
    host = _host(depth, seed)
    admitted: list[int] = []
    real: list[int] = []
    for _, result, delta in host.play(40):
        admitted.append(len(delta.admitted) + len(delta.rearmed))
        real.append(result.real_bsz)
        last = host.collected
        naive = (real[last] if last >= 0 else 0) + sum(admitted[last + 1 :])
        if result.real_bsz > naive:
            return True
    return False


def test_in_steady_decode_at_depth_0_the_bound_is_exact() -> None:
    controller, device = Controller(SLOTS, BucketTable((SLOTS,))), _Device()
    delta = _Delta({slot: _Slot(True, blocks=100, stop_at=5 + slot) for slot in range(SLOTS)})
    for step in range(20):
        controller.arm(step, delta.armed)
        bound = controller.next_bound()
        result = device.run(step, delta)
        assert bound == result.real_bsz
        controller.observe(result)
        delta = _Delta()
    assert controller.next_bound() == 0


@pytest.mark.parametrize("depth", range(5))
def test_a_full_ladder_is_not_overshot(depth: int) -> None:
    """Counting real_bsz and admissions would exceed the slots when stops are seen late; sets of slots cannot."""
    host = _host(depth, 1)
    bounds = [bound for bound, _, _ in host.play(200)]
    assert max(bounds) == SLOTS


def test_a_late_or_repeated_result_takes_nothing_back() -> None:
    controller = Controller(SLOTS, BucketTable((SLOTS,)))
    controller.arm(0, [0, 1])
    controller.observe(_result(1, ran=[0, 1]))
    controller.observe(_result(0, ran=[0, 1, 2]))
    assert controller.next_bound() == 2
    controller.observe(_result(2, ran=[1]))
    controller.observe(_result(1, ran=[0, 1]))
    assert controller.next_bound() == 1


def test_slots_armed_after_the_last_observed_step_count_until_they_are_observed() -> None:
    controller = Controller(SLOTS, BucketTable((SLOTS,)))
    controller.arm(0, [3])
    controller.arm(2, [3, 4])
    controller.observe(_result(0, ran=[3], ended=[3]))
    assert controller.next_bound() == 2
    controller.observe(_result(1, ran=[]))
    assert controller.next_bound() == 2
    controller.observe(_result(2, ran=[4], ended=[4]))
    assert controller.next_bound() == 0


def test_an_empty_step_has_no_bucket_to_look_up() -> None:
    controller = Controller(SLOTS, BucketTable((2, 4)))
    assert controller.next_bound() == 0
    with pytest.raises(ValueError, match="no bucket"):
        controller.next_bucket()


def test_the_bucket_is_the_smallest_that_holds_the_bound() -> None:
    controller = Controller(SLOTS, BucketTable((2, 4)))
    buckets = []
    for slot in range(SLOTS):
        controller.arm(slot, [slot])
        buckets.append(controller.next_bucket())
    assert buckets == [2, 2, 4, 4, 6, 6]  # off the ladder: all slots


def test_padding_and_eager_steps_are_counted() -> None:
    controller = Controller(SLOTS, BucketTable((4,)))
    controller.count(bound=3, launched=4, real=2)
    controller.count(bound=1, launched=4, real=1)
    controller.count_eager("no graph")
    controller.count_eager("idle")
    controller.count_eager("no graph")
    stats = controller.stats()
    assert (stats.steps, stats.predicted_slots, stats.real_slots, stats.padding_slots) == (2, 4, 3, 5)
    assert stats.eager_steps == {"no graph": 2, "idle": 1}


def _host(depth: int, seed: int) -> _Host:
    generator = np.random.default_rng(seed)
    return _Host(depth, lambda limit: int(generator.integers(limit)))


def _result(step: int, ran: list[int], ended: list[int] | None = None) -> StepResult:
    num_tokens = np.full(SLOTS, -1, dtype=np.int32)
    num_tokens[ran] = 1
    finish = np.zeros(SLOTS, dtype=np.int32)
    finish[ended or []] = FinishCode.STOP
    return StepResult(step, len(ran), True, num_tokens, finish, np.zeros((SLOTS, 1), dtype=np.int32), None)
