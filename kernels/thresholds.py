"""Which tokens a row may choose: the minimum-length mask, top-k, and top-p among what min-p leaves.

Top-k and top-p are one cut on the logit: a token stays when its logit is not below the cut, so tied tokens stay or go
together. The kernel finds the cut without sorting, by a search on the order-preserving integer image of the logit
(16 bits for bfloat16 and float16, 32 for float32), four bits a pass: each pass bins count (top-k) or mass (top-p) by
the next digit, and the next launch picks the digit. Sums have a fixed order, so a row's cut never depends on its batch.
"""

from __future__ import annotations

import torch

from graphexec.kernels.lang import tl, triton
from graphexec.kernels.state import SlotTensors

__all__ = [
    "CHUNK",
    "CutWorkspace",
    "cut_reference",
    "ordered_image",
    "row_peak",
    "search_cut",
    "settled_digit",
    "stops_masked",
    "stops_masked_reference",
]

CHUNK = 4096
"""Vocabulary ids of one program. Fixed, because it sets the order of the sums."""
_BLOCK = 1024
_DIGIT_BITS = 4


@triton.jit
def stops_masked(values, token_ids, below_minimum, stop_row_ptr, STOPS: tl.constexpr):
    """`values` with the slot's stop ids at -inf, when the (scalar) condition holds."""
    if below_minimum:
        for entry in range(STOPS):
            values = tl.where(token_ids == tl.load(stop_row_ptr + entry), float("-inf"), values)
    return values


@triton.jit
def ordered_image(values, BITS: tl.constexpr, HALF: tl.constexpr):
    """uint32 that order as the float32 `values` do, in 16 bits where these came from a 16-bit type. -0 equals +0."""
    if HALF:
        bits = values.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        image = tl.where(values == 0, 0, bits ^ ((bits >> 15) & 0x7FFF))
        return (image + 0x8000).to(tl.uint32)
    bits = values.to(tl.int32, bitcast=True)
    image = tl.where(values == 0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (image.to(tl.uint32, bitcast=True) ^ 0x80000000) >> (32 - BITS)


@triton.jit
def row_peak(peaks_ptr, row, chunks, CHUNKS: tl.constexpr):
    """The largest logit of a row, from the maxima of its chunks (`peaks [B, chunks]`)."""
    part = tl.arange(0, CHUNKS)
    return tl.max(tl.load(peaks_ptr + row * chunks + part, mask=part < chunks, other=float("-inf")))


@triton.jit
def settled_digit(bins_ptr, prefix_ptr, needed_ptr, row, chunks, step, goal, MASS: tl.constexpr, CHUNKS: tl.constexpr):
    """What pass `step - 1` decided: (digits of the cut so far, count or mass that the next ones must still supply)."""
    part = tl.arange(0, CHUNKS)
    digits = tl.arange(0, 16)
    inside = (part < chunks)[:, None] & (digits >= 0)[None, :]
    parts = tl.load(bins_ptr + (row * chunks + part[:, None]) * 16 + digits[None, :], mask=inside, other=0.0)
    bins = tl.sum(parts, axis=0)
    at_or_above = tl.sum(tl.where(digits[None, :] >= digits[:, None], bins[None, :], 0.0), axis=1)
    prefix = tl.load(prefix_ptr + row, mask=step > 1, other=0)
    needed = tl.load(needed_ptr + row, mask=step > 1, other=0.0)
    if MASS:
        goal = goal * tl.sum(bins)
    needed = tl.where(step > 1, needed, goal)
    # No digit qualifies only when rounding shrank the bin that the last pass chose: then the whole bin stays.
    digit = tl.max(tl.where(at_or_above >= needed, digits, 0))
    above = tl.sum(tl.where(digits > digit, bins, 0.0))
    return (prefix << 4) | digit, needed - above


@triton.jit(do_not_specialize=["step"])
def _search_kernel(
    logits_ptr,  # [B, V], rows `row_stride` apart
    slots_ptr,  # [B]
    peaks_ptr,  # [B, chunks]
    bins_in_ptr,  # [B, chunks, 16], of the pass before
    bins_out_ptr,
    prefix_in_ptr,  # [B]
    prefix_out_ptr,
    needed_in_ptr,  # [B]
    needed_out_ptr,
    top_k_cut_ptr,  # [B]
    temperature_ptr,  # [S], as all that follow
    log_min_p_ptr,
    top_k_ptr,
    top_p_ptr,
    num_tokens_ptr,
    min_len_ptr,
    stop_ids_ptr,  # [S, STOPS]
    vocabulary,
    row_stride,
    stop_stride,
    chunks,
    step,
    FIRST: tl.constexpr,
    MASS: tl.constexpr,
    BITS: tl.constexpr,
    HALF: tl.constexpr,
    STOPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    temperature = tl.load(temperature_ptr + slot)
    top_k = tl.load(top_k_ptr + slot)
    top_p = tl.load(top_p_ptr + slot)
    cuts_count = (temperature > 0) & (top_k > 0) & (top_k < vocabulary)
    if MASS:
        goal = top_p
        searches = (temperature > 0) & (top_p < 1)
    else:
        goal = top_k.to(tl.float32)
        searches = cuts_count
    if searches == 0:
        return

    lowest = slot * 0
    if FIRST:
        prefix = slot * 0
        if MASS:
            if cuts_count:  # the count search has just ended; its last digit is still in its bins
                lowest, _ = settled_digit(
                    bins_in_ptr, prefix_in_ptr, needed_in_ptr, row, chunks, step + 2, goal, False, CHUNKS
                )
            if chunk == 0:
                tl.store(top_k_cut_ptr + row, lowest)
    else:
        prefix, needed = settled_digit(bins_in_ptr, prefix_in_ptr, needed_in_ptr, row, chunks, step, goal, MASS, CHUNKS)
        if chunk == 0:
            tl.store(prefix_out_ptr + row, prefix)
            tl.store(needed_out_ptr + row, needed)
        if MASS:
            lowest = tl.load(top_k_cut_ptr + row)

    peak = row_peak(peaks_ptr, row, chunks, CHUNKS)
    below_minimum = tl.load(num_tokens_ptr + slot) < tl.load(min_len_ptr + slot)
    log_min_p = tl.load(log_min_p_ptr + slot)
    prefix_bits = prefix.to(tl.uint32, bitcast=True)
    lowest_image = lowest.to(tl.uint32, bitcast=True)
    shift = (BITS - 4 - 4 * step).to(tl.uint32)
    digits = tl.arange(0, 16)
    sums = tl.zeros([16, BLOCK], dtype=tl.float32)
    for start in range(0, CHUNK, BLOCK):
        ids = chunk * CHUNK + start + tl.arange(0, BLOCK)
        values = tl.load(logits_ptr + row * row_stride + ids, mask=ids < vocabulary, other=float("-inf"))
        values = stops_masked(values.to(tl.float32), ids, below_minimum, stop_ids_ptr + slot * stop_stride, STOPS)
        image = ordered_image(values, BITS, HALF)
        counted = (ids < vocabulary) & (((image >> shift) >> 4) == prefix_bits)
        if MASS:
            scaled = tl.where(values == peak, 0.0, values - peak) / temperature
            counted = counted & (image >= lowest_image) & (scaled >= log_min_p)
            weight = tl.where(counted, tl.exp(scaled), 0.0)
        else:
            weight = counted.to(tl.float32)
        digit = ((image >> shift) & 15).to(tl.int32)
        sums += tl.where(digit[None, :] == digits[:, None], weight[None, :], 0.0)
    tl.store(bins_out_ptr + (row * chunks + chunk) * 16 + digits, tl.sum(sums, axis=1))


class CutWorkspace:
    """Device scratch of one search over `[B, V]` logits; after `search_cut` it holds what the last pass left."""

    def __init__(self, logits: torch.Tensor) -> None:
        rows, vocabulary = logits.shape
        chunks = triton.cdiv(vocabulary, CHUNK)
        device = logits.device
        self.bits = 8 * logits.element_size()
        self.passes = self.bits // _DIGIT_BITS
        # Pass i writes half i % 2 and reads the other one, so no program reads what its own launch writes.
        # Halves are separate tensors: Triton compiles anew for a pointer whose alignment changes with the bucket.
        self.bins = [torch.empty((rows, chunks, 16), dtype=torch.float32, device=device) for _ in range(2)]
        self.prefix = [torch.empty(rows, dtype=torch.int32, device=device) for _ in range(2)]
        self.needed = [torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2)]
        self.top_k_cut = torch.empty(rows, dtype=torch.int32, device=device)


def search_cut(logits: torch.Tensor, slots: torch.Tensor, state: SlotTensors, peaks: torch.Tensor) -> CutWorkspace:
    """Launches the top-k search, then the top-p search among what top-k left; rows without a filter leave at once.

    The last digit stays in the workspace: the kernel that uses the cut settles it (one launch less).

    Args:
        logits: `[B, V]`, B > 0, bfloat16, float16 or float32.
        slots: `[B]` int32, -1 for padding.
        state: the slots' parameters.
        peaks: `[B, chunks]` float32, the largest logit of each chunk of `CHUNK` ids, after the minimum-length mask.
    """
    work = CutWorkspace(logits)
    rows, vocabulary = logits.shape
    chunks = peaks.shape[1]
    for mass in (False, True):
        for step in range(work.passes):
            here, before = step % 2, (step + 1) % 2
            _search_kernel[(rows, chunks)](
                logits, slots, peaks,
                work.bins[before], work.bins[here],
                work.prefix[before], work.prefix[here],
                work.needed[before], work.needed[here],
                work.top_k_cut,
                state.temperature, state.log_min_p, state.top_k, state.top_p,
                state.num_tokens, state.min_len, state.stop_ids,
                vocabulary, logits.stride(0), state.stop_ids.stride(0), chunks, step,
                FIRST=step == 0, MASS=mass,
                BITS=work.bits, HALF=logits.dtype == torch.float16, STOPS=state.stop_ids.shape[1],
                CHUNKS=triton.next_power_of_2(chunks), CHUNK=CHUNK, BLOCK=_BLOCK, num_warps=8,
            )  # fmt: skip
    return work


def stops_masked_reference(logits: torch.Tensor, at: torch.Tensor, state: SlotTensors) -> torch.Tensor:
    """`logits [B, V]` with the stop ids of slot `at[b]` (int64 `[B]`) at -inf while the slot is below its minimum."""
    below_minimum = state.num_tokens[at] < state.min_len[at]
    if not logits.is_cuda and not bool(below_minimum.any()):
        return logits
    vocabulary = logits.shape[1]
    stops = state.stop_ids[at].long()
    masked = below_minimum[:, None] & (stops >= 0) & (stops < vocabulary)
    hits = torch.zeros(logits.shape[0], vocabulary + 1, dtype=torch.bool, device=logits.device)
    hits.scatter_(1, torch.where(masked, stops, vocabulary), True)  # the extra column takes the unused entries
    return logits.masked_fill(hits[:, :vocabulary], float("-inf"))


def cut_reference(logits: torch.Tensor, scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The cut of each row, by sorting: a token stays when its logit is not below it.

    Args:
        logits: `[B, V]` float32 or float64, after the minimum-length mask.
        scaled: `[B, V]`, `(logits - row maximum) / temperature`, -inf for tokens that have no mass.
        top_k: `[B]` int32; below 1 or at least V is off. The cut is not above the k-th largest logit.
        top_p: `[B]` float32; 1 or more is off. Among what top-k leaves, the cut is the largest logit t for which
            mass{logit >= t} >= top_p * total mass; at 0 or less, the row's maximum.

    Returns:
        `[B, 1]` of the dtype of `logits`.
    """
    vocabulary = logits.shape[1]
    descending, order = logits.sort(dim=1, descending=True)
    kth = torch.where(top_k > 0, top_k.long(), vocabulary).clamp(max=vocabulary) - 1
    top_k_cut = descending.gather(1, kth[:, None])
    weights = scaled.gather(1, order).exp().where(descending >= top_k_cut, 0.0)
    mass = weights.cumsum(1, dtype=torch.float64)
    missing = mass < top_p.double()[:, None] * mass[:, -1:]
    last = missing.sum(1, keepdim=True).clamp(max=vocabulary - 1)
    return torch.where((top_p < 1)[:, None], descending.gather(1, last), top_k_cut)
