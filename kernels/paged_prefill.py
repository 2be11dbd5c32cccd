"""Paged attention for prefill and mixed batches: chunks of queries, causal over the KV cache of their slots.

Invariant: the grid is a function of the rows, the entries of `active_slots` and the heads alone; which sequence and
which queries a program serves is found on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from graphexec.kernels.lang import tl, triton, use_triton
from graphexec.kernels.paged_decode import gather_context

__all__ = ["PrefillTile", "choose_prefill_tile", "paged_prefill", "paged_prefill_reference", "paged_prefill_triton"]

SEARCH_WIDTH = 128  # sequences that a program looks at in one step of its search


class PrefillTile(NamedTuple):
    """Rows of the dot products (query tokens times heads of the group), tokens per step, warps, pipeline depth."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_prefill_tile(rows: int, num_heads: int, head_dim: int, element_size: int) -> PrefillTile:
    """The tile for a bucket of `rows` rows: 128 rows of the dot where that still gives 128 programs, else 64.

    The larger tile fills a multiprocessor alone, so it brings a deeper pipeline. float32 multiplies on the ordinary
    cores in IEEE mode, where the registers allow 32 rows.
    """
    if element_size > 2:
        return PrefillTile(block_m=32, block_n=32 if head_dim <= 128 else 16, num_warps=8, num_stages=2)
    block_n = 64 if head_dim <= 128 else 32
    if rows * num_heads >= 128 * 128:
        return PrefillTile(block_m=128, block_n=block_n, num_warps=8, num_stages=5 if head_dim <= 128 else 3)
    return PrefillTile(block_m=64, block_n=block_n, num_warps=4, num_stages=3)


def paged_prefill(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    active_slots: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Causal attention of packed chunks: the j-th query of a slot attends to positions 0..seq_lens[slot] + j.

    FlashAttention-2 (Dao 2023) over a paged cache (PagedAttention, Kwon et al. 2023). The keys and values of the chunks
    themselves are in the cache already (`rope_write`). Chunks of one token and long ones may be mixed.

    Args:
        query: `[T, H, D]`, contiguous; bfloat16, float16 or float32 for the kernel, any float dtype for the reference.
        k_cache, v_cache: `[num_blocks, KH, block_size, D]`, contiguous, the dtype of `query`; H is a multiple of KH,
            block_size is a power of two. Entries beyond a context may hold anything, NaN included.
        block_tables: `[S, max_blocks]` int32, contiguous; entries beyond a context are not read as blocks.
        active_slots: `[B]` int32, the slot of each chunk in the order of the rows; -1 pads the end.
        query_start: `[B + 1]` int32, the first row of each chunk; padding entries repeat the total.
        seq_lens: `[S]` int32, tokens written before this step, by slot.
        scale: factor of the scores, usually D ** -0.5.

    Returns:
        `[T, H, D]` in the dtype and on the device of `query`. Rows from query_start[B] on hold anything.

    Raises:
        ValueError: a cache is not contiguous.
    """
    if use_triton(query):
        return paged_prefill_triton(
            query, k_cache, v_cache, block_tables, active_slots, query_start, seq_lens, scale, tile=None
        )
    return paged_prefill_reference(query, k_cache, v_cache, block_tables, active_slots, query_start, seq_lens, scale)


def paged_prefill_reference(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    active_slots: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`paged_prefill` in plain torch, for any float dtype and device; rows that belong to no chunk are zero.

    Chunk by chunk, so that a chunk's result is bitwise independent of the others.
    """
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = k_cache.shape[1]
    out = torch.zeros_like(query)
    starts = query_start.tolist()
    for index, slot in enumerate(active_slots.tolist()):
        begin, end = starts[index], starts[index + 1]
        if slot < 0 or begin == end:
            continue
        before = int(seq_lens[slot])
        context = before + end - begin
        keys = gather_context(k_cache, block_tables[slot], context)
        values = gather_context(v_cache, block_tables[slot], context)
        # [KH, group, chunk, D]: the group's heads share the keys by broadcasting.
        chunk = (query[begin:end] * scale).view(end - begin, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        scores = chunk @ keys.transpose(1, 2).unsqueeze(1)
        future = torch.ones(end - begin, context, dtype=torch.bool, device=query.device).triu(before + 1)
        weights = torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
        result = weights @ values.unsqueeze(1)
        out[begin:end] = result.permute(2, 0, 1, 3).reshape(end - begin, num_heads, head_dim)
    return out


def paged_prefill_triton(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    active_slots: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    tile: PrefillTile | None = None,
) -> torch.Tensor:
    """`paged_prefill` as one Triton kernel; `tile` None chooses."""
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("The KV cache of a layer must be contiguous: the kernel derives its strides from its shape.")
    rows, num_heads, head_dim = query.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    group = num_heads // num_kv_heads
    if tile is None:
        tile = choose_prefill_tile(rows, num_heads, head_dim, query.element_size())
    block_m = max(16, tile.block_m, triton.next_power_of_2(group))
    block_q = block_m // group
    out = torch.empty_like(query)
    if rows == 0 or active_slots.shape[0] == 0:
        return out
    _prefill_kernel[(num_kv_heads, rows // block_q + active_slots.shape[0])](
        query,
        k_cache,
        v_cache,
        block_tables,
        active_slots,
        query_start,
        seq_lens,
        out,
        scale,
        block_tables.stride(0),
        active_slots.shape[0],
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        BLOCK_M=block_m,
        BLOCK_Q=block_q,
        BLOCK_N=tile.block_n,
        WIDTH=SEARCH_WIDTH,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


@triton.jit
def _attend(
    accumulator,  # [BLOCK_M, D padded] float32
    highest,  # [BLOCK_M] float32
    total,  # [BLOCK_M] float32
    queries,  # [BLOCK_M, D padded]
    last_seen,  # [BLOCK_M]: the last position that a row attends to
    first_tile,
    last_tile,
    context,
    table,  # the slot's row of the block table
    k_head,  # the KV head's entry in block 0
    v_head,
    scale_log2,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Adds the KV tiles first_tile..last_tile to the online softmax; only with DIAGONAL may a row not see a token."""
    dims = tl.arange(0, HEAD_DIM_PADDED)
    for tile in range(first_tile, last_tile):
        tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = tokens < context
        blocks = tl.load(table + tokens // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
        token_at = blocks * (NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM) + (tokens % BLOCK_SIZE) * HEAD_DIM

        key_mask = (dims < HEAD_DIM)[:, None] & valid[None, :]
        keys = tl.load(k_head + token_at[None, :] + dims[:, None], mask=key_mask, other=0.0)
        scores = tl.dot(queries, keys, input_precision="ieee") * scale_log2
        if DIAGONAL:
            scores = tl.where(tokens[None, :] <= last_seen[:, None], scores, float("-inf"))

        # Every row sees position 0, which is in its first tile, so `raised` is finite from there on.
        raised = tl.maximum(highest, tl.max(scores, axis=1))
        rescale = tl.exp2(highest - raised)
        weights = tl.exp2(scores - raised[:, None])
        total = total * rescale + tl.sum(weights, axis=1)
        highest = raised

        # Masked too: a weight of zero does not silence a NaN beyond the context.
        value_mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
        values = tl.load(v_head + token_at[:, None] + dims[None, :], mask=value_mask, other=0.0)
        accumulator = accumulator * rescale[:, None]
        accumulator = tl.dot(weights.to(values.dtype), values, accumulator, input_precision="ieee")
    return accumulator, highest, total


@triton.jit(do_not_specialize=["max_blocks", "num_entries"])
def _prefill_kernel(
    query,  # [T, H, D]
    k_cache,  # [num_blocks, KH, BLOCK_SIZE, D]
    v_cache,  # [num_blocks, KH, BLOCK_SIZE, D]
    block_tables,  # [S, max_blocks]
    active_slots,  # [B]
    query_start,  # [B + 1]
    seq_lens,  # [S]
    out,  # [T, H, D]
    scale,
    max_blocks,
    num_entries,  # B
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: BLOCK_Q query tokens of one sequence times the query heads of one KV head."""
    kv_head = tl.program_id(0)
    # Backwards, so that the tiles with the longest contexts start first and the short ones fill the tail.
    q_tile = tl.num_programs(1) - 1 - tl.program_id(1)

    # Sequence i starts at tile query_start[i] // BLOCK_Q + i, which leaves each room for its last, partial tile. The
    # starts ascend strictly, so the sequence of this tile is the number of starts up to it, less one.
    started = 0
    for base in range(0, num_entries, WIDTH):
        entries = base + tl.arange(0, WIDTH)
        starts = tl.load(query_start + entries, mask=entries < num_entries, other=0)
        reached = (entries < num_entries) & (starts // BLOCK_Q + entries <= q_tile)
        started += tl.sum(reached.to(tl.int32), axis=0)
    entry = started - 1
    slot = tl.load(active_slots + entry).to(tl.int64)
    if slot < 0:
        return
    begin = tl.load(query_start + entry)
    length = tl.load(query_start + entry + 1) - begin
    first = (q_tile - begin // BLOCK_Q - entry) * BLOCK_Q
    if first >= length:
        return
    before = tl.load(seq_lens + slot)
    context = before + tl.minimum(first + BLOCK_Q, length)

    # Row m of the dot is query token m // GROUP of the tile, head m % GROUP of the group; without tl.dot's power of two
    # some rows at the end are left over.
    stacked = tl.arange(0, BLOCK_M)
    token = first + stacked // GROUP
    dims = tl.arange(0, HEAD_DIM_PADDED)
    row_head = (begin + token).to(tl.int64) * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + stacked % GROUP
    row_mask = (stacked < BLOCK_Q * GROUP) & (token < length)
    mask = row_mask[:, None] & (dims < HEAD_DIM)[None, :]
    queries = tl.load(query + row_head[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, HEAD_DIM_PADDED], tl.float32)
    scale_log2 = scale * 1.4426950408889634
    table = block_tables + slot * max_blocks
    k_head = k_cache + kv_head * (BLOCK_SIZE * HEAD_DIM)
    v_head = v_cache + kv_head * (BLOCK_SIZE * HEAD_DIM)
    # Tiles that the first query sees whole are seen whole by all of them.
    whole_tiles = (before + first + 1) // BLOCK_N
    accumulator, highest, total = _attend(
        accumulator,
        highest,
        total,
        queries,
        before + token,
        0,
        whole_tiles,
        context,
        table,
        k_head,
        v_head,
        scale_log2,
        NUM_KV_HEADS,
        HEAD_DIM,
        HEAD_DIM_PADDED,
        BLOCK_SIZE,
        BLOCK_N,
        False,
    )
    accumulator, highest, total = _attend(
        accumulator,
        highest,
        total,
        queries,
        before + token,
        whole_tiles,
        tl.cdiv(context, BLOCK_N),
        context,
        table,
        k_head,
        v_head,
        scale_log2,
        NUM_KV_HEADS,
        HEAD_DIM,
        HEAD_DIM_PADDED,
        BLOCK_SIZE,
        BLOCK_N,
        True,
    )
    result = accumulator / total[:, None]
    tl.store(out + row_head[:, None] * HEAD_DIM + dims[None, :], result.to(out.dtype.element_ty), mask=mask)
