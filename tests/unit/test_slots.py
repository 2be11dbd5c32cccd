"""Slots and their deltas: one entry a slot (F8), packed so that the device reads what the host meant."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphexec.deltas import Admission, SlotDeltas, as_words
from graphexec.kernels.apply import apply_deltas_reference
from graphexec.kernels.state import SlotTensors
from graphexec.slots import SlotLimits, SlotState
from tests.support.step_cases import POISON, apply_cases, check_apply

LIMITS = SlotLimits(max_slots=4, max_tokens=64, max_rows=64, block_size=8, max_stop_ids=3)
ADMISSION = Admission(
    max_len=30,
    min_len=7,
    temperature=0.7,
    top_k=40,
    top_p=0.95,
    seed=2**63 - 1,
    stop_ids=(11, 12),
)


def applied(*batches: SlotDeltas, first_step: int = 0) -> SlotTensors:
    """Slots after these batches, each packed over what the last one left in the staging buffer."""
    state = SlotState(LIMITS, torch.device("cpu"))
    words = torch.full((LIMITS.staging_words,), POISON, dtype=torch.int32)
    for step, batch in enumerate(batches, first_step):
        batch.pack(words.numpy(), step)
        apply_deltas_reference(words, state.slots, LIMITS.block_size)
    return state.slots


def test_an_admission_arrives_as_it_was_sent() -> None:
    deltas = SlotDeltas(LIMITS)
    deltas.admit(2, ADMISSION, 0, 5)
    deltas.arm(2, 0, as_words([21, 22, 23, 24, 25]))
    deltas.supply(2, 0, [6, 9])
    slots = applied(deltas)
    assert slots.num_tokens[2] == 5
    for name in ("max_len", "min_len", "top_k", "seed"):
        assert getattr(slots, name)[2] == getattr(ADMISSION, name), name
    assert slots.temperature[2] == torch.tensor(0.7)
    assert slots.top_p[2] == torch.tensor(0.95)
    assert slots.stop_ids[2].tolist() == [11, 12, -1]
    assert slots.token_ids[2, :5].tolist() == [21, 22, 23, 24, 25]
    assert slots.block_tables[2, :2].tolist() == [6, 9]
    assert (slots.query_lens[2], slots.num_blocks[2], slots.last_delta[0]) == (5, 2, 0)
    assert slots.query_lens.tolist() == [0, 0, 5, 0]


@given(seed=st.integers(0, 2**63 - 1) | st.sampled_from([0, 2**31, 2**32 - 1, 2**32, 2**63 - 1]))
def test_every_seed_survives_the_trip(seed: int) -> None:
    deltas = SlotDeltas(LIMITS)
    deltas.admit(0, replace(ADMISSION, seed=seed), 0, 5)
    assert applied(deltas).seed[0] == seed


@given(case=apply_cases())
def test_every_batch_means_on_the_device_what_the_host_meant(case: object) -> None:
    check_apply(case, None)


def test_changes_of_one_slot_are_one_entry() -> None:
    deltas = SlotDeltas(LIMITS)
    deltas.admit(1, ADMISSION, 0, 5)
    deltas.arm(1, 0, as_words([1, 2]))
    deltas.supply(1, 0, [3])
    deltas.supply(1, 1, [4, 5])
    deltas.supply(3, 2, [6])
    assert len(deltas) == 2
    words = np.zeros(LIMITS.staging_words, dtype=np.int32)
    deltas.pack(words, 0)
    assert words[0] == 2
    slots = applied(deltas)
    assert slots.block_tables[1, :3].tolist() == [3, 4, 5]
    assert slots.num_blocks.tolist() == [0, 3, 0, 3]


def test_growth_is_a_supply_for_many_slots_beside_other_changes() -> None:
    deltas = SlotDeltas(LIMITS)
    deltas.grow(np.array([1, 3]), np.array([0, 2]), np.array([2, 1]), [3, 4, 6])
    deltas.admit(2, ADMISSION, 0, 5)
    deltas.supply(2, 0, [7])
    expected = SlotDeltas(LIMITS)
    expected.supply(1, 0, [3, 4])
    expected.supply(3, 2, [6])
    expected.admit(2, ADMISSION, 0, 5)
    expected.supply(2, 0, [7])
    assert sorted(deltas.armed) == [1, 2, 3]
    assert len(deltas) == 3
    for own, other in zip(applied(deltas).all(), applied(expected).all(), strict=True):
        assert torch.equal(own, other)


def test_a_slot_that_grows_has_no_other_entry() -> None:
    deltas = SlotDeltas(LIMITS)
    deltas.grow(np.array([1]), np.array([0]), np.array([1]), [3])
    deltas.release(1)
    with pytest.raises(ValueError, match="F8"):
        applied(deltas)


def test_a_release_in_the_same_batch_does_not_cancel_a_prefill() -> None:
    """FastDeploy 6629: a preempt that arrived with a prefill of its slot cancelled it."""
    deltas = SlotDeltas(LIMITS)
    deltas.release(0)
    deltas.admit(0, ADMISSION, 0, 5)
    deltas.arm(0, 0, as_words([1, 2]))
    assert list(deltas.armed) == [0]
    assert applied(deltas).query_lens[0] == 2


def test_a_release_drops_what_the_batch_held_for_the_slot() -> None:
    running = SlotDeltas(LIMITS)
    running.admit(0, ADMISSION, 0, 5)
    running.arm(0, 0, as_words([1, 2]))
    deltas = SlotDeltas(LIMITS)
    deltas.arm(0, 2, as_words([7]))
    deltas.supply(0, 0, [5])
    deltas.release(0)
    slots = applied(running, deltas)
    assert list(deltas.armed) == []
    assert (slots.query_lens[0], slots.parked[0], slots.num_blocks[0]) == (0, 0, 0)
    assert slots.token_ids[0, :3].tolist() == [1, 2, 0]


def test_armed_is_every_slot_that_may_run_and_no_released_one() -> None:
    deltas = SlotDeltas(LIMITS)
    deltas.release(3)
    deltas.supply(2, 1, [9])  # may revive a slot that the host does not yet know to be parked
    deltas.arm(1, 0, as_words([4]))
    deltas.admit(0, ADMISSION, 0, 5)
    assert sorted(deltas.armed) == [0, 1, 2]


def test_a_new_owner_starts_with_an_empty_block_table() -> None:
    first, second = SlotDeltas(LIMITS), SlotDeltas(LIMITS)
    first.admit(0, ADMISSION, 0, 5)
    first.supply(0, 0, [1, 2, 3])
    second.admit(0, replace(ADMISSION, stop_ids=()), 0, 5)
    slots = applied(first, second)
    assert slots.num_blocks[0] == 0
    assert slots.stop_ids[0].tolist() == [-1, -1, -1]


def test_an_empty_batch_changes_nothing_but_says_its_step() -> None:
    slots = applied(SlotDeltas(LIMITS), first_step=2**32 - 1)
    assert slots.last_delta[0] == -1
    assert not slots.query_lens.any()


def test_the_largest_batch_fits_into_the_staging_buffer() -> None:
    """Every slot gets a chunk, the chunks fill the rows, and each chunk begins and ends within a block."""
    deltas = SlotDeltas(LIMITS)
    share = LIMITS.max_rows // LIMITS.max_slots
    for slot in range(LIMITS.max_slots):
        deltas.admit(slot, ADMISSION, 0, 5)
        deltas.arm(slot, 3, as_words(range(share)))
        deltas.supply(slot, 0, range(share // LIMITS.block_size + 3))
    slots = applied(deltas)
    assert slots.query_lens.tolist() == [share] * LIMITS.max_slots
    assert slots.token_ids[3, 3 : 3 + share].tolist() == list(range(share))


@pytest.mark.parametrize("surplus", [1, 2, 9])
def test_more_than_the_staging_buffer_holds_is_refused_and_never_cut_off(surplus: int) -> None:
    deltas = SlotDeltas(LIMITS)
    deltas.arm(0, 0, as_words(range(LIMITS.payload_words)))
    deltas.supply(1, 0, range(surplus))
    with pytest.raises(ValueError, match=f"step 0 carry more than {LIMITS.payload_words} words of payload"):
        deltas.pack(np.zeros(LIMITS.staging_words, dtype=np.int32), 0)


def test_exercised_chunks_fill_the_rows_asked_for() -> None:
    state = SlotState(LIMITS, torch.device("cpu"))
    state.exercise(4, 64, 40, 50, torch.Generator().manual_seed(0))
    assert state.slots.query_lens.sum() == 64
    assert (state.slots.seq_lens + state.slots.query_lens == state.slots.num_tokens).all()


def test_slots_beyond_the_room_of_a_tiny_cache_write_nowhere() -> None:
    state = SlotState(SlotLimits(20, 64, 64, 8, 1), torch.device("cpu"))
    state.exercise(20, 20, 3, 50, torch.Generator().manual_seed(0))  # two blocks of eight places for twenty slots
    writers = state.slots.num_blocks > 0
    assert writers.sum() == 16
    places = state.slots.block_tables[:, 0] * 8 + state.slots.seq_lens
    assert len(places[writers].unique()) == 16


@pytest.mark.parametrize(("max_tokens", "blocks", "slots"), [(16, 4, 256), (32, 4, 256), (32, 2, 128)])
def test_many_slots_over_a_tiny_cache_stay_within_their_sequences(max_tokens: int, blocks: int, slots: int) -> None:
    state = SlotState(SlotLimits(slots, max_tokens, 512, 16, 1), torch.device("cpu"))
    state.exercise(slots, slots, blocks, 50, torch.Generator().manual_seed(0))
    assert state.slots.num_tokens.max() < max_tokens


@given(slots=st.integers(1, 4), num_blocks=st.integers(2, 40), seed=st.integers(0, 99))
def test_exercised_slots_never_write_to_the_same_place(slots: int, num_blocks: int, seed: int) -> None:
    """FastDeploy 7094: dummy inputs that stop by chance, or write into the reserved block or each other's."""
    state = SlotState(LIMITS, torch.device("cpu"))
    state.exercise(slots, slots, num_blocks, 50, torch.Generator().manual_seed(seed))
    held = state.slots
    assert held.query_lens.tolist() == [1] * slots + [0] * (4 - slots)
    index = torch.arange(slots)
    block = held.block_tables[index, held.seq_lens[:slots].long() // LIMITS.block_size]
    assert ((block >= 1) & (block < num_blocks)).all()
    places = block * LIMITS.block_size + held.seq_lens[:slots] % LIMITS.block_size
    assert len(places.unique()) == slots
    assert (held.stop_ids == -1).all()
    assert (held.seq_lens[:slots] // LIMITS.block_size < held.num_blocks[:slots]).all()
