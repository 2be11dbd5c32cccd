"""The kernels that choose a token: chunked argmax, chunked Gumbel-max, and the reduction over chunks.

The definition stands in `sample`. A vocabulary of 150,000 ids is split over programs, since at small batches one
program a row would take most of a step; each leaves its best, and one small kernel picks among them.
"""

from __future__ import annotations

import torch

from graphexec.kernels.lang import tl, triton
from graphexec.kernels.philox import philox_reference, philox_words, uniform, uniform_reference
from graphexec.kernels.state import SlotTensors
from graphexec.kernels.thresholds import (
    CHUNK,
    CutWorkspace,
    ordered_image,
    row_peak,
    settled_digit,
    stops_masked,
)

__all__ = ["ChunkBests", "add_noise", "choose", "find_peaks", "noise_reference"]

_SPAN = 1024
"""Ids that share a Philox word index; four spans share the calls. Part of the definition: never tune it."""
_BEYOND_NOISE = -20.0
"""A token this far below the row's maximum cannot win: two noises differ by less than 19.5."""
_NO_ID = 2**31 - 1


class ChunkBests:
    """Device scratch, `[B, chunks]` each: the largest logit, its id and flags, and the best noisy score and its id."""

    def __init__(self, logits: torch.Tensor) -> None:
        shape = (logits.shape[0], triton.cdiv(logits.shape[1], CHUNK))
        # Separate tensors: Triton compiles anew for a pointer whose alignment changes with the bucket.
        self.peaks = torch.empty(shape, dtype=torch.float32, device=logits.device)
        self.scores = torch.empty_like(self.peaks)
        self.peak_ids = torch.empty_like(self.peaks, dtype=torch.int32)
        self.score_ids = torch.empty_like(self.peak_ids)
        self.flags = torch.empty_like(self.peak_ids)


@triton.jit
def _argmax_kernel(
    logits_ptr,  # [B, V], rows `row_stride` apart
    slots_ptr,  # [B]
    num_tokens_ptr,  # [S]
    min_len_ptr,  # [S]
    stop_ids_ptr,  # [S, STOPS]
    peaks_ptr,  # [B, chunks], as all that follow
    peak_ids_ptr,
    flags_ptr,
    vocabulary,
    row_stride,
    stop_stride,
    chunks,
    STOPS: tl.constexpr,
    CHUNK: tl.constexpr,
    NO_ID: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits_ptr + row * row_stride + ids, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)
    is_nan = values != values
    below_minimum = tl.load(num_tokens_ptr + slot) < tl.load(min_len_ptr + slot)
    values = stops_masked(values, ids, below_minimum, stop_ids_ptr + slot * stop_stride, STOPS)
    values = tl.where(is_nan, float("-inf"), values)
    finite = tl.abs(values) < float("inf")
    flags = tl.max(is_nan.to(tl.int32)) | (tl.max(finite.to(tl.int32)) << 1)
    peak = tl.max(values)
    at = row * chunks + chunk
    tl.store(peaks_ptr + at, peak)
    tl.store(peak_ids_ptr + at, tl.min(tl.where(values == peak, ids, NO_ID)))
    tl.store(flags_ptr + at, flags)


@triton.jit
def _filtered(
    logits_row_ptr,
    ids,
    vocabulary,
    below_minimum,
    stop_row_ptr,
    peak,
    temperature,
    lowest,
    cut,
    CUT: tl.constexpr,
    BITS: tl.constexpr,
    HALF: tl.constexpr,
    STOPS: tl.constexpr,
):
    """Scaled logits, -inf where the token lies below `lowest` (scaled) or, if CUT, below `cut` (by its image)."""
    values = tl.load(logits_row_ptr + ids, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)
    values = stops_masked(values, ids, below_minimum, stop_row_ptr, STOPS)
    scaled = tl.where(values == peak, 0.0, values - peak) / temperature
    stays = (ids < vocabulary) & (scaled >= lowest)
    if CUT:
        stays = stays & ((ordered_image(values, BITS, HALF) >= cut) | (values == peak))
    return tl.where(stays, scaled, float("-inf"))


@triton.jit
def _gumbel(word):
    return -tl.log(-tl.log(uniform(word)))


@triton.jit
def _noise_kernel(
    logits_ptr,  # [B, V], rows `row_stride` apart
    slots_ptr,  # [B]
    peaks_ptr,  # [B, chunks]
    bins_ptr,  # [B, chunks, 16], left by the search
    prefix_ptr,  # [B]
    needed_ptr,  # [B]
    top_k_cut_ptr,  # [B]
    temperature_ptr,  # [S], as all that follow
    log_min_p_ptr,
    top_k_ptr,
    top_p_ptr,
    seed_ptr,
    num_tokens_ptr,
    min_len_ptr,
    stop_ids_ptr,  # [S, STOPS]
    scores_ptr,  # [B, chunks]
    score_ids_ptr,  # [B, chunks]
    vocabulary,
    row_stride,
    stop_stride,
    chunks,
    CUT: tl.constexpr,
    BEYOND: tl.constexpr,
    BITS: tl.constexpr,
    HALF: tl.constexpr,
    STOPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPAN: tl.constexpr,
    NO_ID: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    temperature = tl.load(temperature_ptr + slot)
    if (temperature > 0) == 0:
        return
    cut = (slot * 0).to(tl.uint32)
    if CUT:
        top_k = tl.load(top_k_ptr + slot)
        cuts_count = (top_k > 0) & (top_k < vocabulary)
        cuts_mass = tl.load(top_p_ptr + slot) < 1
        if cuts_count | cuts_mass:
            # Step 2 or later: the state is in memory, so the goal is not used, nor the kind of search.
            prefix, _ = settled_digit(bins_ptr, prefix_ptr, needed_ptr, row, chunks, 2, 0.0, False, CHUNKS)
            cut = prefix.to(tl.uint32, bitcast=True)
            if cuts_mass:
                cut = tl.maximum(cut, tl.load(top_k_cut_ptr + row).to(tl.uint32, bitcast=True))

    peak = row_peak(peaks_ptr, row, chunks, CHUNKS)
    lowest = tl.maximum(tl.load(log_min_p_ptr + slot), BEYOND)
    num_tokens = tl.load(num_tokens_ptr + slot)
    below_minimum = num_tokens < tl.load(min_len_ptr + slot)
    logits_row_ptr = logits_ptr + row * row_stride
    stop_row_ptr = stop_ids_ptr + slot * stop_stride
    lanes = tl.arange(0, SPAN)
    i0 = chunk * (4 * SPAN) + lanes
    i1 = i0 + SPAN
    i2 = i1 + SPAN
    i3 = i2 + SPAN
    s0 = _filtered(logits_row_ptr, i0, vocabulary, below_minimum, stop_row_ptr, peak, temperature, lowest, cut, CUT, BITS, HALF, STOPS)  # fmt: skip  # noqa: E501
    s1 = _filtered(logits_row_ptr, i1, vocabulary, below_minimum, stop_row_ptr, peak, temperature, lowest, cut, CUT, BITS, HALF, STOPS)  # fmt: skip  # noqa: E501
    s2 = _filtered(logits_row_ptr, i2, vocabulary, below_minimum, stop_row_ptr, peak, temperature, lowest, cut, CUT, BITS, HALF, STOPS)  # fmt: skip  # noqa: E501
    s3 = _filtered(logits_row_ptr, i3, vocabulary, below_minimum, stop_row_ptr, peak, temperature, lowest, cut, CUT, BITS, HALF, STOPS)  # fmt: skip  # noqa: E501
    at = row * chunks + chunk
    if tl.max(tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3))) > float("-inf"):
        w0, w1, w2, w3 = philox_words(tl.load(seed_ptr + slot), chunk * SPAN + lanes, num_tokens, 0, 0)
        s0 += _gumbel(w0)
        s1 += _gumbel(w1)
        s2 += _gumbel(w2)
        s3 += _gumbel(w3)
        best = tl.max(tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3)))
        first = tl.minimum(tl.where(s0 == best, i0, NO_ID), tl.where(s1 == best, i1, NO_ID))
        second = tl.minimum(tl.where(s2 == best, i2, NO_ID), tl.where(s3 == best, i3, NO_ID))
        tl.store(scores_ptr + at, best)
        tl.store(score_ids_ptr + at, tl.min(tl.minimum(first, second)))
    else:
        tl.store(scores_ptr + at, float("-inf"))
        tl.store(score_ids_ptr + at, NO_ID)


@triton.jit
def _choose_kernel(
    slots_ptr,  # [B]
    temperature_ptr,  # [S]
    peaks_ptr,  # [B, chunks], as all that follow
    peak_ids_ptr,
    flags_ptr,
    scores_ptr,
    score_ids_ptr,
    tokens_ptr,  # [B]
    nan_ptr,  # [B]
    chunks,
    SAMPLED: tl.constexpr,
    CHUNKS: tl.constexpr,
    NO_ID: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    part = tl.arange(0, CHUNKS)
    inside = part < chunks
    at = row * chunks + part
    flags = tl.load(flags_ptr + at, mask=inside, other=0)
    values = tl.load(peaks_ptr + at, mask=inside, other=float("-inf"))
    ids = tl.load(peak_ids_ptr + at, mask=inside, other=NO_ID)
    if SAMPLED:  # noqa: SIM102 - the outer condition is known when the kernel is compiled
        if tl.load(temperature_ptr + slot) > 0:
            values = tl.load(scores_ptr + at, mask=inside, other=float("-inf"))
            ids = tl.load(score_ids_ptr + at, mask=inside, other=NO_ID)
    token = tl.min(tl.where(values == tl.max(values), ids, NO_ID))
    choosable = (tl.max(flags & 1) == 0) & (tl.max(flags & 2) != 0)
    tl.store(tokens_ptr + row, tl.where(choosable, token, 0))
    tl.store(nan_ptr + row, tl.where(choosable, 0, 1))


def find_peaks(logits: torch.Tensor, slots: torch.Tensor, state: SlotTensors, bests: ChunkBests) -> None:
    """Writes the largest logit of each chunk, after the minimum-length mask, its id, and what else the chunk holds.

    Args:
        logits: `[B, V]`, B > 0, bfloat16, float16 or float32.
        slots: int32 `[B]`, -1 for padding.
        state: the slots' parameters.
        bests: gets `peaks`, `peak_ids` and `flags` (1: a NaN, 2: a finite value).
    """
    rows, chunks = bests.peaks.shape
    _argmax_kernel[(rows, chunks)](
        logits, slots, state.num_tokens, state.min_len, state.stop_ids, bests.peaks, bests.peak_ids, bests.flags,
        logits.shape[1], logits.stride(0), state.stop_ids.stride(0), chunks,
        STOPS=state.stop_ids.shape[1], CHUNK=CHUNK, NO_ID=_NO_ID, num_warps=8,
    )  # fmt: skip


def add_noise(
    logits: torch.Tensor, slots: torch.Tensor, state: SlotTensors, bests: ChunkBests, work: CutWorkspace | None
) -> None:
    """Writes `scores` and `score_ids` of the sampled rows, from `peaks` and from what `search_cut` left in `work`.

    `work` None: top-k and top-p are not looked at.
    """
    rows, chunks = bests.peaks.shape
    last = 0 if work is None else (work.passes - 1) % 2
    search = [bests.peaks] * 4  # read by nobody
    if work is not None:
        search = [work.bins[last], work.prefix[last], work.needed[last], work.top_k_cut]
    _noise_kernel[(rows, chunks)](
        logits, slots, bests.peaks, *search,
        state.temperature, state.log_min_p, state.top_k, state.top_p, state.seed,
        state.num_tokens, state.min_len, state.stop_ids,
        bests.scores, bests.score_ids,
        logits.shape[1], logits.stride(0), state.stop_ids.stride(0), chunks,
        CUT=work is not None, BEYOND=_BEYOND_NOISE,
        BITS=8 * logits.element_size(), HALF=logits.dtype == torch.float16, STOPS=state.stop_ids.shape[1],
        CHUNKS=triton.next_power_of_2(chunks), SPAN=_SPAN, NO_ID=_NO_ID, num_warps=8,
    )  # fmt: skip


def choose(
    slots: torch.Tensor,
    state: SlotTensors,
    bests: ChunkBests,
    tokens: torch.Tensor,
    nan: torch.Tensor,
    *,
    with_noise: bool,
) -> None:
    """Writes `tokens` and `nan` (int32 `[B]`) of active rows; `with_noise` says that `add_noise` ran."""
    rows, chunks = bests.peaks.shape
    _choose_kernel[(rows,)](
        slots, state.temperature, bests.peaks, bests.peak_ids, bests.flags, bests.scores, bests.score_ids,
        tokens, nan, chunks,
        SAMPLED=with_noise, CHUNKS=triton.next_power_of_2(chunks), NO_ID=_NO_ID, num_warps=1,
    )  # fmt: skip


def noise_reference(seed: torch.Tensor, num_tokens: torch.Tensor, vocabulary: int, dtype: torch.dtype) -> torch.Tensor:
    """The noise of each token, `[B, V]` in `dtype`, from `seed` int64 `[B]` and `num_tokens` int32 `[B]`."""
    groups = -(-vocabulary // (4 * _SPAN))
    lanes = groups * _SPAN if vocabulary > _SPAN else vocabulary
    counter = torch.arange(lanes, device=seed.device)[None, :]
    zero = torch.zeros_like(counter)
    words = philox_reference(seed[:, None], counter, num_tokens.long()[:, None], zero, zero)
    if vocabulary <= _SPAN:
        word = words[0]
    else:
        spans = [word.reshape(-1, groups, _SPAN) for word in words]
        word = torch.stack(spans, dim=2).reshape(-1, groups * 4 * _SPAN)[:, :vocabulary]
    return -(-uniform_reference(word, dtype).log()).log()
