"""The attention kernels under Triton's interpreter, and their references, on the CPU.

The interpreter multiplies bfloat16 matrices as if their bits were integers, and truncates where the hardware rounds to
bfloat16, so 16 bits means float16 here; tests/gpu runs the same checks in bfloat16.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphexec.kernels.paged_decode import (
    DecodeSplits,
    DecodeTile,
    choose_decode_splits,
    choose_decode_tile,
    paged_decode,
    paged_decode_reference,
    paged_decode_triton,
)
from graphexec.kernels.paged_prefill import (
    PrefillTile,
    paged_prefill,
    paged_prefill_reference,
    paged_prefill_triton,
)
from graphexec.kernels.rope_write import rope_write, rope_write_reference, rope_write_triton
from tests.support.attention_cases import (
    SHAPES,
    AttentionCase,
    HeadShape,
    Step,
    attention_cases,
    check_decode,
    check_prefill,
    check_rope_write,
)

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="runs kernels on the CPU, under TRITON_INTERPRET=1; tests/gpu has the same checks for the device",
)
few = settings(max_examples=20, deadline=None)
DTYPES = (torch.float16, torch.float32)
SMALL = HeadShape(num_kv_heads=2, group=2, head_dim=64, block_size=8)
NO_ACTIVE_ROWS = AttentionCase(SMALL, torch.float32, slots=(None, None), padding=3)
NO_ROWS = AttentionCase(SMALL, torch.float32, slots=(None,))
ONE_TOKEN_AMONG_HOLES = AttentionCase(SMALL, torch.float32, slots=(None, (0, 1), None), padding=1)


@interpreted
@few
@given(
    case=attention_cases(DTYPES, longest_context=200, longest_chunk=2),
    size=st.sampled_from([1, 2, 100]),
    most=st.sampled_from([1, 3, 32]),
    tile=st.sampled_from([None, DecodeTile(block_n=16, num_warps=4, num_stages=3)]),
)
@example(case=NO_ACTIVE_ROWS, size=1, most=4, tile=None)
@example(case=NO_ROWS, size=1, most=1, tile=None)
def test_decode_matches_dense_attention(case: AttentionCase, size: int, most: int, tile: DecodeTile | None) -> None:
    check_decode(case, "cpu", size, most, tile)


@interpreted
@few
@given(
    case=attention_cases(DTYPES, longest_context=80, longest_chunk=40),
    tile=st.sampled_from([None, PrefillTile(16, 16, num_warps=4, num_stages=2, programs_per_sm=1)]),
)
@example(case=NO_ACTIVE_ROWS, tile=None)
@example(case=NO_ROWS, tile=None)
def test_prefill_matches_dense_attention(case: AttentionCase, tile: PrefillTile | None) -> None:
    check_prefill(case, "cpu", tile)


@interpreted
@few
@given(case=attention_cases(DTYPES, longest_context=40, longest_chunk=4), with_norm=st.booleans())
@example(case=NO_ACTIVE_ROWS, with_norm=True)
@example(case=NO_ROWS, with_norm=False)
def test_rope_write_matches_the_reference(case: AttentionCase, with_norm: bool) -> None:
    check_rope_write(case, "cpu", with_norm)


@interpreted
@pytest.mark.parametrize("size", [1.0, 1e-3])  # where the norm's epsilon is nothing, and where it decides
def test_rope_write_rounds_where_the_reference_rounds(size: float) -> None:
    rows, num_heads, num_kv_heads, head_dim = 5, 4, 2, 64
    random = torch.Generator().manual_seed(0)
    qkv = (size * torch.randn(rows, (num_heads + 2 * num_kv_heads) * head_dim, generator=random)).half()
    angles = torch.arange(rows)[:, None] * torch.rand(head_dim, generator=random)
    cos, sin = angles.cos().half(), angles.sin().half()
    norms = [torch.rand(head_dim, generator=random).half() + 0.5 for _ in range(2)]
    results = []
    for function in (rope_write_reference, rope_write_triton):
        caches = [torch.zeros(2, num_kv_heads, 8, head_dim).half() for _ in range(2)]
        query = function(qkv, cos, sin, *norms, 1e-6, *caches, torch.arange(8, 8 + rows), num_heads)
        results.append([query, *caches])
    assert all(torch.equal(expected, actual) for expected, actual in zip(*results, strict=True))


@interpreted
def test_padding_rows_write_nowhere() -> None:
    case = AttentionCase(SMALL, torch.float32, slots=((9, 2), None), padding=3)
    check_decode(case, "cpu", size=100)
    check_decode(case, "cpu", size=1)
    check_prefill(case, "cpu")
    check_rope_write(case, "cpu", with_norm=True)


@interpreted
def test_a_program_without_work_leaves_no_trace() -> None:
    check_decode(ONE_TOKEN_AMONG_HOLES, "cpu", size=1)


@interpreted
def test_decode_searches_beyond_its_first_window() -> None:
    slots = tuple((index % 3, 1) for index in range(140))
    check_decode(AttentionCase(SHAPES[0], torch.float32, slots, padding=1), "cpu", size=1)


@interpreted
def test_prefill_mixes_single_tokens_with_long_chunks() -> None:
    slots = ((70, 1), (0, 33), None, (5, 1), (31, 40))
    check_prefill(AttentionCase(SHAPES[3], torch.float32, slots, padding=2), "cpu", PrefillTile(16, 16, 4, 2, 2))


@interpreted
def test_prefill_searches_beyond_its_first_window() -> None:
    slots = tuple((index % 3, 1) for index in range(140))
    check_prefill(AttentionCase(SHAPES[0], torch.float32, slots, padding=1), "cpu", PrefillTile(16, 16, 4, 2, 2))


@interpreted
def test_a_block_size_that_is_no_power_of_two_is_refused() -> None:
    step = Step(ONE_TOKEN_AMONG_HOLES, "cpu")
    cache = torch.zeros(3, 2, 12, 64)
    where, how = step.decode_work(DecodeSplits(32, 1, 1))
    with pytest.raises(ValueError, match="12; the kernel needs a power of two"):
        paged_decode_triton(step.query, cache, cache, *where, step.scale, *how)
    where = step.block_tables, step.chunk_slots, step.chunk_start, step.seq_lens, step.scale
    with pytest.raises(ValueError, match="12; the kernel needs a power of two"):
        paged_prefill_triton(step.query, cache, cache, *where, torch.zeros(2, dtype=torch.int32))


@settings(max_examples=30, deadline=None)
@given(case=attention_cases((torch.float64,), longest_context=200, longest_chunk=12))
def test_references_match_dense_attention(case: AttentionCase) -> None:
    step = Step(case, "cpu")
    where, how = step.decode_work(DecodeSplits(32, 1, 4))
    decoded = paged_decode(*step.wide, *where, step.scale, *how)
    step.assert_right(decoded, 1e-12)
    where = step.block_tables, step.chunk_slots, step.chunk_start, step.seq_lens, step.scale
    chunked = paged_prefill(*step.wide, *where, torch.zeros(2, dtype=torch.int32))
    step.assert_right(chunked, 1e-12)


@settings(max_examples=30, deadline=None)
@given(case=attention_cases((torch.float64,), longest_context=200, longest_chunk=8))
def test_batch_mates_do_not_change_a_row(case: AttentionCase) -> None:
    step = Step(case, "cpu")
    decoded = paged_decode_reference(*step.wide, step.block_tables, step.row_slot, step.positions, step.scale)
    chunked = paged_prefill_reference(
        *step.wide, step.block_tables, step.chunk_slots, step.chunk_start, step.seq_lens, step.scale
    )
    query, *caches = step.wide
    for index, slot in enumerate(step.order):
        mine = slice(int(step.chunk_start[index]), int(step.chunk_start[index + 1]))
        row = mine.start
        alone = paged_decode_reference(
            query[row : row + 1],
            *caches,
            step.block_tables,
            step.row_slot[row : row + 1],
            step.positions[row : row + 1],
            step.scale,
        )
        torch.testing.assert_close(alone[0], decoded[row], rtol=1e-12, atol=1e-12)
        start = torch.tensor([0, mine.stop - mine.start], dtype=torch.int32)
        alone = paged_prefill_reference(
            query[mine], *caches, step.block_tables, torch.tensor([slot]), start, step.seq_lens, step.scale
        )
        torch.testing.assert_close(alone, chunked[mine], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_write_computes_what_qwen3_computes(dtype: torch.dtype) -> None:
    qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    rows, num_heads, num_kv_heads, head_dim = 5, 4, 2, 64
    qkv = torch.randn(rows, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    angles = (torch.arange(rows)[:, None] * torch.rand(head_dim // 2)).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    q_norm, k_norm = qwen3.Qwen3RMSNorm(head_dim).to(dtype), qwen3.Qwen3RMSNorm(head_dim).to(dtype)
    weights = [torch.rand(head_dim).to(dtype) + 0.5 for _ in range(2)]
    q_norm.weight.data, k_norm.weight.data = weights
    k_cache, v_cache = torch.zeros(2, num_kv_heads, 8, head_dim, dtype=dtype).repeat(2, 1, 1, 1, 1)
    kv_slots = torch.arange(8, 8 + rows)

    query = rope_write(
        qkv, cos, sin, *weights, q_norm.variance_epsilon, k_cache, v_cache, kv_slots, num_heads=num_heads
    )

    heads = qkv.view(1, rows, -1, head_dim)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=2)
    with torch.no_grad():
        q, k = qwen3.apply_rotary_pos_emb(q_norm(q), k_norm(k), cos[None], sin[None], unsqueeze_dim=2)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(query, q[0], **close)
    torch.testing.assert_close(k_cache[1, :, :rows].transpose(0, 1), k[0], **close)
    assert torch.equal(v_cache[1, :, :rows].transpose(0, 1), v[0])
    assert not k_cache[0].any()


def test_rope_write_refuses_a_projection_of_the_wrong_width() -> None:
    cache = torch.zeros(2, 2, 8, 64)
    angles = torch.zeros(1, 64)
    with pytest.raises(ValueError, match="columns"):
        rope_write(
            torch.zeros(1, 7 * 64), angles, angles, None, None, 0.0, cache, cache, torch.tensor([8]), num_heads=4
        )


def test_rope_write_leaves_the_cache_alone_when_all_rows_are_padding() -> None:
    cache = torch.full((2, 2, 8, 64), 7.0)
    angles = torch.zeros(3, 64)
    slots = torch.full((3,), -1)
    rope_write_reference(torch.zeros(3, 8 * 64), angles, angles, None, None, 0.0, cache, cache, slots, num_heads=4)
    assert (cache == 7.0).all()


@given(
    context=st.integers(1, 100_000), tile=st.sampled_from([16, 32]), size=st.integers(1, 40), most=st.integers(1, 40)
)
def test_splits_cover_a_context_and_are_neither_short_nor_many(context: int, tile: int, size: int, most: int) -> None:
    tiles = -(-context // tile)
    splits = int(DecodeSplits(tile, size, most).of(torch.tensor(context)))
    assert 1 <= splits <= most
    share = -(-tiles // splits)
    assert tiles > (splits - 1) * share, "the last one has a part of its own"
    assert splits == 1 or share > size // 2
    if tiles <= most * size:
        assert share <= 3 * size // 2 + 1


def test_on_an_h200_the_splits_of_contexts_of_500_tokens_fill_the_device() -> None:
    context = torch.tensor(500)
    counts = [
        rows * 8 * int(choose_decode_splits(rows, num_kv_heads=8, tile=32).of(context)) for rows in (8, 16, 64, 256)
    ]
    assert counts == [512, 512, 512, 2048]  # of 1,056 programs that fit at the same time


@given(rows=st.integers(1, 4096), context=st.integers(1, 200_000))
def test_the_splits_of_all_rows_have_a_limit(rows: int, context: int) -> None:
    assert rows * int(choose_decode_splits(rows, 8, 32).of(torch.tensor(context))) <= 8192


@pytest.mark.parametrize(
    ("head_dim", "group", "element_size", "tile"),
    [
        (128, 2, 2, (32, 1, 2)),
        (128, 16, 2, (32, 1, 2)),
        (80, 4, 2, (32, 1, 2)),
        (64, 1, 2, (64, 1, 2)),
        (128, 17, 2, (64, 4, 2)),  # does not fit into the registers of one warp
        (256, 2, 2, (32, 4, 2)),
        (128, 2, 4, (32, 8, 2)),
        (256, 2, 4, (16, 8, 2)),
    ],
)
def test_a_tile_is_what_was_measured_or_fits(
    head_dim: int, group: int, element_size: int, tile: tuple[int, int, int]
) -> None:
    assert choose_decode_tile(head_dim, group, element_size) == DecodeTile(*tile)
