"""Cases and checks for the attention kernels, for any device: caches full of NaN except where a context lies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from graphexec.kernels.paged_decode import (
    MOST_SPLITS,
    DecodeSplits,
    DecodeTile,
    DecodeWorkspace,
    choose_decode_tile,
    paged_decode_reference,
    paged_decode_triton,
    split_starts,
)
from graphexec.kernels.paged_prefill import PrefillTile, paged_prefill_reference, paged_prefill_triton
from graphexec.kernels.rope_write import rope_write_reference, rope_write_triton

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-5}
NOWHERE = (-1, 2**30)  # what block tables hold beyond a context; following either is out of range


class HeadShape(NamedTuple):
    """Heads and cache layout: what a kernel is compiled for."""

    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int


SHAPES = (
    HeadShape(num_kv_heads=2, group=1, head_dim=64, block_size=16),
    HeadShape(num_kv_heads=2, group=2, head_dim=128, block_size=16),
    HeadShape(num_kv_heads=1, group=8, head_dim=128, block_size=8),
    HeadShape(num_kv_heads=2, group=3, head_dim=64, block_size=32),
    HeadShape(num_kv_heads=1, group=20, head_dim=64, block_size=16),
    HeadShape(num_kv_heads=2, group=2, head_dim=80, block_size=8),
    HeadShape(num_kv_heads=1, group=4, head_dim=96, block_size=16),
    HeadShape(num_kv_heads=1, group=2, head_dim=256, block_size=16),
    HeadShape(num_kv_heads=2, group=2, head_dim=64, block_size=128),
)


@dataclass(frozen=True)
class AttentionCase:
    """One step: for each slot None (a hole) or the tokens before the step and the tokens of the step."""

    shape: HeadShape
    dtype: torch.dtype
    slots: tuple[tuple[int, int] | None, ...]
    padding: int = 0
    seed: int = 0


def attention_cases(
    dtypes: tuple[torch.dtype, ...], longest_context: int, longest_chunk: int
) -> st.SearchStrategy[AttentionCase]:
    slot = st.none() | st.tuples(st.integers(0, longest_context), st.integers(1, longest_chunk))
    return st.builds(
        AttentionCase,
        shape=st.sampled_from(SHAPES),
        dtype=st.sampled_from(dtypes),
        slots=st.lists(slot, min_size=1, max_size=5).map(tuple),
        padding=st.integers(0, 3),
        seed=st.integers(0, 2**16),
    )


@dataclass
class Step:
    """The tensors of a case. Rows follow `order`, a shuffle of the active slots; padding rows come last."""

    case: AttentionCase
    device: str
    order: list[int] = field(init=False)
    query: torch.Tensor = field(init=False)
    k_cache: torch.Tensor = field(init=False)
    v_cache: torch.Tensor = field(init=False)
    block_tables: torch.Tensor = field(init=False)
    row_slot: torch.Tensor = field(init=False)
    positions: torch.Tensor = field(init=False)
    kv_slots: torch.Tensor = field(init=False)
    chunk_slots: torch.Tensor = field(init=False)
    chunk_start: torch.Tensor = field(init=False)
    seq_lens: torch.Tensor = field(init=False)
    rows: int = field(init=False)  # real ones
    dense: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        case, shape = self.case, self.case.shape
        random = torch.Generator().manual_seed(case.seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=random, dtype=torch.float64).to(case.dtype)

        lengths = [sum(slot) if slot else 0 for slot in case.slots]
        needed = [-(-length // shape.block_size) for length in lengths]
        free = (1 + torch.randperm(sum(needed) + 3, generator=random)).tolist()  # block 0 is reserved; some stay unused
        size = (len(free) + 1, shape.num_kv_heads, shape.block_size, shape.head_dim)
        k_cache, v_cache = (torch.full(size, float("nan"), dtype=case.dtype) for _ in range(2))
        tables = torch.tensor(NOWHERE, dtype=torch.int32).repeat(len(lengths), max(needed) // 2 + 2)
        for slot, length in enumerate(lengths):
            blocks = torch.tensor([free.pop() for _ in range(needed[slot])], dtype=torch.long)
            tables[slot, : len(blocks)] = blocks
            tokens = torch.arange(length)
            keys, values = (normal(length, shape.num_kv_heads, shape.head_dim) for _ in range(2))
            k_cache[blocks[tokens // shape.block_size], :, tokens % shape.block_size] = keys
            v_cache[blocks[tokens // shape.block_size], :, tokens % shape.block_size] = values
            self.dense[slot] = keys.double(), values.double()

        active = [slot for slot, work in enumerate(case.slots) if work]
        self.order = [active[i] for i in torch.randperm(len(active), generator=random)]
        row_slot, positions, kv_slots, starts = [], [], [], [0]
        for slot in self.order:
            before, chunk = case.slots[slot] or (0, 0)
            for position in range(before, before + chunk):
                block = int(tables[slot, position // shape.block_size])
                row_slot.append(slot)
                positions.append(position)
                kv_slots.append(block * shape.block_size + position % shape.block_size)
            starts.append(len(row_slot))
        self.rows = len(row_slot)

        def place(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self.device)

        def integers(values: list[int]) -> torch.Tensor:
            return place(torch.tensor(values, dtype=torch.int32))

        pad = [0] * case.padding
        self.query = place(normal(self.rows + case.padding, shape.num_kv_heads * shape.group, shape.head_dim))
        self.k_cache, self.v_cache, self.block_tables = place(k_cache), place(v_cache), place(tables)
        self.row_slot = integers(row_slot + [-1 for _ in pad])
        self.positions = integers(positions + pad)
        self.kv_slots = integers(kv_slots + [-1 for _ in pad]).long()
        self.chunk_slots = integers(self.order + [-1 for _ in pad])
        self.chunk_start = integers(starts + [self.rows for _ in pad])
        self.seq_lens = integers([slot[0] if slot else 0 for slot in case.slots])

    @property
    def scale(self) -> float:
        return self.case.shape.head_dim**-0.5

    @property
    def wide(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query and caches in float64: the same numbers, for the reference."""
        return self.query.double(), self.k_cache.double(), self.v_cache.double()

    def decode_work(
        self, splits: DecodeSplits
    ) -> tuple[tuple[torch.Tensor, ...], tuple[DecodeSplits, DecodeWorkspace]]:
        """Where the contexts lie, and how `paged_decode` shares them out."""
        shape, start = self.case.shape, split_starts(self.row_slot, self.positions, splits)
        workspace = DecodeWorkspace.allocate(
            len(self.row_slot), int(start[-1]), shape.num_kv_heads * shape.group, shape.num_kv_heads, shape.head_dim,
            torch.device(self.device),
        )  # fmt: skip
        for tensor in (workspace.out, workspace.lse):
            tensor.fill_(float("nan"))
        return (self.block_tables, self.row_slot, self.positions, start), (splits, workspace)

    def naive(self) -> torch.Tensor:
        """Dense attention, row by row and head by head, of the real rows in float64."""
        out = torch.zeros(self.rows, *self.query.shape[1:], dtype=torch.float64)
        query = self.query.double().cpu()
        for row in range(self.rows):
            keys, values = self.dense[int(self.row_slot[row])]
            seen = int(self.positions[row]) + 1
            for head in range(query.shape[1]):
                kv_head = head // self.case.shape.group
                weights = torch.softmax(keys[:seen, kv_head] @ query[row, head] * self.scale, dim=0)
                out[row, head] = weights @ values[:seen, kv_head]
        return out

    def assert_right(self, actual: torch.Tensor, tolerance: float) -> None:
        """Every real row of `actual` is within `tolerance` of the naive result, relative to the row's norm."""
        error = worst_relative_error(actual[: self.rows], self.naive())
        assert error < tolerance, f"relative error {error:.2e}, allowed {tolerance:.0e}"

    def assert_padding_untouched(self, actual: torch.Tensor) -> None:
        assert actual[self.rows :].isnan().all(), "a padding row was written"


def worst_relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative norm of the difference over the rows; infinite where `actual` holds a NaN."""
    if not len(expected):
        return 0.0
    actual, expected = (tensor.detach().double().cpu().flatten(1) for tensor in (actual, expected))
    error = (actual - expected).norm(dim=1) / expected.norm(dim=1)
    return float(error.nan_to_num(nan=float("inf")).max())


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Inside, `torch.empty` is full of NaN, on any device."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(
        True
    )  # brings torch.utils.deterministic.fill_uninitialized_memory, True at start
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check_decode(
    case: AttentionCase, device: str, size: int, most: int = MOST_SPLITS, tile: DecodeTile | None = None
) -> None:
    """The kernel against dense attention, and the reference in float64 too."""
    step = Step(case, device)
    tile = tile or choose_decode_tile(case.shape.head_dim, case.shape.group, case.dtype.itemsize)
    splits = DecodeSplits(tile.block_n, size, most)
    where, how = step.decode_work(splits)
    for _ in range(2):  # a launch leaves its workspace as it found it
        with poisoned_allocations():
            actual = paged_decode_triton(step.query, step.k_cache, step.v_cache, *where, step.scale, *how, tile)
        step.assert_right(actual, TOLERANCE[case.dtype])
        step.assert_padding_untouched(actual)
        assert not how[1].arrivals.any()
    step.assert_right(paged_decode_reference(*step.wide, *where[:3], step.scale), 1e-12)


def check_prefill(case: AttentionCase, device: str, tile: PrefillTile | None = None, in_front: int = 2) -> None:
    """The kernel against dense attention, and the reference in float64 too."""
    step = Step(case, device)
    # Rows in front of the chunks belong to another kernel.
    query = torch.nn.functional.pad(step.query, (0, 0, 0, 0, in_front, 0), value=float("nan"))
    where = step.block_tables, step.chunk_slots, step.chunk_start + in_front, step.seq_lens, step.scale
    tickets = torch.zeros(2, dtype=torch.int32, device=device)
    for _ in range(2):  # a launch leaves its tickets as it found them
        with poisoned_allocations():
            actual = paged_prefill_triton(query, step.k_cache, step.v_cache, *where, tickets, tile)
        step.assert_right(actual[in_front:], TOLERANCE[case.dtype])
        step.assert_padding_untouched(actual[in_front:])
        assert actual[:in_front].isnan().all(), "a row in front of the chunks was written"
        assert tickets.tolist() == [0, 0]
    _, *caches = step.wide
    step.assert_right(paged_prefill_reference(query.double(), *caches, *where)[in_front:], 1e-12)


def check_rope_write(case: AttentionCase, device: str, with_norm: bool) -> None:
    """The kernel against the reference in float64: queries, the tokens at the KV slots, and nothing else changed."""
    step = Step(case, device)
    shape, rows = case.shape, len(step.row_slot)
    num_heads = shape.num_kv_heads * shape.group
    random = torch.Generator().manual_seed(case.seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64).to(device, case.dtype)

    qkv = normal(rows, (num_heads + 2 * shape.num_kv_heads) * shape.head_dim)
    cos, sin = normal(rows, shape.head_dim).clamp(-1, 1), normal(rows, shape.head_dim).clamp(-1, 1)
    norms = (1 + normal(shape.head_dim) / 8, 1 - normal(shape.head_dim) / 8) if with_norm else (None, None)
    cos[step.rows :] = sin[step.rows :] = float("nan")
    k_cache, v_cache = (torch.full_like(step.k_cache, float("nan")) for _ in range(2))
    k_wide, v_wide = k_cache.double(), v_cache.double()

    with poisoned_allocations():
        query = rope_write_triton(qkv, cos, sin, *norms, 1e-6, k_cache, v_cache, step.kv_slots, num_heads)
    wide_norms = (weight if weight is None else weight.double() for weight in norms)
    expected = rope_write_reference(
        qkv.double(), cos.double(), sin.double(), *wide_norms, 1e-6, k_wide, v_wide, step.kv_slots, num_heads
    )
    assert worst_relative_error(query[: step.rows], expected[: step.rows]) < TOLERANCE[case.dtype]
    step.assert_padding_untouched(query)
    for cache, wide in ((k_cache, k_wide), (v_cache, v_wide)):
        assert torch.equal(cache.isnan(), wide.isnan()), "a token was written where none belongs, or is missing"
        written = cache.nan_to_num(), wide.nan_to_num()
        assert (written[0] - written[1]).norm() <= TOLERANCE[case.dtype] * written[1].norm()
    assert torch.equal(v_cache.double().nan_to_num(), v_wide.nan_to_num()), "values are copied, not computed"
