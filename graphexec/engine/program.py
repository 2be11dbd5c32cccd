"""The decoder step as a step program: prepare, forward, sample, update, over fixed buffers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from graphexec.engine.architectures import EXERCISED_BLOCKS, Decoder
from graphexec.engine.params import MAX_LOGPROBS
from graphexec.kernels.attention import AttentionRows, attention_rows
from graphexec.kernels.paged_decode import choose_splits
from graphexec.kernels.prepare import prepare
from graphexec.kernels.sample import SampleOutput, SamplerVariant, SamplingState, sample
from graphexec.kernels.update import update
from graphexec.plan import DeviceIO, FloatArray, GraphKey, Int32Array, RecordLayout, StepProgram
from graphexec.slots import SlotLimits, SlotState

__all__ = ["DecoderProgram"]


class DecoderProgram(StepProgram):
    """One decode or mixed step of a decoder model.

    Padding rows run through the model with token 0; they write no KV, and nothing reads what comes out.
    """

    variants = tuple(variant.value for variant in SamplerVariant)
    variants_with_extra = frozenset({SamplerVariant.LOGPROBS.value})

    def __init__(self, decoder: Decoder, lm_head: torch.nn.Module, limits: SlotLimits) -> None:
        weight = decoder.embed_tokens.weight
        self._decoder = decoder
        self._lm_head = lm_head
        self._vocab_size = int(weight.shape[0])
        self.limits = limits
        self.state_of_slots = SlotState(limits, weight.device)
        self.max_slots = limits.max_slots
        self.max_rows = limits.max_rows
        self.staging_words = limits.staging_words
        self._logprob_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._out = _allocate_output(limits.max_slots, self._logprob_dtype, weight.device)
        self.record = RecordLayout(limits.max_slots, extra_words=sum(part.nbytes for part in self._extra()) // 4)
        slots = self.state_of_slots.slots
        self._sampling = SamplingState(
            slots.temperature, slots.top_k, slots.top_p, slots.seed, slots.num_tokens, slots.min_len, slots.stop_ids
        )
        is_cuda = weight.device.type == "cuda"
        self._num_sms = torch.cuda.get_device_properties(weight.device).multi_processor_count if is_cuda else 1

    def bind(self, io: DeviceIO) -> None:
        self._io = io

    def apply(self, staging: torch.Tensor) -> None:
        self.state_of_slots.apply(staging)

    def step(self, key: GraphKey) -> None:
        slots, step = self.state_of_slots.slots, self.state_of_slots.step
        prepare(slots, step, key.rows, key.bucket, self.limits.block_size)
        if key.bucket:
            self._sample(self._forward(key), key)
        update(slots, step, self._out.tokens, self._out.nan, self._io.ring, self._io.counter, self.limits.block_size)

    def _forward(self, key: GraphKey) -> torch.Tensor:
        """Logits `[bucket, vocabulary]` of the last row of each active slot."""
        step = self.state_of_slots.step
        num_kv_heads = self._decoder.attentions[0].num_kv_heads
        splits = choose_splits(key.rows, num_kv_heads, self._num_sms) if key.phase == "decode" else 0
        with attention_rows(AttentionRows(self.state_of_slots.slots, step, key.rows, key.bucket, splits)):
            hidden = self._decoder(step.input_ids[: key.rows], step.positions[: key.rows])
        if key.phase == "mixed":  # even if rows and slots happen to be padded to the same number
            hidden = hidden.index_select(0, step.logit_rows[: key.bucket])
        logits: torch.Tensor = self._lm_head(hidden)
        return logits

    def _sample(self, logits: torch.Tensor, key: GraphKey) -> None:
        active = self.state_of_slots.step.active_slots[: key.bucket]
        sample(logits, active, self._sampling, SamplerVariant(key.variant), self._out)
        if key.variant == SamplerVariant.LOGPROBS:
            words = torch.cat([tensor.reshape(-1).view(torch.int32) for tensor in self._extra()])
            extra = self._io.ring[:, self.record.base_words :]
            extra.index_copy_(0, self._io.counter.remainder(len(extra)).long(), words[None])

    def _extra(self) -> list[torch.Tensor]:
        """What the record carries beside tokens: log-probabilities first, since they may be 8 bytes wide."""
        out = self._out
        assert out.logprobs is not None
        assert out.logprob_ids is not None
        assert out.rank is not None
        return [out.logprobs, out.logprob_ids, out.rank]

    def unpack_extra(self, extra: Int32Array) -> tuple[FloatArray, Int32Array, Int32Array]:
        """Log-probabilities `[S, 1 + N]`, their token ids `[S, 1 + N]` and ranks `[S]`, by index of the active slot."""
        slots, width = self.max_slots, 1 + MAX_LOGPROBS
        wide = self._logprob_dtype == torch.float64
        words = slots * width * (2 if wide else 1)
        flat: FloatArray = extra[:words].view(np.float64) if wide else extra[:words].view(np.float32)
        logprobs = flat.reshape(slots, width)
        ids = extra[words : words + slots * width].reshape(slots, width)
        return logprobs, ids, extra[words + slots * width :]

    def state(self) -> Sequence[torch.Tensor]:
        return self.state_of_slots.slots.all()

    def exercise(self, key: GraphKey, generator: torch.Generator) -> None:
        num_blocks = min(self._decoder.attentions[0].k_cache.shape[0], EXERCISED_BLOCKS)
        self.state_of_slots.exercise(key.bucket, key.rows, num_blocks, self._vocab_size, generator)

    def spoil(self, key: GraphKey) -> None:
        places = self.state_of_slots.step.kv_slots[: key.rows]
        places = places[places >= 0]
        size = self.limits.block_size
        for attention in self._decoder.attentions:
            attention.k_cache[places // size, :, places % size] = torch.nan
            attention.v_cache[places // size, :, places % size] = torch.nan

    def observed(self, key: GraphKey) -> Sequence[torch.Tensor]:
        return [self._out.tokens[: key.bucket], self._out.nan[: key.bucket]]


def _allocate_output(max_slots: int, logprob_dtype: torch.dtype, device: torch.device) -> SampleOutput:
    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    width = 1 + MAX_LOGPROBS
    return SampleOutput(
        tokens=ints(max_slots),
        nan=ints(max_slots),
        logprobs=torch.zeros(max_slots, width, dtype=logprob_dtype, device=device),
        logprob_ids=ints(max_slots, width),
        rank=ints(max_slots),
    )
