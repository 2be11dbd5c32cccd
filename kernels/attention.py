"""The attention operator that models call: opaque to torch.compile, it finds the rows of the running step by context.

A context rather than arguments, because every number that a compiled model is called with would be a guard; the
phase of the step must not cost a compilation of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from graphexec.kernels.lang import Launch
from graphexec.kernels.paged_decode import DecodeSplits, DecodeWorkspace, paged_decode_call
from graphexec.kernels.paged_prefill import paged_prefill_call
from graphexec.kernels.rope_write import rope_write
from graphexec.kernels.state import SlotTensors, StepTensors
from graphexec.runtime import eager_break

__all__ = ["AttentionRows", "attention_rows", "paged_attention", "paged_attention_op"]


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """The rows that attention works on in one step; all numbers are those of the step's graph key.

    Attributes:
        slots: state of the slots.
        step: the rows, from `prepare`.
        rows: T, launched rows.
        bucket: B, launched slots; without chunks as many rows.
        has_chunks: whether there may be prompt chunks.
        splits: how contexts of the rows in front of the chunks are shared out; None if there are no such rows.
        workspace: where those splits meet; None on the CPU.
    """

    slots: SlotTensors
    step: StepTensors
    rows: int
    bucket: int
    has_chunks: bool
    splits: DecodeSplits | None
    workspace: DecodeWorkspace | None


_rows: ContextVar[AttentionRows] = ContextVar("graphexec_attention_rows")


@contextmanager
def attention_rows(rows: AttentionRows) -> Iterator[None]:
    """Within the block, `paged_attention` works on `rows`."""
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


def paged_attention(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    norm_eps: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
    scale: float,
) -> torch.Tensor:
    """Rotary embedding, KV write and attention for the rows of the running step.

    Args:
        qkv: `[T, (H + 2 * KH) * D]`, the merged projections.
        cos, sin: `[T, D]`.
        q_norm, k_norm: `[D]` weights of a per-head RMSNorm, or None.
        norm_eps: its epsilon.
        k_cache, v_cache: `[blocks, KH, block_size, D]`, written at the rows' positions.
        num_heads: H.
        scale: of the logits.

    Returns:
        `[T, H * D]`; rows of padding hold anything.
    """
    rows = _rows.get()
    kv_slots = rows.step.kv_slots[: rows.rows]
    query = rope_write(qkv, cos, sin, q_norm, k_norm, norm_eps, k_cache, v_cache, kv_slots, num_heads)
    out = torch.empty_like(query)
    _attend(rows, query, k_cache, v_cache, scale, out)
    return out.flatten(1)


@eager_break(optional=True)  # nothing here needs the host; a graph in pieces shows what such graphs cost
def _attend(
    rows: AttentionRows,
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attention of all rows, `[T, H, D]` queries to `out` of the same shape."""
    for call in _attention_calls(rows, query, k_cache, v_cache, scale, out):
        call()


@_attend.prepare
def _prepare_attend(
    rows: AttentionRows,
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> Callable[[], None]:
    calls = _attention_calls(rows, query, k_cache, v_cache, scale, out)
    bound = [call.bound() if isinstance(call, Launch) else call for call in calls]

    def attend() -> None:
        for call in bound:
            call()

    return attend


def _attention_calls(
    rows: AttentionRows,
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> list[Launch | Callable[[], object]]:
    step, slots, calls = rows.step, rows.slots, []
    if rows.splits is not None:
        # The first rows are those of slots that compute one token; at the first chunk `decode_slots` becomes -1.
        single = slice(rows.bucket)
        where = (
            slots.block_tables,
            step.decode_slots[single],
            step.positions[single],
            step.split_start[: rows.bucket + 1],
        )
        sizes = scale, rows.splits, rows.workspace
        calls.append(paged_decode_call(query[single], k_cache, v_cache, *where, *sizes, out[single]))
    if rows.has_chunks:
        chunks = step.chunk_slots[: rows.bucket], step.chunk_start[: rows.bucket + 1], slots.seq_lens
        calls.append(paged_prefill_call(query, k_cache, v_cache, slots.block_tables, *chunks, scale, step.tickets, out))
    return calls


def _attend_shape(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    norm_eps: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
    scale: float,
) -> torch.Tensor:
    return qkv.new_empty(qkv.shape[0], num_heads * k_cache.shape[-1])


# Registered by hand: a call through torch.library.custom_op costs the host 10 microseconds, this one 2.
_LIBRARY = torch.library.Library("graphexec", "DEF")
_LIBRARY.define(
    "paged_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor? q_norm, Tensor? k_norm, float norm_eps, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, int num_heads, float scale) -> Tensor"
)
_LIBRARY.impl("paged_attention", paged_attention, "CompositeExplicitAutograd")
torch.library.register_fake("graphexec::paged_attention", _attend_shape, lib=_LIBRARY)

paged_attention_op = torch.ops.graphexec.paged_attention.default
"""`paged_attention` as an operator that torch.compile does not look into."""
