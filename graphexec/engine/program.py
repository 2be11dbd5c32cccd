"""The decoder step as a step program: prepare, forward, sample, update, over fixed buffers."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import numpy as np
import torch

from graphexec.engine.outputs.logprobs import PROMPT_LOGPROBS, LogprobArrays
from graphexec.engine.params import MAX_LOGPROBS
from graphexec.kernels.attention import AttentionRows, attention_rows
from graphexec.kernels.lang import use_triton
from graphexec.kernels.paged_decode import DecodeSplits, DecodeWorkspace, choose_decode_splits, choose_decode_tile
from graphexec.kernels.prepare import prepare
from graphexec.kernels.sample import SampleOutput, SamplerVariant, report_logprobs, sample
from graphexec.kernels.update import update
from graphexec.models.decoder import Decoder
from graphexec.models.layers import EXERCISED_BLOCKS
from graphexec.plan import DeviceIO, FloatArray, GraphKey, Int32Array, RecordLayout, StepProgram
from graphexec.slots import SlotLimits, SlotState

__all__ = ["DecoderProgram"]

_ANY_TILE = 32  # where a reference attends, which splits nothing
_PROMPT_ROWS = 256
"""Rows whose logits stand in memory at the same time when a prompt's log-probabilities are asked for."""


class DecoderProgram(StepProgram):
    """One decode or mixed step of a decoder model.

    Padding rows run through the model with token 0; they write no KV, and nothing reads what comes out.
    """

    variants = tuple(variant.value for variant in SamplerVariant)
    common_variants = (SamplerVariant.GREEDY.value, SamplerVariant.SAMPLED.value)
    # Sampling serves greedy rows, too, and costs 7 us more for 8 slots and 150 us for 256, in a step of milliseconds.
    mixed_variants = MappingProxyType({SamplerVariant.GREEDY.value: SamplerVariant.SAMPLED.value})
    chunk_variants = (PROMPT_LOGPROBS,)

    def __init__(self, decoder: Decoder, lm_head: torch.nn.Module, limits: SlotLimits) -> None:
        weight = decoder.embedding
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
        self._prompt_out = _allocate_output(limits.max_rows, self._logprob_dtype, weight.device)
        output_words, prompt_words = _words(self._out), _words(self._prompt_out)
        self.extra_words = {
            SamplerVariant.LOGPROBS.value: output_words,
            PROMPT_LOGPROBS: output_words + prompt_words,
        }
        self.record = RecordLayout(limits.max_slots, extra_words=output_words + prompt_words)
        # With dynamic=True a float of a module would be dynamic, too: torch finds that it can't be, and traces again.
        self._with_constant_floats = torch._dynamo.config.patch(specialize_float=True)
        attention = decoder.attentions[0]
        self._num_kv_heads = attention.num_kv_heads
        self._decode_tile = _ANY_TILE
        self._workspace: DecodeWorkspace | None = None
        if use_triton(weight):
            group = attention.num_heads // attention.num_kv_heads
            self._decode_tile = choose_decode_tile(attention.head_dim, group, weight.element_size()).block_n
            longest = torch.tensor(limits.max_tokens)
            splits = max(rows * int(self._splits(rows).of(longest)) for rows in range(1, limits.max_slots + 1))
            self._workspace = DecodeWorkspace.allocate(
                limits.max_slots, splits, attention.num_heads, attention.num_kv_heads, attention.head_dim, weight.device
            )

    def bind(self, io: DeviceIO) -> None:
        self._io = io

    def apply(self, staging: torch.Tensor) -> None:
        self.state_of_slots.apply(staging)

    def step(self, key: GraphKey) -> None:
        slots, step = self.state_of_slots.slots, self.state_of_slots.step
        shortest_chunk = 1 if _has_only_chunks(key) else 2
        prepare(slots, step, key.rows, key.bucket, self.limits.block_size, self._splits(key.bucket), shortest_chunk)
        if key.bucket:
            hidden = self._forward(key)
            if key.variant == PROMPT_LOGPROBS:
                self._report_prompt(hidden, key)
            if key.has_chunks:  # even if rows and slots happen to be padded to the same number
                hidden = hidden.index_select(0, step.logit_rows[: key.bucket])
            self._sample(self._lm_head(hidden), key)
        update(slots, step, self._out.tokens, self._out.nan, self._io.ring, self._io.counter, self.limits.block_size)

    def _forward(self, key: GraphKey) -> torch.Tensor:
        """Hidden states `[rows, hidden size]`, behind the last norm."""
        step = self.state_of_slots.step
        splits = None if _has_only_chunks(key) else self._splits(key.bucket)
        slots = self.state_of_slots.slots
        rows = AttentionRows(slots, step, key.rows, key.bucket, key.has_chunks, splits, self._workspace)
        with attention_rows(rows), self._with_constant_floats:
            hidden: torch.Tensor = self._decoder(step.input_ids[: key.rows], step.positions[: key.rows])
        return hidden

    def _splits(self, bucket: int) -> DecodeSplits:
        return choose_decode_splits(bucket, self._num_kv_heads, self._decode_tile)

    def _sample(self, logits: torch.Tensor, key: GraphKey) -> None:
        active = self.state_of_slots.step.active_slots[: key.bucket]
        variant = SamplerVariant.LOGPROBS if key.variant == PROMPT_LOGPROBS else SamplerVariant(key.variant)
        sample(logits, active, self.state_of_slots.slots, variant, self._out)
        if variant is SamplerVariant.LOGPROBS:
            self._put_extra(self._out, 0)

    def _report_prompt(self, hidden: torch.Tensor, key: GraphKey) -> None:
        """Log-probabilities of the token behind each row, a few rows at a time: all their logits would not fit."""
        slots, step, out = self.state_of_slots.slots, self.state_of_slots.step, self._prompt_out
        row_slot, last = step.row_slot[: key.rows], slots.token_ids.shape[1] - 1
        behind = (step.positions[: key.rows] + 1).clamp(max=last).long()
        # What lies behind the last known token is no prompt's, and its row is not read; it must be an id all the same.
        targets = slots.token_ids[row_slot.clamp(min=0).long(), behind].clamp(0, self._vocab_size - 1)
        for begin in range(0, key.rows, _PROMPT_ROWS):
            part = slice(begin, min(begin + _PROMPT_ROWS, key.rows))
            report_logprobs(self._lm_head(hidden[part]), row_slot[part], targets[part], _part(out, part))
        self._put_extra(out, self.extra_words[SamplerVariant.LOGPROBS])

    def _put_extra(self, out: SampleOutput, begin: int) -> None:
        """Copies log-probabilities into the record, from word `begin` of its extra words on."""
        words = torch.cat([tensor.reshape(-1).view(torch.int32) for tensor in _parts(out)])
        begin += self.record.base_words
        extra = self._io.ring[:, begin : begin + len(words)]
        extra.index_copy_(0, self._io.counter.remainder(len(extra)).long(), words[None])

    def unpack_logprobs(self, extra: Int32Array) -> LogprobArrays:
        """Those of the output tokens, by index of the active slot."""
        return self._unpack(extra, self.max_slots)

    def unpack_prompt_logprobs(self, extra: Int32Array) -> LogprobArrays:
        """Those of the tokens behind each row of the step."""
        return self._unpack(extra[self.extra_words[SamplerVariant.LOGPROBS] :], self.max_rows)

    def _unpack(self, words: Int32Array, count: int) -> LogprobArrays:
        width, wide = 1 + MAX_LOGPROBS, self._logprob_dtype == torch.float64
        ids = count * width * (2 if wide else 1)
        ranks = ids + count * width
        flat: FloatArray = words[:ids].view(np.float64) if wide else words[:ids].view(np.float32)
        return flat.reshape(count, width), words[ids:ranks].reshape(count, width), words[ranks : ranks + count]

    def state(self) -> Sequence[torch.Tensor]:
        return self.state_of_slots.slots.all()

    def exercise(self, key: GraphKey, generator: torch.Generator) -> None:
        needed = 1 + key.rows // self.limits.block_size + 2 * key.bucket
        num_blocks = min(self._decoder.attentions[0].k_cache.shape[0], max(EXERCISED_BLOCKS, needed))
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


def _has_only_chunks(key: GraphKey) -> bool:
    """Whether no row is left to the decode kernel. Log-probabilities of prompts are found by rows of mixed steps."""
    return key.phase == "prefill" and key.variant != PROMPT_LOGPROBS


def _parts(out: SampleOutput) -> list[torch.Tensor]:
    """What a record carries of it: log-probabilities first, since they may be 8 bytes wide."""
    assert out.logprobs is not None
    assert out.logprob_ids is not None
    assert out.rank is not None
    return [out.logprobs, out.logprob_ids, out.rank]


def _words(out: SampleOutput) -> int:
    return sum(part.nbytes for part in _parts(out)) // 4


def _part(out: SampleOutput, rows: slice) -> SampleOutput:
    logprobs, ids, rank = _parts(out)
    return SampleOutput(out.tokens[rows], out.nan[rows], logprobs[rows], ids[rows], rank[rows])


def _allocate_output(count: int, logprob_dtype: torch.dtype, device: torch.device) -> SampleOutput:
    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    width = 1 + MAX_LOGPROBS
    return SampleOutput(
        tokens=ints(count),
        nan=ints(count),
        logprobs=torch.zeros(count, width, dtype=logprob_dtype, device=device),
        logprob_ids=ints(count, width),
        rank=ints(count),
    )
