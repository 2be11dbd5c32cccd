"""What a request must produce, written once more without slots, caches or kernels: the whole sequence through
transformers' model for every token, and plain torch on its logits. The random numbers alone are the project's."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch

from graphexec import SamplingParams
from graphexec.kernels.gumbel import noise_reference
from tests.support.traffic import Outcome, PlainLogprob

__all__ = ["PlainModel"]


@dataclass(frozen=True)
class PlainModel:
    """A causal language model of transformers, in float64."""

    model: torch.nn.Module
    eos_token_id: int
    max_model_len: int

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """float64 `[len(tokens), V]`."""
        return self.model(torch.tensor([tokens])).logits[0]

    def run(self, prompt: tuple[int, ...], params: SamplingParams, sample: int = 0) -> Outcome:
        """Tokens, finish reason and log-probabilities of one sample; stop strings are left out."""
        output: list[int] = []
        logprobs: list[PlainLogprob] = []
        reason = None
        while reason is None:
            raw = self.logits([*prompt, *output])[-1]
            token = self._choose(raw, prompt, output, params, sample)
            output.append(token)
            if params.logprobs is not None:
                logprobs.append(_logprob(raw, token))
            reason = self._reason(prompt, output, params)
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            rows = self.logits(list(prompt))
            behind = [_logprob(row, token) for row, token in zip(rows, prompt[1:], strict=False)]
            prompt_logprobs = (None, *behind)
        return Outcome(tuple(output), reason, None if params.logprobs is None else tuple(logprobs), prompt_logprobs)

    def _choose(
        self, raw: torch.Tensor, prompt: tuple[int, ...], output: list[int], params: SamplingParams, sample: int
    ) -> int:
        logits = adjusted(raw, prompt, output, params)
        if len(output) < params.min_tokens:
            stops = [*params.stop_token_ids, *([] if params.ignore_eos else [self.eos_token_id])]
            logits[stops] = -math.inf
        if params.temperature == 0:
            return int(logits.argmax())
        probabilities = torch.softmax(logits / params.temperature, 0)
        keep = probabilities >= params.min_p * probabilities.max()
        if params.top_k:
            keep &= probabilities >= probabilities.sort(descending=True).values[min(params.top_k, len(logits)) - 1]
        if params.top_p < 1:
            kept = torch.where(keep, probabilities, 0.0)
            values, order = (kept / kept.sum()).sort(descending=True)
            before = values.cumsum(0) - values  # mass of the likelier tokens
            keep[order[before >= params.top_p]] = False
        seed = torch.tensor([(params.seed + sample) % 2**63])
        index = torch.tensor([len(prompt) + len(output)], dtype=torch.int32)
        noise = noise_reference(seed, index, len(logits), torch.float64)[0]
        return int(torch.where(keep, probabilities.log() + noise, -math.inf).argmax())

    def _reason(self, prompt: tuple[int, ...], output: list[int], params: SamplingParams) -> str | None:
        if len(output) > params.min_tokens:
            stops = {*params.stop_token_ids, *(() if params.ignore_eos else (self.eos_token_id,))}
            sequences = [list(sequence) for sequence in params.stop_sequences]
            if output[-1] in stops or any(output[-len(sequence) :] == sequence for sequence in sequences):
                return "stop"
        full = len(output) >= params.max_tokens or len(prompt) + len(output) >= self.max_model_len
        return "length" if full else None


def adjusted(raw: torch.Tensor, prompt: tuple[int, ...], output: list[int], params: SamplingParams) -> torch.Tensor:
    """The logits with bias and penalties, token by token."""
    logits = raw.clone()
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    logits[list(params.bad_token_ids)] = -math.inf
    counts = Counter(output)
    for token in {*prompt, *output}:
        value = float(logits[token])
        value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * counts[token] + params.presence_penalty * (counts[token] > 0)
        logits[token] = value
    return logits


def _logprob(raw: torch.Tensor, token: int) -> PlainLogprob:
    logprobs = raw.log_softmax(0)
    return token, float(logprobs[token]), 1 + int((raw > raw[token]).sum())
