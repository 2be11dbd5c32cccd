"""Paged attention for decode: every row is one query token over the KV cache of its slot.

Invariant: the grid is a function of the launched rows alone. Contexts are split where they are long, by a rule that
looks at a row's own context; which program computes which split is found on the device. So one captured launch serves
every mix of contexts, a long one does not hold up the others, and a row's bits do not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from graphexec.kernels.lang import Launch, launches_early, multiprocessors, tl, triton, use_triton, wait_for_predecessor

__all__ = [
    "DecodeSplits",
    "DecodeTile",
    "DecodeWorkspace",
    "choose_decode_splits",
    "choose_decode_tile",
    "gather_context",
    "paged_decode",
    "paged_decode_reference",
    "paged_decode_triton",
    "split_starts",
]

PROGRAMS_PER_SM = 8
SEARCH_WIDTH = 128  # rows that a program looks at in one step of its search


class DecodeTile(NamedTuple):
    """How a program walks the cache: tokens per step, its warps, and the depth of its software pipeline."""

    block_n: int
    num_warps: int
    num_stages: int


class DecodeSplits(NamedTuple):
    """How the context of a row is shared out.

    Attributes:
        tile: tokens of a tile, `DecodeTile.block_n`.
        size: tiles that a split should have: a row has as many splits as come nearest to it, of equal size.
        most: most splits of a row: beyond, they take more tiles each.
    """

    tile: int
    size: int
    most: int

    def of(self, context: torch.Tensor) -> torch.Tensor:
        """Splits of contexts of so many tokens, as integers of the same kind."""
        tiles = (context + self.tile - 1) // self.tile
        wanted = ((tiles + self.size // 2) // self.size).clamp(1, self.most)
        share = (tiles + wanted - 1) // wanted
        return (tiles + share - 1) // share


MOST_SPLITS = 32
_MOST_OF_ALL = 8192  # of all rows: what their partial results take, 134 MB with 32 heads of 128


def choose_decode_splits(rows: int, num_kv_heads: int, tile: int) -> DecodeSplits:
    """The rule for a bucket of `rows` rows: contexts of 500 tokens then give 500 pieces of work or more.

    An H200 holds 1,056 at the same time, 8 on each of 132 multiprocessors, and half of them saturate its memory. Longer
    splits pay where there are rows enough, but a split of 16 tiles is as long as any should be: the longest context
    must not outlast the others. The context takes no part: a graph holds the answer.
    """
    size = min(16, max(1, -(-rows * num_kv_heads // 32)))
    return DecodeSplits(tile, size, most=max(1, min(MOST_SPLITS, _MOST_OF_ALL // max(1, rows))))


def choose_decode_tile(head_dim: int, group: int, element_size: int) -> DecodeTile:
    """The tile for a head size, query heads of a KV head, and an element size in bytes.

    A small group fits into one warp, which never waits for another. Eight such programs share a multiprocessor's
    registers, and their number hides the latency better than a deeper pipeline does: for heads of 128, from batch 64
    on, 32 tokens, 1 warp and 2 stages is the best or within 1 % of it. (At batch 1 and 8,000 tokens, 2 warps and 3
    stages take 15 % less: bench/attention_sweep.py.) Larger heads and groups need four warps to hold what they
    accumulate; float32 multiplies on the ordinary cores, and spills with fewer than eight.
    """
    row_bytes = triton.next_power_of_2(head_dim) * element_size
    if element_size > 2:
        key_bytes, num_warps = 16384, 8
    elif group <= 16 and head_dim <= 128:
        key_bytes, num_warps = 8192, 1
    else:
        key_bytes, num_warps = 16384, 4
    return DecodeTile(block_n=max(16, min(64, key_bytes // row_bytes)), num_warps=num_warps, num_stages=2)


@dataclass(frozen=True)
class DecodeWorkspace:
    """Where the splits of a row meet. For launches that never overlap.

    Attributes:
        out: `[splits, KH, group, D]` float32, results of single splits.
        lse: `[splits, KH, group]` float32, logarithms to base 2 of what their weights sum up to.
        arrivals: `[rows, KH]` int32, splits that have ended; zero between launches.
    """

    out: torch.Tensor
    lse: torch.Tensor
    arrivals: torch.Tensor

    @classmethod
    def allocate(
        cls, rows: int, splits: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
    ) -> DecodeWorkspace:
        """For launches of at most `rows` rows with `splits` splits between them."""
        shape = (splits, num_kv_heads, num_heads // num_kv_heads)
        return cls(
            out=torch.empty(*shape, head_dim, dtype=torch.float32, device=device),
            lse=torch.empty(shape, dtype=torch.float32, device=device),
            arrivals=torch.zeros(rows, num_kv_heads, dtype=torch.int32, device=device),
        )


def split_starts(row_slot: torch.Tensor, positions: torch.Tensor, splits: DecodeSplits) -> torch.Tensor:
    """`[T + 1]` int32: the first split of each row, counted over all rows, then their total; padding has none."""
    counts = torch.where(row_slot >= 0, splits.of((positions + 1).clamp(min=1)), 0)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def paged_decode(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    row_slot: torch.Tensor,
    positions: torch.Tensor,
    split_start: torch.Tensor,
    scale: float,
    splits: DecodeSplits,
    workspace: DecodeWorkspace | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query token per row over positions 0..positions[row] of its slot.

    Split-KV attention: flash-decoding (Dao, Haziza, Massa, Sizov: "Flash-Decoding for long-context inference", 2023)
    with the online softmax of FlashAttention-2 (Dao 2023) inside a split. The split of a row that ends last puts their
    results together, always in the same order.

    Args:
        query: `[T, H, D]`, contiguous; bfloat16, float16 or float32 for the kernel, any float dtype for the reference.
        k_cache, v_cache: `[num_blocks, KH, block_size, D]`, contiguous, the dtype of `query`; H is a multiple of KH,
            block_size is a power of two. Entries beyond a context may hold anything, NaN included.
        block_tables: `[S, max_blocks]` int32, contiguous; entries beyond a context are not read as blocks. Like
            `row_slot`, `positions` and `split_start` written at least two launches earlier: see `wait_for_predecessor`.
        row_slot: `[T]` int32, negative for padding rows, which come last.
        positions: `[T]` int32, the position of the row's token; its key and value are in the cache already.
        split_start: `[T + 1]` int32, from `prepare` or `split_starts`, by the same `splits`.
        scale: factor of the scores, usually D ** -0.5.
        splits: from `choose_decode_splits`; not read by the reference.
        workspace: for as many rows and splits; not read by the reference.
        out: like `query`, contiguous, to write into; padding rows keep what they hold. None for new memory.

    Returns:
        `out`: `[T, H, D]` in the dtype and on the device of `query`. In new memory, padding rows hold anything.

    Raises:
        ValueError: a cache is not contiguous, or block_size is no power of two.
    """
    out = torch.empty_like(query) if out is None else out
    where = block_tables, row_slot, positions, split_start
    paged_decode_call(query, k_cache, v_cache, *where, scale, splits, workspace, out)()
    return out


def paged_decode_call(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    row_slot: torch.Tensor,
    positions: torch.Tensor,
    split_start: torch.Tensor,
    scale: float,
    splits: DecodeSplits,
    workspace: DecodeWorkspace | None,
    out: torch.Tensor,
) -> Launch | Callable[[], object]:
    """`paged_decode` as a call that may be made more than once."""
    where = block_tables, row_slot, positions
    if not use_triton(query):
        return partial(paged_decode_reference, query, k_cache, v_cache, *where, scale, out)
    assert workspace is not None, "the kernel needs a workspace"
    return paged_decode_launch(query, k_cache, v_cache, *where, split_start, scale, splits, workspace, None, out)


def paged_decode_reference(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    row_slot: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`paged_decode` in plain torch, for any float dtype and device; padding rows are zero in new memory.

    Row by row, so that a row's result is bitwise independent of the others.
    """
    rows, num_heads, head_dim = query.shape
    num_kv_heads = k_cache.shape[1]
    out = torch.zeros_like(query) if out is None else out
    grouped = query.view(rows, num_kv_heads, num_heads // num_kv_heads, head_dim) * scale
    grouped_out = out.view_as(grouped)
    for row, (slot, position) in enumerate(zip(row_slot.tolist(), positions.tolist(), strict=True)):
        if slot < 0:
            continue
        keys = gather_context(k_cache, block_tables[slot], position + 1)
        values = gather_context(v_cache, block_tables[slot], position + 1)
        weights = torch.softmax(grouped[row] @ keys.transpose(1, 2), dim=-1)
        torch.bmm(weights, values, out=grouped_out[row])
    return out


def gather_context(cache: torch.Tensor, block_table: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` tokens of one slot, `[KH, length, D]`, from `cache` and the slot's row of the block table."""
    _, num_kv_heads, block_size, head_dim = cache.shape
    blocks = cache.index_select(0, block_table[: -(-length // block_size)])
    return blocks.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)[:, :length]


def paged_decode_triton(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    row_slot: torch.Tensor,
    positions: torch.Tensor,
    split_start: torch.Tensor,
    scale: float,
    splits: DecodeSplits,
    workspace: DecodeWorkspace,
    tile: DecodeTile | None = None,
    out: torch.Tensor | None = None,
    programs_per_sm: int = PROGRAMS_PER_SM,
) -> torch.Tensor:
    """`paged_decode` as one Triton kernel; `tile` None chooses."""
    out = torch.empty_like(query) if out is None else out
    if len(query) == 0:
        return out
    where = block_tables, row_slot, positions, split_start
    paged_decode_launch(query, k_cache, v_cache, *where, scale, splits, workspace, tile, out, programs_per_sm)()
    return out


def paged_decode_launch(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    row_slot: torch.Tensor,
    positions: torch.Tensor,
    split_start: torch.Tensor,
    scale: float,
    splits: DecodeSplits,
    workspace: DecodeWorkspace,
    tile: DecodeTile | None,
    out: torch.Tensor,
    programs_per_sm: int = PROGRAMS_PER_SM,
) -> Launch:
    """The launch of `paged_decode_triton`."""
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("The KV cache of a layer must be contiguous: the kernel derives its strides from its shape.")
    rows, num_heads, head_dim = query.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    if block_size & (block_size - 1):
        raise ValueError(f"The block size of the KV cache is {block_size}; the kernel needs a power of two.")
    group = num_heads // num_kv_heads
    if tile is None:
        tile = choose_decode_tile(head_dim, group, query.element_size())
    assert tile.block_n == splits.tile, "splits are counted in tiles"
    early = launches_early(query)
    group_padded = max(16, triton.next_power_of_2(group))
    programs = min(rows * splits.most * num_kv_heads, programs_per_sm * multiprocessors(query))
    arguments = {
        "query": query,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_tables": block_tables,
        "row_slot": row_slot,
        "positions": positions,
        "split_start": split_start,
        "out": out,
        "partial_out": workspace.out,
        "partial_lse": workspace.lse,
        "arrivals": workspace.arrivals,
        "scale": scale,
        "max_blocks": block_tables.stride(0),
        "rows": rows,
        "programs": programs,
        "size": splits.size,
        "most": splits.most,
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "GROUP_PADDED": group_padded,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_PADDED": triton.next_power_of_2(head_dim),
        "BLOCK_SIZE": block_size,
        "BLOCK_N": tile.block_n,
        "WIDTH": SEARCH_WIDTH,
        "PARTS": group_padded // triton.next_power_of_2(group),
        "EARLY": early,
    }
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "launch_pdl": early}
    return Launch(_decode_kernel, (programs,), arguments, options)


@triton.jit
def _locate(
    item,
    work,
    split_start,  # [T + 1]
    row_slot,  # [T]
    positions,  # [T]
    block_tables,  # [S, max_blocks]
    max_blocks,
    rows,
    size,
    most,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Row, slot and context of a piece of work, which of how many splits, its tiles, and the blocks of the first."""
    has_work = item < work
    split = item // NUM_KV_HEADS
    row, first_split = 0, 0
    if rows > 1:  # a single row is found without waiting for a load
        started = 0
        for base in range(0, rows, WIDTH):
            lanes = base + tl.arange(0, WIDTH)
            starts = tl.load(split_start + lanes, mask=lanes < rows, other=2147483647)
            started += tl.sum((starts <= split).to(tl.int32))
            first_split = tl.maximum(first_split, tl.max(tl.where(starts <= split, starts, 0)))
        row = started - 1
    slot = tl.load(row_slot + row).to(tl.int64)
    context = tl.load(positions + row) + 1
    tiles = tl.cdiv(context, BLOCK_N)
    # `DecodeSplits.of` the context.
    share = tl.cdiv(tiles, tl.minimum(tl.maximum((tiles + size // 2) // size, 1), most))
    part = split - first_split
    first_tile = part * share
    last_tile = tl.minimum(first_tile + share, tiles)
    index = first_tile * BLOCK_N // BLOCK_SIZE + tl.arange(0, BLOCK_N) // BLOCK_SIZE
    at = block_tables + slot * max_blocks + tl.minimum(index, (context - 1) // BLOCK_SIZE)
    blocks = tl.load(at, mask=has_work, other=0)
    return row, slot, context, part, tl.cdiv(tiles, share), first_tile, last_tile, blocks


@triton.jit(do_not_specialize=["max_blocks", "rows", "programs", "size", "most"])
def _decode_kernel(
    query,  # [T, H, D]
    k_cache,  # [num_blocks, KH, BLOCK_SIZE, D]
    v_cache,  # [num_blocks, KH, BLOCK_SIZE, D]
    block_tables,  # [S, max_blocks]
    row_slot,  # [T]
    positions,  # [T]
    split_start,  # [T + 1]
    out,  # [T, H, D]
    partial_out,  # [splits, KH, GROUP, D] float32
    partial_lse,  # [splits, KH, GROUP] float32, base 2
    arrivals,  # [T, KH]
    scale,
    max_blocks,
    rows,  # T
    programs,
    size,
    most,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One piece of work: all query heads of one KV head, for one split of one row's context."""
    members = tl.arange(0, GROUP_PADDED)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    lanes = tl.arange(0, BLOCK_N)
    member_mask = (members < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    scale_log2 = scale * 1.4426950408889634
    item = tl.program_id(0)
    work = tl.load(split_start + rows) * NUM_KV_HEADS
    # What can be known of the first piece before the queries are there is.
    row, slot, context, part, count, first_tile, last_tile, blocks = _locate(
        item, work, split_start, row_slot, positions, block_tables, max_blocks, rows, size, most,
        NUM_KV_HEADS, BLOCK_SIZE, BLOCK_N, WIDTH,
    )  # fmt: skip
    if EARLY:
        wait_for_predecessor()
    while item < work:
        kv_head = item % NUM_KV_HEADS
        # Row and head of the query and of the output alike.
        row_head = row.to(tl.int64) * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + members
        queries = tl.load(query + row_head[:, None] * HEAD_DIM + dims[None, :], mask=member_mask, other=0.0)
        table = block_tables + slot * max_blocks
        last_block = (context - 1) // BLOCK_SIZE
        head_offset = kv_head * (BLOCK_SIZE * HEAD_DIM)

        highest = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
        # Summed over the lanes after the loop: a sum in every tile would be one more exchange between threads.
        lane_totals = tl.zeros([GROUP_PADDED, BLOCK_N], tl.float32)
        accumulator = tl.zeros([GROUP_PADDED, HEAD_DIM_PADDED], tl.float32)
        for tile in range(first_tile, last_tile):
            # Block and offset of a token, each as a scalar and a part of the lane that is the same in every tile: one
            # of the two sizes divides the other. Blocks come a tile ahead of their keys; beyond the context, the last
            # one once more.
            first = tile * BLOCK_N
            valid = first + lanes < context
            offsets = first % BLOCK_SIZE * HEAD_DIM + lanes % BLOCK_SIZE * HEAD_DIM + head_offset
            token_at = blocks.to(tl.int64) * (NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM) + offsets
            next_index = tl.minimum((first + BLOCK_N) // BLOCK_SIZE + lanes // BLOCK_SIZE, last_block)
            blocks = tl.load(table + next_index)

            keys = tl.load(k_cache + token_at[None, :] + dims[:, None], mask=(dims < HEAD_DIM)[:, None], other=0.0)
            scores = tl.dot(queries, keys, input_precision="ieee") * scale_log2
            scores = tl.where(valid[None, :], scores, float("-inf"))

            # A tile holds at least one valid token, so `raised` is finite and exp2 never sees inf - inf.
            raised = tl.maximum(highest, tl.max(scores, axis=1))
            rescale = tl.exp2(highest - raised)
            weights = tl.exp2(scores - raised[:, None])
            lane_totals = lane_totals * rescale[:, None] + weights
            highest = raised

            # Masked, unlike the keys: a weight of zero does not silence a NaN beyond the context.
            value_mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
            values = tl.load(v_cache + token_at[:, None] + dims[None, :], mask=value_mask, other=0.0)
            accumulator = accumulator * rescale[:, None]
            accumulator = tl.dot(weights.to(values.dtype), values, accumulator, input_precision="ieee")

        total = tl.sum(lane_totals, axis=1)
        result = accumulator / total[:, None]
        out_at = out + row_head[:, None] * HEAD_DIM + dims[None, :]
        if count == 1:
            tl.store(out_at, result.to(out.dtype.element_ty), mask=member_mask)
        else:
            partial_at = item.to(tl.int64) * GROUP + members
            tl.store(partial_out + partial_at[:, None] * HEAD_DIM + dims[None, :], result, mask=member_mask)
            tl.store(partial_lse + partial_at, highest + tl.log2(total), mask=members < GROUP)
            tl.debug_barrier()  # every thread has stored before one of them counts the split, which releases the stores
            arrival = arrivals + row * NUM_KV_HEADS + kv_head
            if tl.atomic_add(arrival, 1) == count - 1:
                first_head = row.to(tl.int64) * (NUM_KV_HEADS * GROUP) + kv_head * GROUP
                _combine(
                    partial_out, partial_lse, out + first_head * HEAD_DIM, item - part * NUM_KV_HEADS, count,
                    NUM_KV_HEADS, GROUP, GROUP_PADDED, HEAD_DIM, HEAD_DIM_PADDED, PARTS,
                )  # fmt: skip
                tl.store(arrival, 0)

        item += programs
        if item < work:
            row, slot, context, part, count, first_tile, last_tile, blocks = _locate(
                item, work, split_start, row_slot, positions, block_tables, max_blocks, rows, size, most,
                NUM_KV_HEADS, BLOCK_SIZE, BLOCK_N, WIDTH,
            )  # fmt: skip


@triton.jit
def _combine(
    partial_out,  # [splits, KH, GROUP, D] float32
    partial_lse,  # [splits, KH, GROUP] float32, base 2
    out,  # the row's first head of this KV head
    first,  # the piece of work of the row's first split
    count,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Puts the splits of a row together, from the first to the last, PARTS at a time."""
    MEMBERS: tl.constexpr = GROUP_PADDED // PARTS
    places = tl.arange(0, GROUP_PADDED)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    highest = tl.full([MEMBERS], float("-inf"), tl.float32)
    total = tl.zeros([MEMBERS], tl.float32)
    accumulator = tl.zeros([MEMBERS, HEAD_DIM_PADDED], tl.float32)
    for base in range(0, count, PARTS):
        part = base + places // MEMBERS
        is_there = (part < count) & (places % MEMBERS < GROUP)
        at = (first + part * NUM_KV_HEADS).to(tl.int64) * GROUP + places % MEMBERS
        lse = tl.load(partial_lse + at, mask=is_there, other=float("-inf"))
        mask = is_there[:, None] & (dims < HEAD_DIM)[None, :]
        result = tl.load(partial_out + at[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        lse = tl.reshape(lse, [PARTS, MEMBERS])
        raised = tl.maximum(highest, tl.max(lse, axis=0))
        weights = tl.exp2(lse - raised[None, :])
        rescale = tl.exp2(highest - raised)
        weighted = tl.reshape(result, [PARTS, MEMBERS, HEAD_DIM_PADDED]) * weights[:, :, None]
        accumulator = accumulator * rescale[:, None] + tl.sum(weighted, axis=0)
        total = total * rescale + tl.sum(weights, axis=0)
        highest = raised
    members = tl.arange(0, MEMBERS)
    out_at = out + members[:, None] * HEAD_DIM + dims[None, :]
    mask = (members < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out_at, (accumulator / total[:, None]).to(out.dtype.element_ty), mask=mask)
