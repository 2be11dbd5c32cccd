"""A request: what was asked for, once it has been checked. Never changes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from graphexec.deltas import Admission, as_words
from graphexec.engine.params import SamplingParams
from graphexec.kernels.sample import SamplerVariant

__all__ = ["Request"]


@dataclass(frozen=True, eq=False, slots=True)
class Request:
    """One sample of a prompt. What can be worked out before it runs is worked out here, in the caller's thread.

    Attributes:
        request_id: shared by all samples of the prompt.
        stop_ids: the model's own included.
        max_len: tokens, prompt and output, at which it ends.
        biases: token ids and what is added to their logits.
        index: which of the samples of its prompt.
        prompt_words: the prompt's token ids as int32 words; made of them if it is left out.
        admission: what the device learns about it.
        variant: the cheapest sampler that serves it.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    stop_ids: tuple[int, ...]
    seed: int
    max_len: int
    biases: tuple[tuple[int, float], ...] = ()
    index: int = 0
    prompt_words: bytes = field(default=b"", repr=False)
    admission: Admission = field(init=False, repr=False)
    variant: SamplerVariant = field(init=False)

    def __post_init__(self) -> None:
        if not self.prompt_words:
            object.__setattr__(self, "prompt_words", as_words(self.prompt_token_ids))
        object.__setattr__(self, "admission", self._admission())
        object.__setattr__(self, "variant", self._variant())

    def _admission(self) -> Admission:
        params, prompt_len = self.params, len(self.prompt_token_ids)
        return Admission(
            max_len=self.max_len,
            min_len=min(prompt_len + params.min_tokens, self.max_len),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            seed=self.seed,
            stop_ids=self.stop_ids,
            prompt_len=prompt_len,
            log_min_p=math.log(params.min_p) if params.min_p > 0 else -math.inf,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            biases=self.biases,
            stop_sequences=tuple(map(tuple, params.stop_sequences)),
        )

    def _variant(self) -> SamplerVariant:
        params = self.params
        if params.logprobs is not None:
            return SamplerVariant.LOGPROBS
        if params.penalizes or self.biases:
            return SamplerVariant.SHAPED
        if params.temperature == 0:
            return SamplerVariant.GREEDY
        return SamplerVariant.SHAPED if params.top_k or params.top_p < 1 else SamplerVariant.SAMPLED

    @property
    def key(self) -> tuple[str, int]:
        """Tells it from every other request, and from the other samples of its prompt."""
        return self.request_id, self.index

    @property
    def reads_prefix_cache(self) -> bool:
        """Whether cached blocks may stand in for its first tokens.

        Not where the device must see the ids of all tokens, and not where logits of the prompt are asked for.
        """
        params = self.params
        return not (params.penalizes or params.stop_sequences or params.prompt_logprobs is not None)

    def wants_prompt_logprobs(self, begin: int) -> bool:
        """Whether a chunk that begins at that position reports log-probabilities that the user asked for."""
        return self.params.prompt_logprobs is not None and begin < len(self.prompt_token_ids) - 1
