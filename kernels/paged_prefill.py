"""Paged attention for prompt chunks: many queries of one sequence, causal over the KV cache of its slot.

Invariant: the grid is a function of the rows, the entries of `chunk_slots` and the heads alone. Which sequence and
which queries a program serves it finds on the device, and programs take work until none is left: a launch costs what
the chunks cost that are really there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from graphexec.kernels.lang import Launch, launches_early, multiprocessors, tl, triton, use_triton, wait_for_predecessor
from graphexec.kernels.paged_decode import gather_context

__all__ = ["PrefillTile", "choose_prefill_tile", "paged_prefill", "paged_prefill_reference", "paged_prefill_triton"]

SEARCH_WIDTH = 128  # sequences that a program looks at in one step of its search


class PrefillTile(NamedTuple):
    """How a program works.

    Attributes:
        block_m: rows of the dot products, query tokens times heads of the group.
        block_n: keys of a step.
        num_warps: its warps.
        num_stages: depth of its software pipeline.
        programs_per_sm: as many as fit on a multiprocessor at the same time.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


def choose_prefill_tile(rows: int, num_heads: int, head_dim: int, element_size: int) -> PrefillTile:
    """The tile for a bucket of `rows` rows: 128 rows of the dot where that gives every multiprocessor two, else 64.

    The larger tile fills a multiprocessor alone; two of the smaller share one, and what one multiplies hides what the
    other exponentiates. float32 multiplies on the ordinary cores in IEEE mode, where the registers allow 32 rows.
    """
    if element_size > 2:
        return PrefillTile(32, 32 if head_dim <= 128 else 16, num_warps=8, num_stages=2, programs_per_sm=2)
    if head_dim > 128:
        return PrefillTile(64, 32, num_warps=4, num_stages=2, programs_per_sm=2)
    if rows * num_heads >= 256 * 128:
        return PrefillTile(128, 64, num_warps=8, num_stages=3, programs_per_sm=1)
    return PrefillTile(64, 64, num_warps=4, num_stages=3, programs_per_sm=2)


def paged_prefill(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    chunk_slots: torch.Tensor,
    chunk_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    tickets: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of packed chunks: the j-th query of a slot attends to positions 0..seq_lens[slot] + j.

    FlashAttention-2 (Dao 2023) over a paged cache (PagedAttention, Kwon et al. 2023). The keys and values of the chunks
    themselves are in the cache already (`rope_write`). Chunks of one token and long ones may be mixed.

    Args:
        query: `[T, H, D]`, contiguous; bfloat16, float16 or float32 for the kernel, any float dtype for the reference.
        k_cache, v_cache: `[num_blocks, KH, block_size, D]`, contiguous, the dtype of `query`; H is a multiple of KH,
            block_size is a power of two. Entries beyond a context may hold anything, NaN included.
        block_tables: `[S, max_blocks]` int32, contiguous; entries beyond a context are not read as blocks. Like the
            other integers written at least two launches earlier: see `wait_for_predecessor`.
        chunk_slots: `[B]` int32, the slot of each chunk in the order of the rows; -1 pads the end.
        chunk_start: `[B + 1]` int32, the first row of each chunk; padding entries repeat the end of the last. Rows in
            front of the first chunk are left alone.
        seq_lens: `[S]` int32, tokens written before this step, by slot.
        scale: factor of the scores, usually D ** -0.5.
        tickets: `[2]` int32 zeros, which the launch leaves zero; not for two launches that may overlap.
        out: like `query`, contiguous, to write into; rows of no chunk keep what they hold. None for new memory.

    Returns:
        `out`: `[T, H, D]` in the dtype and on the device of `query`. In new memory, rows of no chunk hold anything.

    Raises:
        ValueError: a cache is not contiguous, or block_size is no power of two.
    """
    if out is None:
        out = torch.empty_like(query) if use_triton(query) else torch.zeros_like(query)
    where = block_tables, chunk_slots, chunk_start, seq_lens
    paged_prefill_call(query, k_cache, v_cache, *where, scale, tickets, out)()
    return out


def paged_prefill_call(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    chunk_slots: torch.Tensor,
    chunk_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    tickets: torch.Tensor,
    out: torch.Tensor,
) -> Launch | Callable[[], object]:
    """`paged_prefill` as a call that may be made more than once."""
    where = block_tables, chunk_slots, chunk_start, seq_lens, scale
    if not use_triton(query):
        return partial(paged_prefill_reference, query, k_cache, v_cache, *where, out)
    return paged_prefill_launch(query, k_cache, v_cache, *where, tickets, None, out)


def paged_prefill_reference(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    chunk_slots: torch.Tensor,
    chunk_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`paged_prefill` in plain torch, for any float dtype and device; rows of no chunk are zero in new memory.

    Chunk by chunk, so that a chunk's result is bitwise independent of the others.
    """
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = k_cache.shape[1]
    out = torch.zeros_like(query) if out is None else out
    starts = chunk_start.tolist()
    for index, slot in enumerate(chunk_slots.tolist()):
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
    chunk_slots: torch.Tensor,
    chunk_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    tickets: torch.Tensor,
    tile: PrefillTile | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`paged_prefill` as one Triton kernel; `tile` None chooses."""
    out = torch.empty_like(query) if out is None else out
    if len(query) == 0 or len(chunk_slots) == 0:
        return out
    where = block_tables, chunk_slots, chunk_start, seq_lens
    paged_prefill_launch(query, k_cache, v_cache, *where, scale, tickets, tile, out)()
    return out


def paged_prefill_launch(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    chunk_slots: torch.Tensor,
    chunk_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    tickets: torch.Tensor,
    tile: PrefillTile | None,
    out: torch.Tensor,
) -> Launch:
    """The launch of `paged_prefill_triton`."""
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("The KV cache of a layer must be contiguous: the kernel derives its strides from its shape.")
    rows, num_heads, head_dim = query.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    if block_size & (block_size - 1):
        raise ValueError(f"The block size of the KV cache is {block_size}; the kernel needs a power of two.")
    group, entries = num_heads // num_kv_heads, chunk_slots.shape[0]
    if tile is None:
        tile = choose_prefill_tile(rows, num_heads, head_dim, query.element_size())
    block_m = max(16, tile.block_m, triton.next_power_of_2(group))
    block_q = block_m // group
    early = launches_early(query)
    most = num_kv_heads * (rows // block_q + entries)  # each chunk may end in a tile that it does not fill
    programs = min(most, tile.programs_per_sm * multiprocessors(query))
    arguments = {
        "query": query,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_tables": block_tables,
        "chunk_slots": chunk_slots,
        "chunk_start": chunk_start,
        "seq_lens": seq_lens,
        "tickets": tickets,
        "out": out,
        "scale": scale,
        "max_blocks": block_tables.stride(0),
        "num_entries": entries,
        "programs": programs,
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_PADDED": triton.next_power_of_2(head_dim),
        "BLOCK_SIZE": block_size,
        "BLOCK_M": block_m,
        "BLOCK_Q": block_q,
        "BLOCK_N": tile.block_n,
        "WIDTH": SEARCH_WIDTH,
        "EARLY": early,
    }
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "launch_pdl": early}
    return Launch(_prefill_kernel, (programs,), arguments, options)


@triton.jit
def _attend(
    accumulator,  # [BLOCK_M, D padded] float32
    highest,  # [BLOCK_M] float32, base 2
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
    lanes = tl.arange(0, BLOCK_N)
    # Blocks come a tile ahead of their keys; beyond the context, the last one once more.
    last_block = (context - 1) // BLOCK_SIZE
    blocks = tl.load(table + tl.minimum(first_tile * BLOCK_N // BLOCK_SIZE + lanes // BLOCK_SIZE, last_block))
    for tile in range(first_tile, last_tile):
        first = tile * BLOCK_N
        offsets = first % BLOCK_SIZE * HEAD_DIM + lanes % BLOCK_SIZE * HEAD_DIM
        token_at = blocks.to(tl.int64) * (NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM) + offsets
        blocks = tl.load(table + tl.minimum((first + BLOCK_N) // BLOCK_SIZE + lanes // BLOCK_SIZE, last_block))

        if HEAD_DIM == HEAD_DIM_PADDED:
            keys = tl.load(k_head + token_at[None, :] + dims[:, None])
        else:
            keys = tl.load(k_head + token_at[None, :] + dims[:, None], mask=(dims < HEAD_DIM)[:, None], other=0.0)
        scores = tl.dot(queries, keys, input_precision="ieee")
        if DIAGONAL:
            scores = tl.where((first + lanes)[None, :] <= last_seen[:, None], scores, float("-inf"))

        # Every row sees position 0, which is in its first tile, so `raised` is finite from there on. The scale is a
        # factor of the difference, not of the scores: one instruction does both. It is positive, so the highest score
        # stays the highest.
        raised = tl.maximum(highest, tl.max(scores, axis=1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - raised[:, None])
        rescale = tl.exp2(highest - raised)
        total = total * rescale + tl.sum(weights, axis=1)
        highest = raised

        # Masked behind the context, unlike the keys: a weight of zero does not silence a NaN.
        value_at = v_head + token_at[:, None] + dims[None, :]
        if DIAGONAL:
            value_mask = (first + lanes < context)[:, None] & (dims < HEAD_DIM)[None, :]
            values = tl.load(value_at, mask=value_mask, other=0.0)
        elif HEAD_DIM == HEAD_DIM_PADDED:
            values = tl.load(value_at)
        else:
            values = tl.load(value_at, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        accumulator = accumulator * rescale[:, None]
        accumulator = tl.dot(weights.to(values.dtype), values, accumulator, input_precision="ieee")
    return accumulator, highest, total


@triton.jit(do_not_specialize=["max_blocks", "num_entries", "programs"])
def _prefill_kernel(
    query,  # [T, H, D]
    k_cache,  # [num_blocks, KH, BLOCK_SIZE, D]
    v_cache,  # [num_blocks, KH, BLOCK_SIZE, D]
    block_tables,  # [S, max_blocks]
    chunk_slots,  # [B]
    chunk_start,  # [B + 1]
    seq_lens,  # [S]
    tickets,  # [2]: work taken beyond the first of each program, and programs that have ended
    out,  # [T, H, D]
    scale,
    max_blocks,
    num_entries,  # B
    programs,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One piece of work: BLOCK_Q query tokens of one sequence times the query heads of one KV head."""
    program = tl.program_id(0)
    # Sequence i starts at tile start[i] // BLOCK_Q + i, counted from the first chunk's row, which leaves each room for
    # its last, partial tile. The starts ascend strictly, so the sequence of a tile is the number of starts up to it,
    # less one.
    first_row = tl.load(chunk_start)
    rows = tl.load(chunk_start + num_entries) - first_row
    chunks = 0
    for base in range(0, num_entries, WIDTH):
        entries = base + tl.arange(0, WIDTH)
        chunks += tl.sum((tl.load(chunk_slots + entries, mask=entries < num_entries, other=-1) >= 0).to(tl.int32))
    tiles = tl.where(chunks > 0, rows // BLOCK_Q + chunks, 0)
    work = tiles * NUM_KV_HEADS
    if EARLY:
        wait_for_predecessor()

    item = program
    while item < work:
        kv_head = item % NUM_KV_HEADS
        # Backwards, so that the tiles with the longest contexts are taken first and the short ones fill the tail.
        q_tile = tiles - 1 - item // NUM_KV_HEADS
        item = work
        if work > programs:
            item = programs + tl.atomic_add(tickets, 1, sem="relaxed")

        started = 0
        for base in range(0, chunks, WIDTH):
            entries = base + tl.arange(0, WIDTH)
            starts = tl.load(chunk_start + entries, mask=entries < chunks, other=0) - first_row
            reached = (entries < chunks) & (starts // BLOCK_Q + entries <= q_tile)
            started += tl.sum(reached.to(tl.int32))
        entry = started - 1
        begin = tl.load(chunk_start + entry)
        length = tl.load(chunk_start + entry + 1) - begin
        first = (q_tile - (begin - first_row) // BLOCK_Q - entry) * BLOCK_Q
        if first < length:
            slot = tl.load(chunk_slots + entry).to(tl.int64)
            before = tl.load(seq_lens + slot)
            context = before + tl.minimum(first + BLOCK_Q, length)

            # Row m of the dot is query token m // GROUP of the tile, head m % GROUP of the group; without tl.dot's
            # power of two some rows at the end are left over.
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

    # Who ends last has seen every ticket taken, and lays them back for the next launch.
    if work > programs:
        ended = tl.atomic_add(tickets + 1, 1)
        if ended == programs - 1:
            tl.store(tickets, 0)
            tl.store(tickets + 1, 0)
