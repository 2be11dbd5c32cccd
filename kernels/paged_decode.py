"""Paged attention for decode: every row is one query token over the KV cache of its slot.

Invariant: the grid is a function of the rows, the KV heads and the number of splits alone. What the splits share out
is read on the device, so one captured launch serves every context length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from graphexec.kernels.lang import launches_early, tl, triton, use_triton, wait_for_predecessor

__all__ = [
    "DecodeTile",
    "choose_decode_tile",
    "choose_splits",
    "gather_context",
    "paged_decode",
    "paged_decode_reference",
    "paged_decode_triton",
]

MAX_SPLITS = 128
PROGRAMS_PER_SM = 2


class DecodeTile(NamedTuple):
    """How a program walks the cache: tokens per step, its warps, and the depth of its software pipeline."""

    block_n: int
    num_warps: int
    num_stages: int


def choose_splits(rows: int, num_kv_heads: int, num_sms: int) -> int:
    """Number of splits of the context for a bucket of `rows` rows; a power of two from 1 to 128.

    The largest power of two for which rows * num_kv_heads * splits programs still fit twice on each multiprocessor.
    Two programs, each with a tile of keys and values on its way, hold about 32 KiB in flight per multiprocessor; an
    H200 at 4.27 TB/s has some 25 KiB outstanding on each of its 132 (with a latency of 0.8 us), so further splits would
    only make the combination longer. The context length takes no part: a graph holds the answer, and a split that finds
    no work leaves at once.
    """
    programs = max(1, rows * num_kv_heads)
    share = max(1, PROGRAMS_PER_SM * num_sms // programs)
    return min(MAX_SPLITS, 1 << (share.bit_length() - 1))


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


def paged_decode(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    row_slot: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    num_splits: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query token per row over positions 0..positions[row] of its slot.

    Split-KV attention: flash-decoding (Dao, Haziza, Massa, Sizov: "Flash-Decoding for long-context inference", 2023)
    with the online softmax of FlashAttention-2 (Dao 2023) inside a split.

    Args:
        query: `[T, H, D]`, contiguous; bfloat16, float16 or float32 for the kernel, any float dtype for the reference.
        k_cache, v_cache: `[num_blocks, KH, block_size, D]`, contiguous, the dtype of `query`; H is a multiple of KH,
            block_size is a power of two. Entries beyond a context may hold anything, NaN included.
        block_tables: `[S, max_blocks]` int32, contiguous; entries beyond a context are not read as blocks. Like
            `row_slot` and `positions` written at least two launches earlier: see `wait_for_predecessor`.
        row_slot: `[T]` int32, negative for padding rows.
        positions: `[T]` int32, the position of the row's token; its key and value are in the cache already.
        scale: factor of the scores, usually D ** -0.5.
        num_splits: from `choose_splits`, at most 128; not read by the reference.
        out: like `query`, contiguous, to write into; padding rows keep what they hold. None for new memory.

    Returns:
        `out`: `[T, H, D]` in the dtype and on the device of `query`. In new memory, padding rows hold anything.

    Raises:
        ValueError: a cache is not contiguous, block_size is no power of two, or num_splits is out of range.
    """
    if use_triton(query):
        return paged_decode_triton(
            query, k_cache, v_cache, block_tables, row_slot, positions, scale, num_splits, tile=None, out=out
        )
    return paged_decode_reference(query, k_cache, v_cache, block_tables, row_slot, positions, scale, out)


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
    scale: float,
    num_splits: int,
    tile: DecodeTile | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`paged_decode` as Triton kernels: one launch, or two with more than one split; `tile` None chooses."""
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("The KV cache of a layer must be contiguous: the kernel derives its strides from its shape.")
    if not 1 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits is {num_splits}; it must be from 1 to {MAX_SPLITS}. Use choose_splits.")
    rows, num_heads, head_dim = query.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    if block_size & (block_size - 1):
        raise ValueError(f"The block size of the KV cache is {block_size}; the kernel needs a power of two.")
    group = num_heads // num_kv_heads
    if tile is None:
        tile = choose_decode_tile(head_dim, group, query.element_size())
    out = torch.empty_like(query) if out is None else out
    if rows == 0:
        return out
    early = launches_early(query)
    partial_out = partial_lse = None
    if num_splits > 1:
        # Under capture these come from the graph's pool: the addresses are the graph's own.
        partial_out = torch.empty((rows, num_heads, num_splits, head_dim), dtype=torch.float32, device=query.device)
        partial_lse = torch.empty((rows, num_heads, num_splits), dtype=torch.float32, device=query.device)
    _decode_kernel[(num_kv_heads, num_splits, rows)](
        query,
        k_cache,
        v_cache,
        block_tables,
        row_slot,
        positions,
        out,
        partial_out,
        partial_lse,
        scale,
        block_tables.stride(0),
        num_splits,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_PADDED=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        BLOCK_N=tile.block_n,
        SPLIT=num_splits > 1,
        EARLY=early,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=early,
    )
    if num_splits > 1:
        _combine_kernel[(num_heads, rows)](
            partial_out,
            partial_lse,
            row_slot,
            positions,
            out,
            num_splits,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            HEAD_DIM_PADDED=triton.next_power_of_2(head_dim),
            SPLITS_PADDED=triton.next_power_of_2(num_splits),
            BLOCK_N=tile.block_n,
            EARLY=early,
            num_warps=4,
            launch_pdl=early,
        )
    return out


@triton.jit
def _share_of_split(context, num_splits, BLOCK_N: tl.constexpr):
    """Tiles of a context, and how many of them each split takes: whole tiles, so the last splits may take none."""
    tiles = tl.cdiv(context, BLOCK_N)
    return tiles, tl.cdiv(tiles, num_splits)


@triton.jit(do_not_specialize=["max_blocks", "num_splits"])
def _decode_kernel(
    query,  # [T, H, D]
    k_cache,  # [num_blocks, KH, BLOCK_SIZE, D]
    v_cache,  # [num_blocks, KH, BLOCK_SIZE, D]
    block_tables,  # [S, max_blocks]
    row_slot,  # [T]
    positions,  # [T]
    out,  # [T, H, D]; not written with SPLIT
    partial_out,  # [T, H, num_splits, D] float32, or None without SPLIT
    partial_lse,  # [T, H, num_splits] float32, base 2, or None without SPLIT
    scale,
    max_blocks,
    num_splits,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: all query heads of one KV head, for one split of one row's context."""
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    slot = tl.load(row_slot + row).to(tl.int64)
    context = tl.load(positions + row) + 1
    tiles, share = _share_of_split(context, num_splits, BLOCK_N)
    first_tile = split * share
    last_tile = tl.minimum(first_tile + share, tiles)
    has_work = (slot >= 0) & (first_tile < tiles)

    # Block and offset of a token, each as a scalar and a part of the lane that is the same in every tile: one of the
    # two sizes divides the other. Blocks come a tile ahead of their keys; beyond the context, the last one once more.
    lanes = tl.arange(0, BLOCK_N)
    table = block_tables + slot * max_blocks
    last_block = (context - 1) // BLOCK_SIZE
    index = tl.minimum(first_tile * BLOCK_N // BLOCK_SIZE + lanes // BLOCK_SIZE, last_block)
    blocks = tl.load(table + index, mask=has_work)
    if EARLY:
        wait_for_predecessor()
    if not has_work:
        return

    members = tl.arange(0, GROUP_PADDED)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    # Row and head of the query, of the output and of the partial results alike.
    row_head = row * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + members
    member_mask = (members < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    queries = tl.load(query + row_head[:, None] * HEAD_DIM + dims[None, :], mask=member_mask, other=0.0)

    highest = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    # Summed over the lanes after the loop: a sum in every tile would be one more exchange between threads.
    lane_totals = tl.zeros([GROUP_PADDED, BLOCK_N], tl.float32)
    accumulator = tl.zeros([GROUP_PADDED, HEAD_DIM_PADDED], tl.float32)
    scale_log2 = scale * 1.4426950408889634
    head_offset = kv_head * (BLOCK_SIZE * HEAD_DIM)
    for tile in range(first_tile, last_tile):
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
    if SPLIT:
        partial_at = row_head * num_splits + split
        tl.store(partial_out + partial_at[:, None] * HEAD_DIM + dims[None, :], result, mask=member_mask)
        tl.store(partial_lse + partial_at, highest + tl.log2(total), mask=members < GROUP)
    else:
        out_at = out + row_head[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_at, result.to(out.dtype.element_ty), mask=member_mask)


@triton.jit(do_not_specialize=["num_splits"])
def _combine_kernel(
    partial_out,  # [T, H, num_splits, D] float32
    partial_lse,  # [T, H, num_splits] float32, base 2
    row_slot,  # [T]
    positions,  # [T]
    out,  # [T, H, D]
    num_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: one head of one row, over the splits that had work; the others wrote nothing."""
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(row_slot + row)
    context = tl.load(positions + row) + 1
    tiles, share = _share_of_split(context, num_splits, BLOCK_N)
    if EARLY:
        wait_for_predecessor()
    if slot < 0:
        return

    splits = tl.arange(0, SPLITS_PADDED)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    worked = splits < tl.cdiv(tiles, share)
    row_head = row * NUM_HEADS + head
    lse = tl.load(partial_lse + row_head * num_splits + splits, mask=worked, other=float("-inf"))
    weights = tl.exp2(lse - tl.max(lse, axis=0))
    partial_at = (row_head * num_splits + splits)[:, None] * HEAD_DIM + dims[None, :]
    partial_mask = worked[:, None] & (dims < HEAD_DIM)[None, :]
    parts = tl.load(partial_out + partial_at, mask=partial_mask, other=0.0)
    result = tl.sum(parts * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    tl.store(out + row_head * HEAD_DIM + dims, result.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
