"""Prepare: from the slots' query lengths, the packed rows of the step."""

from __future__ import annotations

import torch

from graphexec.kernels.lang import tl, triton, use_triton
from graphexec.kernels.paged_decode import DecodeSplits, split_starts
from graphexec.kernels.state import SlotTensors, StepTensors

__all__ = ["ONE_SPLIT", "prepare", "prepare_reference", "prepare_triton"]

ONE_SPLIT = DecodeSplits(tile=1 << 30, size=1, most=1)
"""For programs whose attention does not split contexts."""


def prepare(
    slots: SlotTensors,
    step: StepTensors,
    rows: int,
    bucket: int,
    block_size: int,
    splits: DecodeSplits = ONE_SPLIT,
    shortest_chunk: int = 2,
) -> None:
    """Fills the first `rows` rows and `bucket` active slots of `step` from `slots`, in place.

    Slots of one token come first, then chunks, slots ascending in both; the rows of a chunk are consecutive. With a
    `shortest_chunk` of 1 every slot has a chunk, with 2 it takes two tokens. What is left over is padding. If the slots
    need more than `rows` rows, or more than `bucket` slots run, all rows become padding and `overflow` is set: nothing
    is dropped silently. Contexts of single tokens are shared out by `splits`.
    """
    if use_triton(slots.query_lens):
        prepare_triton(slots, step, rows, bucket, block_size, splits, shortest_chunk)
    else:
        prepare_reference(slots, step, rows, bucket, block_size, splits, shortest_chunk)


def prepare_reference(
    slots: SlotTensors,
    step: StepTensors,
    rows: int,
    bucket: int,
    block_size: int,
    splits: DecodeSplits = ONE_SPLIT,
    shortest_chunk: int = 2,
) -> None:
    """What `prepare` means, in torch."""
    query_lens = slots.query_lens.long()
    active = query_lens.nonzero().flatten()
    lengths = query_lens[active]
    overflow = int(lengths.sum()) > rows or len(active) > bucket
    if overflow:
        active, lengths = active[:0], lengths[:0]
    total, count = int(lengths.sum()), len(active)
    is_chunk = lengths >= shortest_chunk
    order = is_chunk.long().argsort(stable=True)  # of the active slots, as their rows lie
    ends = torch.empty_like(lengths)
    ends[order] = lengths[order].cumsum(0)
    start = ends - lengths
    slot = active[order].repeat_interleave(lengths[order])
    begin = start[order].repeat_interleave(lengths[order])
    position = slots.seq_lens.long()[slot] + torch.arange(total, device=slot.device) - begin
    block_index = position // block_size
    has_block = block_index < slots.num_blocks[slot]
    block = slots.block_tables.long()[slot, block_index.clamp(max=slots.block_tables.shape[1] - 1)]
    step.row_slot[:rows] = -1
    step.row_slot[:total] = slot.int()
    step.positions[:rows] = 0
    step.positions[:total] = position.int()
    step.input_ids[:rows] = 0
    step.input_ids[:total] = slots.token_ids[slot, position]
    step.kv_slots[:rows] = -1
    step.kv_slots[:total] = torch.where(has_block, block * block_size + position % block_size, -1)
    step.active_slots[:bucket] = -1
    step.active_slots[:count] = active.int()
    step.active_index[:] = -1
    step.active_index[active] = torch.arange(count, dtype=torch.int32, device=active.device)
    singles, chunks = active[~is_chunk], active[is_chunk]
    step.decode_slots[:bucket] = -1
    step.decode_slots[: len(singles)] = singles.int()
    step.split_start[: bucket + 1] = split_starts(step.decode_slots[:bucket], step.positions[:bucket], splits)
    step.chunk_slots[:bucket] = -1
    step.chunk_slots[: len(chunks)] = chunks.int()
    step.chunk_start[: bucket + 1] = total
    step.chunk_start[: len(chunks)] = start[is_chunk].int()
    step.logit_rows[:bucket] = 0
    step.logit_rows[:count] = (ends - 1).int()
    step.info[0] = count
    step.info[1] = int(overflow)


def prepare_triton(
    slots: SlotTensors,
    step: StepTensors,
    rows: int,
    bucket: int,
    block_size: int,
    splits: DecodeSplits = ONE_SPLIT,
    shortest_chunk: int = 2,
) -> None:
    """One program a slot; each sums the lengths before its own, which for some hundred slots is a single load."""
    max_slots = slots.query_lens.shape[0]
    _prepare[(max_slots,)](
        slots.query_lens,
        slots.seq_lens,
        slots.num_blocks,
        slots.block_tables,
        slots.token_ids,
        step.row_slot,
        step.positions,
        step.input_ids,
        step.kv_slots,
        step.active_slots,
        step.active_index,
        step.decode_slots,
        step.split_start,
        step.chunk_slots,
        step.chunk_start,
        step.logit_rows,
        step.info,
        rows,
        bucket,
        shortest_chunk,
        splits.tile,
        splits.size,
        splits.most,
        MAX_SLOTS=max_slots,
        LANES=triton.next_power_of_2(max_slots),
        MAX_BLOCKS=slots.block_tables.shape[1],
        MAX_TOKENS=slots.token_ids.shape[1],
        BLOCK_SIZE=block_size,
        CHUNK=128,
        num_warps=4 if max_slots > 128 else 1,
    )


@triton.jit(do_not_specialize=["rows", "bucket", "shortest_chunk", "tile", "size", "most"])
def _prepare(
    query_lens,  # [S]
    seq_lens,  # [S]
    num_blocks,  # [S]
    block_tables,  # [S, MAX_BLOCKS]
    token_ids,  # [S, MAX_TOKENS]
    row_slot,  # [rows]
    positions,  # [rows]
    input_ids,  # [rows]
    kv_slots,  # [rows]
    active_slots,  # [bucket]
    active_index,  # [S]
    decode_slots,  # [bucket]
    split_start,  # [bucket + 1]
    chunk_slots,  # [bucket]
    chunk_start,  # [bucket + 1]
    logit_rows,  # [bucket]
    info,  # [2]
    rows,
    bucket,
    shortest_chunk,
    tile,
    size,
    most,
    MAX_SLOTS: tl.constexpr,
    LANES: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    slot = tl.program_id(0)
    lane = tl.arange(0, LANES)
    lengths = tl.load(query_lens + lane, mask=lane < MAX_SLOTS, other=0)
    total = tl.sum(lengths)
    count = tl.sum((lengths > 0).to(tl.int32))
    is_single = (lengths > 0) & (lengths < shortest_chunk)
    singles = tl.sum(is_single.to(tl.int32))
    overflow = (total > rows) | (count > bucket)
    total = tl.where(overflow, 0, total)
    count = tl.where(overflow, 0, count)
    singles = tl.where(overflow, 0, singles)
    before = lane < slot
    index = tl.sum((before & (lengths > 0)).to(tl.int32))
    single = tl.sum((before & is_single).to(tl.int32))
    chunk = index - single
    # `DecodeSplits.of` the contexts of single tokens.
    tiles = tl.load(seq_lens + lane, mask=lane < MAX_SLOTS, other=0) // tile + 1
    wanted = tl.minimum(tl.maximum((tiles + size // 2) // size, 1), most)
    parts = tl.where(is_single, tl.cdiv(tiles, tl.cdiv(tiles, wanted)), 0)
    all_parts = tl.where(overflow, 0, tl.sum(parts))
    length = tl.where(overflow, 0, tl.sum(tl.where(lane == slot, lengths, 0)))
    start = single
    if length >= shortest_chunk:
        start = singles + tl.sum(tl.where(before & (lengths >= shortest_chunk), lengths, 0))
    if slot == 0:
        tl.store(info, count)
        tl.store(info + 1, overflow.to(tl.int32))
        tl.store(chunk_start + bucket, total)
        tl.store(split_start + bucket, all_parts)
    tl.store(active_index + slot, tl.where(length > 0, index, -1))
    if (length > 0) & (length < shortest_chunk):
        tl.store(decode_slots + single, slot)
        tl.store(split_start + single, tl.sum(tl.where(before, parts, 0)))
    if length >= shortest_chunk:
        tl.store(chunk_slots + chunk, slot)
        tl.store(chunk_start + chunk, start)
    if length > 0:
        tl.store(active_slots + index, slot)
        tl.store(logit_rows + index, start + length - 1)
        first = tl.load(seq_lens + slot)
        blocks = tl.load(num_blocks + slot)
        for done in range(0, length, CHUNK):
            offset = done + tl.arange(0, CHUNK)
            inside = offset < length
            row = start + offset
            position = first + offset
            token = tl.load(token_ids + slot.to(tl.int64) * MAX_TOKENS + position, mask=inside, other=0)
            has_block = inside & (position // BLOCK_SIZE < blocks)
            block = tl.load(block_tables + slot * MAX_BLOCKS + position // BLOCK_SIZE, mask=has_block, other=0)
            kv_slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
            tl.store(row_slot + row, slot, mask=inside)
            tl.store(positions + row, position, mask=inside)
            tl.store(input_ids + row, token, mask=inside)
            tl.store(kv_slots + row, tl.where(has_block, kv_slot, -1), mask=inside)
    # Padding is shared out among the programs, each taking every MAX_SLOTS-th chunk behind the last real row.
    for begin in range(total + slot * CHUNK, rows, MAX_SLOTS * CHUNK):
        row = begin + tl.arange(0, CHUNK)
        padding = row < rows
        tl.store(row_slot + row, -1, mask=padding)
        tl.store(positions + row, 0, mask=padding)
        tl.store(input_ids + row, 0, mask=padding)
        tl.store(kv_slots + row, -1, mask=padding)
    if slot < bucket:
        if slot >= count:
            tl.store(active_slots + slot, -1)
            tl.store(logit_rows + slot, 0)
        if slot >= singles:
            tl.store(decode_slots + slot, -1)
            tl.store(split_start + slot, all_parts)
        if slot >= count - singles:
            tl.store(chunk_slots + slot, -1)
            tl.store(chunk_start + slot, total)
