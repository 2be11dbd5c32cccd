"""The compiled prepare, apply and update kernels on a GPU, held to what must come out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings

from tests.support.step_cases import (
    BROKEN_CASES,
    COUNTERS,
    LONG_APPLY,
    LONG_STEP,
    NO_ACTIVE_SLOT,
    ApplyCase,
    SlotCase,
    StepCase,
    apply_cases,
    check_apply,
    check_flags,
    check_prepare,
    check_update,
    make_limits,
    many_slots,
    step_cases,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

many = settings(max_examples=100)


@many
@given(case=step_cases())
@example(case=NO_ACTIVE_SLOT)
@example(case=LONG_STEP)
def test_prepare_packs_the_rows_and_writes_nothing_else(case: StepCase) -> None:
    check_prepare(case, "cuda")


@many
@given(case=step_cases())
@example(case=NO_ACTIVE_SLOT)
@example(case=LONG_STEP)
def test_update_moves_the_slots_on_and_writes_one_record(case: StepCase) -> None:
    check_update(case, "cuda")


@many
@given(case=apply_cases())
@example(case=LONG_APPLY)
def test_apply_changes_the_named_slots_and_nothing_else(case: ApplyCase) -> None:
    check_apply(case, "cuda")


@pytest.mark.parametrize("max_slots", [256, 300, 1024])
def test_hundreds_of_slots_take_several_warps_and_agree(max_slots: int) -> None:
    case = many_slots(max_slots)
    check_prepare(case, "cuda")
    check_update(case, "cuda")


@pytest.mark.parametrize("flags", range(8))
def test_every_combination_of_flags_means_the_same_to_kernel_and_reference(flags: int) -> None:
    check_flags(flags, "cuda")


@pytest.mark.parametrize("case", BROKEN_CASES, ids=["rows", "bucket"])
def test_an_overflow_is_reported_and_runs_nobody(case: StepCase) -> None:
    check_prepare(case, "cuda")
    check_update(case, "cuda")


@pytest.mark.parametrize("counter", COUNTERS)
def test_the_step_counter_wraps_and_keeps_its_ring_slot(counter: int) -> None:
    decoding = SlotCase(query_len=1, seq_len=3, num_tokens=4, num_blocks=2)
    check_update(StepCase(make_limits(), (decoding,) * 4, 4, 4, counter, (1,) * 4, (0,) * 4), "cuda")
