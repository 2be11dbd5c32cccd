"""Adjusts logits before a token is chosen: bias, then the penalties for what a sequence already holds.

Definition, for each token id of a row, in float32 (float64 for float64 logits):
1. Add the bias of the slot for that id (-inf for a bad token).
2. If the id is in the sequence (prompt or output): divide a positive logit by `repetition_penalty`, multiply another.
3. If it is in the output: subtract `frequency_penalty` times its count there, and `presence_penalty` once.
Steps 1 and 2-3 each round to the type of the logits, which are changed in place.

The counts are not kept from step to step: the kernel counts the known tokens of a sequence anew, in a table of the
vocabulary that it clears as it reads. So no request has memory of its own for them, one without penalties is passed
over, and nothing has to be kept right when a request is preempted and computed again.
"""

from __future__ import annotations

import torch

from graphexec.kernels.lang import tl, triton
from graphexec.kernels.state import SlotTensors

__all__ = ["adjust_reference", "adjust_triton"]

_TILE = 1024
_PROGRAMS = 64
"""Tables of counts, at most: 4 V bytes each (39 MB in all at V = 151,936), zeroed in each step that may need one."""
_IN_PROMPT = tl.constexpr(1 << 30)
"""Beside the count of an id in the output, below it."""


@triton.jit
def _bias_kernel(
    logits_ptr,  # [B, V], rows `row_stride` apart
    slots_ptr,  # [B]
    bias_ids_ptr,  # [S, BIASES]
    bias_values_ptr,  # [S, BIASES]
    row_stride,
    BIASES: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    lane = tl.arange(0, LANES)
    ids = tl.load(bias_ids_ptr + slot * BIASES + lane, mask=lane < BIASES, other=-1)
    used = ids >= 0
    values = tl.load(bias_values_ptr + slot * BIASES + lane, mask=used, other=0.0)
    at = logits_ptr + row * row_stride + ids
    logits = tl.load(at, mask=used, other=0.0)
    tl.store(at, (logits.to(tl.float32) + values).to(logits.dtype), mask=used)


@triton.jit
def _penalty_kernel(
    logits_ptr,  # [B, V], rows `row_stride` apart
    counts_ptr,  # [programs, V], zeros before and after
    slots_ptr,  # [B]
    token_ids_ptr,  # [S, MAX_TOKENS]
    num_tokens_ptr,  # [S], as all that follow
    prompt_len_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    row_stride,
    rows,
    vocabulary,
    MAX_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    counts = counts_ptr + program * vocabulary
    for row in range(program, rows, tl.num_programs(0)):
        slot = tl.load(slots_ptr + row)
        at_slot = tl.maximum(slot, 0)
        repetition = tl.load(repetition_ptr + at_slot)
        presence = tl.load(presence_ptr + at_slot)
        frequency = tl.load(frequency_ptr + at_slot)
        penalizes = (slot >= 0) & ((repetition != 1.0) | (presence != 0.0) | (frequency != 0.0))
        known = tl.where(penalizes, tl.load(num_tokens_ptr + at_slot), 0)
        prompt_len = tl.load(prompt_len_ptr + at_slot)
        sequence = token_ids_ptr + at_slot.to(tl.int64) * MAX_TOKENS
        for begin in range(0, known, TILE):
            position = begin + tl.arange(0, TILE)
            ids = tl.load(sequence + position, mask=position < known, other=0)
            tl.atomic_or(counts + ids, _IN_PROMPT, mask=(position < known) & (position < prompt_len))
            tl.atomic_add(counts + ids, 1, mask=(position < known) & (position >= prompt_len))
        tl.debug_barrier()  # every token is counted before any count is taken
        for begin in range(0, known, TILE):
            position = begin + tl.arange(0, TILE)
            ids = tl.load(sequence + position, mask=position < known, other=0)
            # The lane that takes an id's count leaves zero for the id's other places: each is adjusted once.
            taken = tl.atomic_xchg(counts + ids, 0, mask=position < known)
            first = (position < known) & (taken != 0)
            count = taken & (_IN_PROMPT - 1)
            at = logits_ptr + row * row_stride + ids
            logits = tl.load(at, mask=first, other=0.0)
            value = logits.to(tl.float32)
            value = tl.where(value > 0, tl.div_rn(value, repetition), value * repetition)  # as torch rounds
            value -= frequency * count.to(tl.float32)
            value -= tl.where(count > 0, presence, 0.0)
            tl.store(at, value.to(logits.dtype), mask=first)
        tl.debug_barrier()  # the table is clear before the next row is counted


def adjust_triton(logits: torch.Tensor, slots: torch.Tensor, state: SlotTensors) -> None:
    """Adjusts the rows of active slots in place.

    Args:
        logits: `[B, V]`, B > 0, bfloat16, float16 or float32.
        slots: int32 `[B]`, -1 for padding.
        state: the slots' parameters.
    """
    rows = logits.shape[0]
    biases = state.bias_ids.shape[1]
    _bias_kernel[(rows,)](
        logits, slots, state.bias_ids, state.bias_values, logits.stride(0),
        BIASES=biases, LANES=triton.next_power_of_2(biases), num_warps=4,
    )  # fmt: skip
    programs = min(rows, _PROGRAMS)
    counts = torch.zeros(programs, logits.shape[1], dtype=torch.int32, device=logits.device)
    _penalty_kernel[(programs,)](
        logits, counts, slots, state.token_ids, state.num_tokens, state.prompt_len,
        state.repetition_penalty, state.presence_penalty, state.frequency_penalty,
        logits.stride(0), rows, logits.shape[1],
        MAX_TOKENS=state.token_ids.shape[1], TILE=_TILE, num_warps=8,
    )  # fmt: skip


def adjust_reference(logits: torch.Tensor, slots: torch.Tensor, state: SlotTensors) -> None:
    """`adjust_triton` in torch, for any float dtype and device; on the CPU it skips what no row of the batch needs."""
    at = slots.clamp(min=0).long()
    active = slots >= 0
    has_bias = active[:, None] & (state.bias_ids[at] >= 0)
    if logits.is_cuda or bool(has_bias.any()):
        _add_bias(logits, state.bias_ids[at].masked_fill(~has_bias, logits.shape[1]), state.bias_values[at])
    penalties = [penalty[at] for penalty in (state.repetition_penalty, state.presence_penalty, state.frequency_penalty)]
    penalized = active & ((penalties[0] != 1) | (penalties[1] != 0) | (penalties[2] != 0))
    if logits.is_cuda or bool(penalized.any()):
        known = torch.where(penalized, state.num_tokens[at], 0)
        _penalize(logits, state.token_ids[at], known, state.prompt_len[at], penalties)


def _add_bias(logits: torch.Tensor, ids: torch.Tensor, values: torch.Tensor) -> None:
    """Adds `values [B, J]` at `ids [B, J]`, of which those equal to V are no token's."""
    padded = torch.cat([logits, logits.new_zeros(logits.shape[0], 1)], dim=1)
    ids = ids.long()
    padded.scatter_(1, ids, (_wide(padded.gather(1, ids)) + values).to(logits.dtype))
    logits.copy_(padded[:, :-1])


def _penalize(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    known: torch.Tensor,
    prompt_len: torch.Tensor,
    penalties: list[torch.Tensor],
) -> None:
    """Penalizes what the first `known [B]` of `token_ids [B, L]` hold."""
    rows, vocabulary = logits.shape
    position = torch.arange(token_ids.shape[1], device=logits.device)[None]
    ids = token_ids.long().masked_fill(position >= known[:, None], vocabulary)
    is_output = (position >= prompt_len[:, None]).to(torch.int32)
    zeros = torch.zeros(rows, vocabulary + 1, dtype=torch.int32, device=logits.device)
    count = zeros.scatter_add(1, ids, is_output)[:, :-1]
    seen = zeros.scatter(1, ids, 1)[:, :-1] > 0
    repetition, presence, frequency = (penalty[:, None] for penalty in penalties)
    values = _wide(logits)
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - frequency * count
    values = values - presence * (count > 0)
    logits.copy_(torch.where(seen, values.to(logits.dtype), logits))


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()
