"""Log-probabilities of the sampled token and of the top N, from the raw logits (before temperature and filters)."""

from __future__ import annotations

import torch

from graphexec.kernels.lang import tl, triton
from graphexec.kernels.thresholds import CHUNK

__all__ = ["logprobs_reference", "logprobs_triton"]


@triton.jit
def _mass_kernel(
    logits_ptr,  # [B, V], rows `row_stride` apart
    slots_ptr,  # [B]
    tokens_ptr,  # [B]
    peaks_ptr,  # [B, chunks], as all that follow
    masses_ptr,
    above_ptr,
    vocabulary,
    row_stride,
    chunks,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if tl.load(slots_ptr + row) < 0:
        return
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    logits_row_ptr = logits_ptr + row * row_stride
    values = tl.load(logits_row_ptr + ids, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)
    chosen = tl.load(logits_row_ptr + tl.load(tokens_ptr + row)).to(tl.float32)
    peak = tl.max(values)
    # Without the mask a chunk of -inf alone would count its padding lanes as mass.
    weight = tl.where(ids < vocabulary, tl.exp(tl.where(values == peak, 0.0, values - peak)), 0.0)
    at = row * chunks + chunk
    tl.store(peaks_ptr + at, peak)
    tl.store(masses_ptr + at, tl.sum(weight))
    tl.store(above_ptr + at, tl.sum((values > chosen).to(tl.int32)))


@triton.jit
def _logprobs_kernel(
    logits_ptr,  # [B, V], rows `row_stride` apart
    slots_ptr,  # [B]
    tokens_ptr,  # [B]
    nan_ptr,  # [B]
    top_values_ptr,  # [B, top]
    top_ids_ptr,  # [B, top]
    peaks_ptr,  # [B, chunks]
    masses_ptr,  # [B, chunks]
    above_ptr,  # [B, chunks]
    logprobs_ptr,  # [B, columns]
    ids_ptr,  # [B, columns]
    rank_ptr,  # [B]
    row_stride,
    chunks,
    top,
    columns,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(slots_ptr + row) < 0:
        return
    part = tl.arange(0, CHUNKS)
    at = row * chunks + part
    peaks = tl.load(peaks_ptr + at, mask=part < chunks, other=float("-inf"))
    masses = tl.load(masses_ptr + at, mask=part < chunks, other=0.0)
    peak = tl.max(peaks)
    log_mass = tl.log(tl.sum(masses * tl.exp(tl.where(peaks == peak, 0.0, peaks - peak))))
    above = tl.sum(tl.load(above_ptr + at, mask=part < chunks, other=0))
    flagged = tl.load(nan_ptr + row) != 0

    token = tl.load(tokens_ptr + row)
    chosen = tl.load(logits_ptr + row * row_stride + token).to(tl.float32)
    column = tl.arange(0, COLUMNS)
    is_top = (column > 0) & (column <= top)
    values = tl.load(top_values_ptr + row * top + column - 1, mask=is_top, other=float("-inf")).to(tl.float32)
    ids = tl.load(top_ids_ptr + row * top + column - 1, mask=is_top, other=-1).to(tl.int32)
    values = tl.where(column == 0, chosen, values)
    ids = tl.where(column == 0, token, ids)
    logprobs = tl.where(values == peak, 0.0, values - peak) - log_mass
    out = row * columns + column
    tl.store(logprobs_ptr + out, tl.where(flagged, float("nan"), logprobs), mask=column < columns)
    tl.store(ids_ptr + out, tl.where(flagged, 0, ids), mask=column < columns)
    tl.store(rank_ptr + row, tl.where(flagged, 0, above + 1))


def logprobs_triton(
    logits: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    nan: torch.Tensor,
    logprobs: torch.Tensor,
    ids: torch.Tensor,
    rank: torch.Tensor,
) -> None:
    """Writes the rows of active slots of `logprobs`, `ids` (`[B, 1 + N]`, contiguous) and `rank` (`[B]`).

    Args:
        logits: `[B, V]`, B > 0, bfloat16, float16 or float32.
        slots: int32 `[B]`, -1 for padding.
        tokens, nan: int32 `[B]`, what the sampler chose for `logits`.
    """
    rows, vocabulary = logits.shape
    chunks = triton.cdiv(vocabulary, CHUNK)
    columns = logprobs.shape[1]
    top = min(columns - 1, vocabulary)
    # torch.topk serves padding rows too: its shape must not depend on data inside a graph.
    top_values, top_ids = logits.topk(top, dim=1)
    peaks = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    masses = torch.empty_like(peaks)
    above = torch.empty_like(peaks, dtype=torch.int32)
    _mass_kernel[(rows, chunks)](
        logits, slots, tokens, peaks, masses, above, vocabulary, logits.stride(0), chunks, CHUNK=CHUNK, num_warps=8
    )
    _logprobs_kernel[(rows,)](
        logits, slots, tokens, nan, top_values, top_ids, peaks, masses, above, logprobs, ids, rank,
        logits.stride(0), chunks, top, columns,
        COLUMNS=triton.next_power_of_2(columns), CHUNKS=triton.next_power_of_2(chunks), num_warps=1,
    )  # fmt: skip


def logprobs_reference(
    logits: torch.Tensor, tokens: torch.Tensor, flagged: torch.Tensor, count: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-softmax of the raw logits at the sampled token and at the `count` largest, and the sampled token's rank.

    Args:
        logits: `[B, V]` float32 or float64.
        tokens: int64 `[B]`.
        flagged: bool `[B]`; such a row gets NaN, ids 0 and rank 0.
        count: N. Beyond V the columns hold -inf and id -1.
        dtype: of the returned logprobs.

    Returns:
        logprobs `[B, 1 + N]`, ids `[B, 1 + N]` (int64) and rank `[B]` (int64).
    """
    rows, vocabulary = logits.shape
    top = min(count, vocabulary)
    top_values, top_ids = logits.topk(top, dim=1)
    chosen = logits.gather(1, tokens[:, None])
    values = torch.cat([chosen, top_values, logits.new_full((rows, count - top), float("-inf"))], dim=1)
    ids = torch.cat([tokens[:, None], top_ids, top_ids.new_full((rows, count - top), -1)], dim=1)
    peak = logits.amax(1, keepdim=True)
    mass = (logits - peak).masked_fill(logits == peak, 0.0).exp().sum(1, keepdim=True)
    logprobs = (values - peak).masked_fill(values == peak, 0.0) - mass.log()
    rank = (logits > chosen).sum(1) + 1
    bad = flagged[:, None]
    return logprobs.masked_fill(bad, float("nan")).to(dtype), ids.masked_fill(bad, 0), rank.masked_fill(flagged, 0)
