"""The attention kernels on the device, in every dtype they serve."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphexec.kernels.paged_decode import (
    DecodeSplits,
    DecodeWorkspace,
    paged_decode,
    paged_decode_triton,
    split_starts,
)
from graphexec.kernels.paged_prefill import PrefillTile
from graphexec.kernels.rope_write import rope_write
from tests.support.attention_cases import (
    SHAPES,
    TOLERANCE,
    AttentionCase,
    HeadShape,
    Step,
    attention_cases,
    check_decode,
    check_prefill,
    check_rope_write,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

some = settings(max_examples=40, deadline=None)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALL = HeadShape(num_kv_heads=2, group=2, head_dim=128, block_size=16)
NO_ACTIVE_ROWS = AttentionCase(SMALL, torch.bfloat16, slots=(None, None), padding=3)


@some
@given(
    case=attention_cases(DTYPES, longest_context=900, longest_chunk=3),
    size=st.sampled_from([1, 3, 100]),
)
@example(case=NO_ACTIVE_ROWS, size=1)
def test_decode_matches_dense_attention(case: AttentionCase, size: int) -> None:
    check_decode(case, "cuda", size)


@some
@given(case=attention_cases(DTYPES, longest_context=300, longest_chunk=100))
@example(case=NO_ACTIVE_ROWS)
def test_prefill_matches_dense_attention(case: AttentionCase) -> None:
    check_prefill(case, "cuda")


@pytest.mark.parametrize(
    "tile", [PrefillTile(128, 64, 8, 3, 1), PrefillTile(64, 64, 4, 3, 2), PrefillTile(16, 32, 4, 2, 4)]
)
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_prefill_matches_dense_attention_with_every_tile(shape: HeadShape, tile: tuple[int, ...]) -> None:
    slots = ((70, 1), (0, 133), None, (5, 1), (431, 90))
    check_prefill(AttentionCase(shape, torch.bfloat16, slots, padding=2), "cuda", PrefillTile(*tile))


@some
@given(case=attention_cases(DTYPES, longest_context=100, longest_chunk=20), with_norm=st.booleans())
@example(case=NO_ACTIVE_ROWS, with_norm=True)
def test_rope_write_matches_the_reference(case: AttentionCase, with_norm: bool) -> None:
    check_rope_write(case, "cuda", with_norm)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_program_without_work_leaves_no_trace(dtype: torch.dtype) -> None:
    check_decode(AttentionCase(SMALL, dtype, slots=(None, (0, 1), None, (40, 1)), padding=1), "cuda", size=1)


@pytest.mark.parametrize(("size", "most"), [(1, 32), (2, 128), (7, 3)])
def test_splits_meet_whoever_ends_last(size: int, most: int) -> None:
    """More pieces of work than programs, and contexts so different that the splits of a row end in any order."""
    slots = tuple((37 * index**2 % 4001, 1) for index in range(150))
    check_decode(AttentionCase(SMALL, torch.bfloat16, slots, padding=2), "cuda", size, most)


def test_a_captured_launch_serves_other_contexts_and_fewer_rows() -> None:
    """The grid must hold no host number that depends on the context."""
    case = AttentionCase(SMALL, torch.bfloat16, slots=((700, 1), (3, 1), (250, 1)))
    step = Step(case, "cuda")

    splits = DecodeSplits(32, size=1, most=8)
    where, how = step.decode_work(splits)
    start = where[-1]

    def launch() -> torch.Tensor:
        return paged_decode(step.query, step.k_cache, step.v_cache, *where, step.scale, *how)

    real_positions = step.positions.clone()
    step.positions.zero_()
    start.copy_(split_starts(step.row_slot, step.positions, splits))
    launch()  # compiles outside of capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch()
    step.positions.copy_(real_positions)
    start.copy_(split_starts(step.row_slot, step.positions, splits))
    graph.replay()
    torch.cuda.synchronize()
    step.assert_right(out, TOLERANCE[case.dtype])

    out.fill_(float("nan"))
    step.row_slot[1:] = -1
    start.copy_(split_starts(step.row_slot, step.positions, splits))
    graph.replay()
    torch.cuda.synchronize()
    step.rows = 1
    step.assert_right(out, TOLERANCE[case.dtype])
    step.assert_padding_untouched(out)


@pytest.mark.parametrize("size", [1, 100])
def test_launches_that_begin_early_leave_what_launches_one_at_a_time_leave(size: int) -> None:
    """Thirty layers, each of which reads at once what the launch in front of it has just written."""
    rows, layers, block_size = 64, 30, 16
    num_heads, num_kv_heads, head_dim = 16, 8, 128
    device, dtype = torch.device("cuda"), torch.bfloat16
    random = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random, device=device, dtype=dtype)

    positions = torch.arange(rows, dtype=torch.int32, device=device) * 7
    blocks_each = 7 * rows // block_size + 1
    tables = 1 + torch.randperm(rows * blocks_each, device=device, generator=random).view(rows, -1).int()
    row_slot = torch.arange(rows, dtype=torch.int32, device=device)
    last_blocks = tables.gather(1, (positions // block_size).long()[:, None])[:, 0]
    kv_slots = last_blocks.long() * block_size + positions % block_size
    caches = [normal(2, rows * blocks_each + 1, num_kv_heads, block_size, head_dim) for _ in range(layers)]
    clean = [cache.clone() for cache in caches]
    width, inner = num_heads * head_dim, (num_heads + 2 * num_kv_heads) * head_dim
    hidden, into = normal(rows, width), normal(width, inner) * width**-0.5
    cos, sin, norm = normal(rows, head_dim), normal(rows, head_dim), normal(head_dim)

    splits = DecodeSplits(32, size, most=32)
    where = tables, row_slot, positions, split_starts(row_slot, positions, splits)
    workspace = DecodeWorkspace.allocate(rows, int(where[-1][-1]), num_heads, num_kv_heads, head_dim, device)

    def run(after_each: Callable[[], None]) -> torch.Tensor:
        x = hidden
        for k_cache, v_cache in caches:
            qkv = x @ into
            after_each()
            query = rope_write(qkv, cos, sin, norm, norm, 1e-6, k_cache, v_cache, kv_slots, num_heads)
            after_each()
            x = paged_decode(query, k_cache, v_cache, *where, head_dim**-0.5, splits, workspace)
            x = x.flatten(1)
            after_each()
        return x

    expected = run(torch.cuda.synchronize).clone()
    written = [cache.clone() for cache in caches]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(lambda: None)
    for _ in range(5):
        for cache, before in zip(caches, clean, strict=True):
            cache.copy_(before)
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
        assert all(torch.equal(cache, after) for cache, after in zip(caches, written, strict=True))


def test_a_row_is_bitwise_the_same_alone_and_in_a_crowd() -> None:
    """In one bucket with one rule for splits: what decides a row's arithmetic is its own context."""
    slots = tuple((97 * index, 1) for index in range(8))
    step = Step(AttentionCase(SMALL, torch.bfloat16, slots), "cuda")

    splits = DecodeSplits(32, size=2, most=32)
    _, how = step.decode_work(splits)

    def launch(row_slot: torch.Tensor) -> torch.Tensor:
        where = step.block_tables, row_slot, step.positions, split_starts(row_slot, step.positions, splits)
        return paged_decode_triton(step.query, step.k_cache, step.v_cache, *where, step.scale, *how)

    crowd = launch(step.row_slot)
    for row in range(step.rows):
        # Padding comes last: the row moves to the front.
        query = step.query.roll(-row, 0)
        alone = torch.full_like(step.row_slot, -1)
        alone[0] = step.row_slot[row]
        positions = step.positions.roll(-row)
        where = step.block_tables, alone, positions, split_starts(alone, positions, splits)
        torch.cuda.synchronize()  # the kernel may read its rows before a launch in front of it has ended
        result = paged_decode_triton(query, step.k_cache, step.v_cache, *where, step.scale, *how)
        assert torch.equal(result[0], crowd[row])
