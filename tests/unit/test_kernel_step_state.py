"""prepare, apply and update: the kernels under the interpreter, and their references, held to what must come out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings

from graphexec.kernels.apply import apply_deltas
from graphexec.kernels.prepare import prepare
from graphexec.kernels.update import update
from graphexec.plan import FinishCode, RecordLayout
from tests.support.step_cases import (
    BROKEN_CASES,
    COUNTERS,
    LONG_APPLY,
    LONG_STEP,
    NO_ACTIVE_SLOT,
    ApplyCase,
    DeltaCase,
    SlotCase,
    StepCase,
    apply_cases,
    check_apply,
    check_flags,
    check_prepare,
    check_update,
    make_limits,
    poisoned_step,
    step_cases,
)

many = settings(max_examples=60)
LIMITS = make_limits()
DECODING = SlotCase(query_len=1, seq_len=3, num_tokens=4, num_blocks=2)


@many
@given(case=step_cases())
@example(case=NO_ACTIVE_SLOT)
@example(case=LONG_STEP)
def test_prepare_packs_the_rows_and_writes_nothing_else(case: StepCase) -> None:
    check_prepare(case, "cpu")


@many
@given(case=step_cases())
@example(case=NO_ACTIVE_SLOT)
@example(case=LONG_STEP)
def test_update_moves_the_slots_on_and_writes_one_record(case: StepCase) -> None:
    check_update(case, "cpu")


@many
@given(case=apply_cases())
@example(case=LONG_APPLY)
def test_apply_changes_the_named_slots_and_nothing_else(case: ApplyCase) -> None:
    check_apply(case, "cpu")


@pytest.mark.parametrize("flags", range(8))
def test_every_combination_of_flags_means_the_same_to_kernel_and_reference(flags: int) -> None:
    check_flags(flags, "cpu")


@pytest.mark.parametrize("case", BROKEN_CASES, ids=["rows", "bucket"])
def test_an_overflow_is_reported_and_runs_nobody(case: StepCase) -> None:
    check_prepare(case, "cpu")
    check_update(case, "cpu")
    slots, step = case.slot_tensors(), poisoned_step(case.limits, "cpu")
    prepare(slots, step, case.rows, case.bucket, case.limits.block_size)
    assert step.info.tolist() == [0, 1]
    assert (step.row_slot[: case.rows] == -1).all()


@pytest.mark.parametrize("counter", COUNTERS)
def test_the_step_counter_wraps_and_keeps_its_ring_slot(counter: int) -> None:
    check_update(StepCase(LIMITS, (DECODING,) * 4, 4, 4, counter, (1,) * 4, (0,) * 4), "cpu")


def test_a_nan_flag_ends_that_slot_alone() -> None:
    case = StepCase(LIMITS, (DECODING,) * 4, 4, 4, sampled=(1, 2, 3, 4), nan=(0, 1, 0, 0))
    check_update(case, "cpu")
    slots, step = case.slot_tensors(), poisoned_step(LIMITS, "cpu")
    prepare(slots, step, 4, 4, LIMITS.block_size)
    ring = torch.zeros(8, RecordLayout(4).words, dtype=torch.int32)
    words = [torch.tensor(values, dtype=torch.int32) for values in (case.sampled, case.nan)]
    update(slots, step, *words, ring, torch.zeros(1, dtype=torch.int32), LIMITS.block_size)
    assert ring[0, 4] == 1
    assert ring[0, 8:12].tolist() == [1, 0, 1, 1]
    assert ring[0, 12:16].tolist() == [FinishCode.RUNNING, FinishCode.NAN, FinishCode.RUNNING, FinishCode.RUNNING]


def test_a_stop_id_before_the_minimum_length_does_not_stop() -> None:
    too_early, in_time = (SlotCase(1, 3, 4, num_blocks=2, min_len=min_len, stop_ids=(9,)) for min_len in (5, 4))
    check_update(StepCase(LIMITS, (too_early, in_time), 2, 2, sampled=(9, 9), nan=(0, 0)), "cpu")


def finish_after_token_one(case: StepCase) -> int:
    """How the only slot of `case` stands after a step that samples the token 1."""
    slots, step = case.slot_tensors(), poisoned_step(LIMITS, "cpu")
    prepare(slots, step, 1, 1, LIMITS.block_size)
    ring, zero = torch.zeros(8, RecordLayout(4).words, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    update(slots, step, torch.ones(1, dtype=torch.int32), zero, ring, zero.clone(), LIMITS.block_size)
    return int(ring[0, 12])


@pytest.mark.parametrize("prompt_len", [1, 2, 3])
def test_a_stop_sequence_counts_only_what_lies_in_the_output(prompt_len: int) -> None:
    """The slot knows 4 tokens and gets the token 1; the sequence begins at the third of them."""
    tokens = StepCase(LIMITS, (DECODING,), 1, 1).slot_tensors().token_ids[0, 2:4].tolist()
    slot = replace(DECODING, prompt_len=prompt_len, stop_sequences=((*tokens, 1),))
    case = StepCase(LIMITS, (slot,), 1, 1, sampled=(1,), nan=(0,))
    check_update(case, "cpu")
    assert finish_after_token_one(case) == (FinishCode.STOP if prompt_len <= 2 else FinishCode.RUNNING)


@pytest.mark.parametrize("min_len", [4, 5])
def test_a_stop_sequence_before_the_minimum_length_does_not_stop(min_len: int) -> None:
    slot = replace(DECODING, min_len=min_len, stop_sequences=((1,),))
    case = StepCase(LIMITS, (slot,), 1, 1, sampled=(1,), nan=(0,))
    check_update(case, "cpu")
    assert finish_after_token_one(case) == (FinishCode.STOP if min_len == 4 else FinishCode.RUNNING)


def test_an_unused_stop_entry_matches_no_token() -> None:
    case = StepCase(LIMITS, (DECODING,), 1, 1, sampled=(-1,), nan=(0,))
    check_update(case, "cpu")


@pytest.mark.parametrize("blocks", [1, 3])
def test_blocks_that_cover_its_next_position_revive_a_parked_slot(blocks: int) -> None:
    parked = SlotCase(seq_len=8, num_tokens=9, num_blocks=1, parked=1)
    case = ApplyCase(StepCase(LIMITS, (parked,), 1, 1), (DeltaCase(0, blocks=(1, blocks)),))
    check_apply(case, "cpu")
    slots = case.state.slot_tensors()
    apply_deltas(case.staging(), slots, LIMITS.block_size)
    assert (slots.query_lens[0], slots.parked[0]) == (1, 0)


def test_blocks_that_do_not_reach_its_next_position_leave_a_slot_parked() -> None:
    parked = SlotCase(seq_len=16, num_tokens=17, num_blocks=0, parked=1)
    case = ApplyCase(StepCase(LIMITS, (parked,), 1, 1), (DeltaCase(0, blocks=(0, 2)),))
    check_apply(case, "cpu")
    slots = case.state.slot_tensors()
    apply_deltas(case.staging(), slots, LIMITS.block_size)
    assert (slots.query_lens[0], slots.parked[0]) == (0, 1)


def test_a_stopped_slot_has_no_row_in_the_next_step() -> None:
    """A late stop delivers no extra token: the device itself leaves the slot out, whatever the host submits."""
    stopping = SlotCase(1, 3, 4, num_blocks=2, stop_ids=(9,))
    case = StepCase(LIMITS, (stopping, DECODING), 2, 2, sampled=(9, 9), nan=(0, 0))
    slots, step = case.slot_tensors(), poisoned_step(LIMITS, "cpu")
    ring, counter = torch.zeros(8, RecordLayout(4).words, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    words = [torch.tensor(values, dtype=torch.int32) for values in (case.sampled, case.nan)]
    for _ in range(2):
        prepare(slots, step, 2, 2, LIMITS.block_size)
        update(slots, step, *words, ring, counter, LIMITS.block_size)
    assert ring[0, 8:10].tolist() == [1, 1]
    assert ring[0, 12:14].tolist() == [FinishCode.STOP, FinishCode.RUNNING]
    assert ring[1, 8:10].tolist() == [-1, 1]
    assert step.row_slot[:2].tolist() == [1, -1]
