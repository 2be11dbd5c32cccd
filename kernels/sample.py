"""From logits to a token, inside a CUDA graph: greedy, sampled, shaped, and with logprobs.

Definition, for the row of a slot, in float32 (float64 for float64 logits):
0. Bias and penalties (`adjust`) change the logits, which are rounded to their type again.
1. While `num_tokens < min_len`, the slot's stop ids count as -inf.
2. `temperature` 0: the largest logit; of several, the lowest id.
3. Else min-p: a token stays if it is at least min-p times as likely, at this temperature, as the likeliest one. Then
   top-k, then top-p (`thresholds`), and among what is left the largest `(logit - row maximum) / temperature + noise`:
   a draw from the softmax (Gumbel-max: Gumbel 1954; Maddison, Tarlow, Minka 2014). Taking the maximum off first keeps
   large logits from swallowing the noise.
4. The noise is `-log(-log(u))`, u the `philox.uniform` of one word of Philox4x32-10, key = seed, counter =
   `(1024 * (id // 4096) + id % 1024, num_tokens, 0, 0)`, word `(id // 1024) % 4`: four ids share one call.
   u lies on a grid of 2**-23, so noise is within [-2.82, 16.64].
+inf logits share all the mass. A row that holds a NaN, or no finite value after step 1, is flagged and gets token 0.
Log-probabilities are those of the logits before step 0.

The noise is a function of the request's seed and of the index of the token, so a request's tokens do not depend on
who shares its batch, on preemption, nor on graph or eager.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from graphexec.kernels.adjust import adjust_reference, adjust_triton
from graphexec.kernels.gumbel import ChunkBests, add_noise, choose, find_peaks, noise_reference
from graphexec.kernels.lang import use_triton
from graphexec.kernels.logprobs import logprobs_reference, logprobs_triton
from graphexec.kernels.state import SlotTensors
from graphexec.kernels.thresholds import cut_reference, search_cut, stops_masked_reference

__all__ = [
    "SampleOutput",
    "SamplerVariant",
    "report_logprobs",
    "sample",
    "sample_reference",
    "sample_triton",
]


class SamplerVariant(StrEnum):
    """What a captured step samples, cheapest first: `max` of several serves all of them."""

    GREEDY = "greedy"
    SAMPLED = "sampled"
    """Temperature and min-p."""
    SHAPED = "shaped"
    """Bias, penalties, top-k and top-p as well: a launch for each digit of the cut."""
    LOGPROBS = "logprobs"

    @property
    def cost(self) -> int:
        """Position in the order of cost, from 0."""
        return list(SamplerVariant).index(self)

    def __lt__(self, other: str) -> bool:
        return self.cost < SamplerVariant(other).cost

    def __le__(self, other: str) -> bool:
        return self.cost <= SamplerVariant(other).cost

    def __gt__(self, other: str) -> bool:
        return self.cost > SamplerVariant(other).cost

    def __ge__(self, other: str) -> bool:
        return self.cost >= SamplerVariant(other).cost


@dataclass(frozen=True)
class SampleOutput:
    """Fixed buffers of one bucket, written in place; entries of padding rows keep what they held.

    Attributes:
        tokens: int32 `[B]`.
        nan: int32 `[B]`, 1 where no token could be chosen (see the module); the token is then 0.
        logprobs: `[B, 1 + N]`, float32 or float64, the sampled token first, then the top N (`LOGPROBS` only).
        logprob_ids: int32 `[B, 1 + N]`.
        rank: int32 `[B]`, 1 + number of logits above the sampled token's.
    """

    tokens: torch.Tensor
    nan: torch.Tensor
    logprobs: torch.Tensor | None = None
    logprob_ids: torch.Tensor | None = None
    rank: torch.Tensor | None = None


def sample(
    logits: torch.Tensor, slots: torch.Tensor, state: SlotTensors, variant: SamplerVariant, out: SampleOutput
) -> None:
    """Samples one token a row into `out`, without a host sync or an allocation that depends on data.

    Args:
        logits: `[B, V]`, bfloat16, float16, float32 or float64, unit stride within a row. `SHAPED` adjusts them in
            place; `LOGPROBS` works on a copy.
        slots: int32 `[B]`, the slot of each row, -1 for padding.
        state: parameters by slot.
        variant: what to compute; a row with temperature 0 stays greedy in every variant.
        out: buffers of at least B rows.
    """
    (sample_triton if use_triton(logits) else sample_reference)(logits, slots, state, variant, out)


def sample_triton(
    logits: torch.Tensor, slots: torch.Tensor, state: SlotTensors, variant: SamplerVariant, out: SampleOutput
) -> None:
    """`sample` by the kernels, for bfloat16, float16 and float32 logits."""
    if logits.shape[0] == 0:
        return
    raw = logits
    if variant >= SamplerVariant.SHAPED:
        logits = raw.clone() if variant is SamplerVariant.LOGPROBS else raw
        adjust_triton(logits, slots, state)
    bests = ChunkBests(logits)
    find_peaks(logits, slots, state, bests)
    with_noise = variant is not SamplerVariant.GREEDY
    if with_noise:
        cut = search_cut(logits, slots, state, bests.peaks) if variant >= SamplerVariant.SHAPED else None
        add_noise(logits, slots, state, bests, cut)
    choose(slots, state, bests, out.tokens, out.nan, with_noise=with_noise)
    if variant is SamplerVariant.LOGPROBS:
        logprobs_triton(raw, slots, out.tokens, out.nan, *_logprob_buffers(out))


def report_logprobs(logits: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor, out: SampleOutput) -> None:
    """Log-probabilities of given tokens, into the buffers of `out` that `LOGPROBS` writes; a NaN row is flagged.

    Args:
        logits: `[B, V]`, as for `sample`.
        slots: int32 `[B]`, -1 for rows that are left alone.
        tokens: int32 `[B]`, from 0 to V - 1.
        out: buffers of B rows.
    """
    out.tokens.copy_(tokens)
    out.nan.copy_(logits.isnan().any(1))
    if use_triton(logits):
        logprobs_triton(logits, slots, out.tokens, out.nan, *_logprob_buffers(out))
        return
    logprobs, ids, rank = _logprob_buffers(out)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    results = logprobs_reference(wide, tokens.long(), out.nan != 0, logprobs.shape[1] - 1, logprobs.dtype)
    for buffer, value in zip((logprobs, ids, rank), results, strict=True):
        _put(buffer, value, slots >= 0)


def _logprob_buffers(out: SampleOutput) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if out.logprobs is None or out.logprob_ids is None or out.rank is None:
        raise ValueError("The LOGPROBS variant writes logprobs, logprob_ids and rank: give SampleOutput all three.")
    return out.logprobs, out.logprob_ids, out.rank


def sample_reference(
    logits: torch.Tensor, slots: torch.Tensor, state: SlotTensors, variant: SamplerVariant, out: SampleOutput
) -> None:
    """`sample` in torch, on any device; on the CPU it skips the work that no row of the batch needs."""
    if logits.shape[0] == 0:
        return
    active = slots >= 0
    at = slots.clamp(min=0).long()
    raw = logits
    if variant >= SamplerVariant.SHAPED:
        logits = raw.clone() if variant is SamplerVariant.LOGPROBS else raw
        adjust_reference(logits, slots, state)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    allowed = stops_masked_reference(logits, at, state)
    flagged = logits.isnan().any(1) | ~allowed.isfinite().any(1)
    tokens = allowed.argmax(1)
    if variant is not SamplerVariant.GREEDY:
        is_sampled = active & (state.temperature[at] > 0)
        if logits.is_cuda or bool(is_sampled.any()):
            shaped = variant >= SamplerVariant.SHAPED
            tokens = torch.where(is_sampled, _sampled_reference(allowed, at, is_sampled, state, shaped), tokens)
    tokens = tokens.masked_fill(flagged, 0)
    _put(out.tokens, tokens, active)
    _put(out.nan, flagged, active)
    if variant is SamplerVariant.LOGPROBS:
        logprobs, ids, rank = _logprob_buffers(out)
        wide = raw if raw.dtype == torch.float64 else raw.float()
        results = logprobs_reference(wide, tokens, flagged, logprobs.shape[1] - 1, logprobs.dtype)
        for buffer, value in zip((logprobs, ids, rank), results, strict=True):
            _put(buffer, value, active)


def _sampled_reference(
    allowed: torch.Tensor, at: torch.Tensor, is_sampled: torch.Tensor, state: SlotTensors, shaped: bool
) -> torch.Tensor:
    """The Gumbel-max token of each row, int64 `[B]`; rows that are not sampled hold any token."""
    temperature = torch.where(is_sampled, state.temperature[at], 1.0).to(allowed.dtype)[:, None]
    top_k, top_p = state.top_k[at], state.top_p[at]
    vocabulary = allowed.shape[1]
    peak = allowed.amax(1, keepdim=True)
    scaled = (allowed - peak).masked_fill(allowed == peak, 0.0) / temperature
    stays = (allowed > float("-inf")) & (scaled >= state.log_min_p[at][:, None])
    filters = is_sampled & (((top_k > 0) & (top_k < vocabulary)) | (top_p < 1))
    if shaped and (allowed.is_cuda or bool(filters.any())):
        stays = stays & (allowed >= cut_reference(allowed, scaled.masked_fill(~stays, float("-inf")), top_k, top_p))
    noise = noise_reference(state.seed[at], state.num_tokens[at], vocabulary, allowed.dtype)
    return torch.where(stays, scaled + noise, float("-inf")).argmax(1)


def _put(buffer: torch.Tensor, values: torch.Tensor, active: torch.Tensor) -> None:
    """Writes the rows of active slots in place."""
    target = buffer[: values.shape[0]]
    mask = active.reshape(-1, *[1] * (values.dim() - 1))
    target.copy_(torch.where(mask, values.to(buffer.dtype), target))
