"""Update: decides on the device who stops, writes the slots for the next step, and writes the output record."""

from __future__ import annotations

import torch

from graphexec.kernels.lang import tl, triton, use_triton
from graphexec.kernels.state import SlotTensors, StepTensors

__all__ = ["update", "update_reference", "update_triton"]

_RUNNING, _STOP, _LENGTH, _NAN, _PARKED = range(5)  # graphexec.plan.FinishCode
_HEADER = 8  # graphexec.plan.RecordLayout.HEADER


def update(
    slots: SlotTensors,
    step: StepTensors,
    sampled: torch.Tensor,
    nan: torch.Tensor,
    ring: torch.Tensor,
    counter: torch.Tensor,
    block_size: int,
) -> None:
    """Moves every slot that ran to its next state and writes the record into `ring[counter % R]`, then counts up.

    Args:
        slots: state of the slots, updated in place.
        step: the rows of this step, from `prepare`.
        sampled: `[>= real_bsz]` int32, token of each active slot.
        nan: like `sampled`; 1 where the logits held no number to choose from.
        ring: `[R, words]` int32 with R a power of two; see `graphexec.plan.RecordLayout`.
        counter: `[1]` int32, number of this step.
        block_size: tokens of a KV block.
    """
    arguments = (slots, step, sampled, nan, ring, counter, block_size)
    if use_triton(slots.query_lens):
        update_triton(*arguments)
    else:
        update_reference(*arguments)


def update_reference(
    slots: SlotTensors,
    step: StepTensors,
    sampled: torch.Tensor,
    nan: torch.Tensor,
    ring: torch.Tensor,
    counter: torch.Tensor,
    block_size: int,
) -> None:
    """What `update` means, in torch."""
    query_lens, num_tokens = slots.query_lens, slots.num_tokens
    overflow = step.info[1] != 0
    ran = (query_lens > 0) & ~overflow
    seq_lens = slots.seq_lens + query_lens
    computes_last = ran & (seq_lens == num_tokens)
    index = step.active_index.clamp(min=0).long()
    is_nan = computes_last & (nan[index] != 0)
    yields = computes_last & ~is_nan
    token = torch.where(yields, sampled[index], -1)
    may_stop = num_tokens >= slots.min_len
    hits = ((slots.stop_ids == token[:, None]) & (slots.stop_ids >= 0)).any(1)
    stops = yields & may_stop & (hits | _completes_sequence(slots, token))
    ends = yields & (num_tokens + 1 >= slots.max_len)
    finish = torch.zeros_like(query_lens)
    finish[ends] = _LENGTH
    finish[stops] = _STOP
    finish[is_nan] = _NAN
    goes_on = yields & (finish == _RUNNING)
    parks = goes_on & (seq_lens // block_size >= slots.num_blocks)
    finish[parks] = _PARKED
    writers = yields.nonzero().flatten()
    slots.token_ids[writers, num_tokens[writers].long()] = token[writers]
    slots.num_tokens.copy_(torch.where(yields, num_tokens + 1, num_tokens))
    slots.seq_lens.copy_(torch.where(ran, seq_lens, slots.seq_lens))
    slots.query_lens.copy_(torch.where(ran, (goes_on & ~parks).int(), query_lens))
    slots.parked.copy_(torch.where(ran, parks.int(), slots.parked))
    count = len(query_lens)
    record = ring[int(counter) % len(ring)]
    record[:_HEADER] = 0
    record[0] = counter[0]
    record[1] = step.info[0]
    record[2] = ((slots.query_lens > 0) | (slots.parked != 0)).any()
    record[3] = step.info[1]
    record[4] = is_nan.any()
    record[5] = slots.last_delta[0]
    record[_HEADER : _HEADER + count] = torch.where(ran, yields.int(), -1)
    record[_HEADER + count : _HEADER + 2 * count] = finish
    record[_HEADER + 2 * count : _HEADER + 3 * count] = token
    counter += 1


def _completes_sequence(slots: SlotTensors, token: torch.Tensor) -> torch.Tensor:
    """Whether `token [S]`, behind the output so far, completes one of the slot's stop sequences; bool `[S]`."""
    _, sequences, width = slots.stop_sequences.shape
    index = slots.num_tokens.long()[:, None] + torch.arange(1 - width, 1, device=token.device)  # [S, W]
    tail = slots.token_ids.gather(1, index.clamp(0, slots.token_ids.shape[1] - 1))
    tail[:, -1] = token
    tail = torch.where(index >= slots.prompt_len[:, None], tail, -2)  # a sequence lies in the output
    fits = ((slots.stop_sequences == tail[:, None]) | (slots.stop_sequences < 0)).all(2)
    used = torch.arange(sequences, device=token.device) < slots.num_stop_sequences[:, None]
    return (fits & used).any(1)


def update_triton(
    slots: SlotTensors,
    step: StepTensors,
    sampled: torch.Tensor,
    nan: torch.Tensor,
    ring: torch.Tensor,
    counter: torch.Tensor,
    block_size: int,
) -> None:
    """One program, one lane a slot: some hundred slots are one load, and a single program needs no second pass."""
    max_slots, max_stop_ids = slots.stop_ids.shape
    lanes = triton.next_power_of_2(max_slots)
    _update[(1,)](
        slots.query_lens,
        slots.seq_lens,
        slots.num_tokens,
        slots.max_len,
        slots.min_len,
        slots.num_blocks,
        slots.parked,
        slots.stop_ids,
        slots.num_stop_sequences,
        slots.stop_sequences,
        slots.prompt_len,
        slots.token_ids,
        slots.last_delta,
        step.active_index,
        step.info,
        sampled,
        nan,
        ring,
        counter,
        MAX_SLOTS=max_slots,
        LANES=lanes,
        STOP_IDS=max_stop_ids,
        SEQUENCES=slots.stop_sequences.shape[1],
        SEQUENCE_TOKENS=slots.stop_sequences.shape[2],
        MAX_TOKENS=slots.token_ids.shape[1],
        BLOCK_SIZE=block_size,
        RING=ring.shape[0],
        WORDS=ring.shape[1],
        HEADER=_HEADER,
        STOP=_STOP,
        LENGTH=_LENGTH,
        NAN=_NAN,
        PARKED=_PARKED,
        num_warps=max(1, min(8, lanes // 64)),
    )


@triton.jit
def _update(
    query_lens,  # [S]
    seq_lens,  # [S]
    num_tokens,  # [S]
    max_len,  # [S]
    min_len,  # [S]
    num_blocks,  # [S]
    parked,  # [S]
    stop_ids,  # [S, STOP_IDS]
    num_stop_sequences,  # [S]
    stop_sequences,  # [S, SEQUENCES, SEQUENCE_TOKENS]
    prompt_len,  # [S]
    token_ids,  # [S, MAX_TOKENS]
    last_delta,  # [1]
    active_index,  # [S]
    info,  # [2]
    sampled,  # [>= real_bsz]
    nan,  # [>= real_bsz]
    ring,  # [RING, WORDS]
    counter,  # [1]
    MAX_SLOTS: tl.constexpr,
    LANES: tl.constexpr,
    STOP_IDS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    SEQUENCE_TOKENS: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RING: tl.constexpr,
    WORDS: tl.constexpr,
    HEADER: tl.constexpr,
    STOP: tl.constexpr,
    LENGTH: tl.constexpr,
    NAN: tl.constexpr,
    PARKED: tl.constexpr,
):
    slot = tl.arange(0, LANES)
    inside = slot < MAX_SLOTS
    overflow = tl.load(info + 1)
    length = tl.load(query_lens + slot, mask=inside, other=0)
    ran = (length > 0) & (overflow == 0)
    seq_len = tl.load(seq_lens + slot, mask=inside, other=0) + length
    known = tl.load(num_tokens + slot, mask=inside, other=-1)
    computes_last = ran & (seq_len == known)
    index = tl.load(active_index + slot, mask=computes_last, other=0)
    is_nan = computes_last & (tl.load(nan + index, mask=computes_last, other=0) != 0)
    yields = computes_last & (is_nan == 0)
    token = tl.load(sampled + index, mask=yields, other=-1)
    hits = slot < 0
    for entry in tl.static_range(STOP_IDS):
        stop_id = tl.load(stop_ids + slot * STOP_IDS + entry, mask=yields, other=-1)
        hits = hits | ((stop_id == token) & (stop_id >= 0))
    sequences = tl.load(num_stop_sequences + slot, mask=yields, other=0)
    most = tl.max(sequences)
    if most > 0:
        first_output = tl.load(prompt_len + slot, mask=yields, other=0)
        for number in range(most):
            fits = yields & (number < sequences)
            for place in range(SEQUENCE_TOKENS):
                index = known - (SEQUENCE_TOKENS - 1 - place)
                expected = tl.load(
                    stop_sequences + (slot * SEQUENCES + number) * SEQUENCE_TOKENS + place, mask=fits, other=-1
                )
                compares = fits & (expected >= 0)
                inside_output = compares & (index >= first_output)
                before = inside_output & (index < known)
                earlier = tl.load(token_ids + slot.to(tl.int64) * MAX_TOKENS + index, mask=before, other=-2)
                found = tl.where(index == known, token, earlier)
                fits = fits & ((expected < 0) | (inside_output & (found == expected)))
            hits = hits | fits
    stops = yields & hits & (known >= tl.load(min_len + slot, mask=inside, other=0))
    ends = yields & (known + 1 >= tl.load(max_len + slot, mask=inside, other=0))
    finish = tl.where(is_nan, NAN, tl.where(stops, STOP, tl.where(ends, LENGTH, 0)))
    goes_on = yields & (finish == 0)
    parks = goes_on & (seq_len // BLOCK_SIZE >= tl.load(num_blocks + slot, mask=inside, other=0))
    finish = tl.where(parks, PARKED, finish)
    was_parked = tl.load(parked + slot, mask=inside, other=0)
    next_length = tl.where(ran, (goes_on & (parks == 0)).to(tl.int32), length)
    next_parked = tl.where(ran, parks.to(tl.int32), was_parked)
    running = tl.max(((next_length > 0) | (next_parked != 0)).to(tl.int32))

    tl.store(token_ids + slot.to(tl.int64) * MAX_TOKENS + known, token, mask=yields)
    tl.store(num_tokens + slot, known + 1, mask=yields)
    tl.store(seq_lens + slot, seq_len, mask=ran)
    tl.store(query_lens + slot, next_length, mask=ran)
    tl.store(parked + slot, next_parked, mask=ran)

    step = tl.load(counter)
    record = ring + (step & (RING - 1)) * WORDS
    tl.store(record, step)
    tl.store(record + 1, tl.load(info))
    tl.store(record + 2, running)
    tl.store(record + 3, overflow)
    tl.store(record + 4, tl.max(is_nan.to(tl.int32)))
    tl.store(record + 5, tl.load(last_delta))
    tl.store(record + 6, 0)
    tl.store(record + 7, 0)
    tl.store(record + HEADER + slot, tl.where(ran, yields.to(tl.int32), -1), mask=inside)
    tl.store(record + HEADER + MAX_SLOTS + slot, finish, mask=inside)
    tl.store(record + HEADER + 2 * MAX_SLOTS + slot, token, mask=inside)
    tl.debug_barrier()  # no warp may count up before every warp has read the number of this step
    tl.store(counter, step + 1)
