"""The intake: turns prompts into requests in the caller's thread, and hands them to the engine's."""

from __future__ import annotations

import itertools
import math
import operator
from collections import deque
from collections.abc import Mapping, Sequence
from numbers import Integral

from graphexec.engine.detokenizer import Detokenizer, Tokenizer
from graphexec.engine.params import SamplingParams
from graphexec.engine.request import Request
from graphexec.engine.stop_strings import StopStrings
from graphexec.errors import RequestError
from graphexec.slots import SlotLimits

__all__ = ["Intake", "Prompt", "as_batch"]

Prompt = str | Sequence[int]
"""A text, or token ids."""


class Intake:
    """Checks what comes in, and queues it. `submit` and `abort` may be called from any thread."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        limits: SlotLimits,
        num_kv_blocks: int,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        seed: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._num_kv_blocks = num_kv_blocks
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._seed = seed
        self._ids = itertools.count()
        self._arrivals: deque[Request] = deque()
        self._aborts: deque[str] = deque()

    def submit(self, prompt: Prompt, params: SamplingParams, live: dict[str, list[Request]]) -> str:
        """Queues a request for each sample, and enters them among the `live` ones before the engine's thread sees them.

        Returns:
            Their request id.

        Raises:
            RequestError: it cannot be served; nothing was queued.
        """
        requests = self._make(prompt, params)
        request_id = requests[0].request_id
        live[request_id] = list(requests)
        self._arrivals.extend(requests)
        return request_id

    def refuse(self, params: SamplingParams, refusal: RequestError) -> Request:
        """A request that has failed before it was queued."""
        request = Request(f"refused-{next(self._ids)}", (), params, (), 0, 0, None)
        request.finish("error", str(refusal))
        return request

    def abort(self, request_id: str) -> None:
        self._aborts.append(request_id)

    def take(self) -> tuple[list[Request], list[str]]:
        """What has come in since the last call: requests, and the ids of those to abort.

        Aborts are taken out first: an abort that is seen was called after its request was queued, which is then seen
        as well.
        """
        aborts = [self._aborts.popleft() for _ in range(len(self._aborts))]
        arrivals = [self._arrivals.popleft() for _ in range(len(self._arrivals))]
        return arrivals, aborts

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """See Engine.chat."""
        if self._tokenizer is None or not getattr(self._tokenizer, "chat_template", None):
            raise RequestError("The model has no chat template.")
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
            return self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as failure:  # a template is a program of the checkpoint's, and raises what it likes
            raise RequestError(f"The model's chat template refuses the conversation: {failure}") from failure

    def _make(self, prompt: Prompt, params: SamplingParams) -> list[Request]:
        token_ids = self._token_ids(prompt)
        biases = self._biases(params)
        self._check_stops(params)
        number = next(self._ids)
        eos = () if params.ignore_eos else self._eos_token_ids
        stop_ids = tuple(dict.fromkeys((*eos, *params.stop_token_ids)))
        if len(stop_ids) > self._limits.max_stop_ids:
            raise RequestError(
                f"The request has {len(stop_ids)} stop tokens, the model's own included; the engine holds "
                f"{self._limits.max_stop_ids}. Raise max_stop_token_ids."
            )
        max_len = min(len(token_ids) + params.max_tokens, self._limits.max_tokens)
        blocks = -(-(max_len - 1) // self._limits.block_size)
        if blocks > self._num_kv_blocks:
            raise RequestError(
                f"The request may need {blocks} KV blocks, and the cache has {self._num_kv_blocks}. "
                "Lower max_tokens, or raise num_kv_blocks."
            )
        # Knuth's multiplier spreads consecutive requests over the seeds; any odd number would do.
        seed = params.seed if params.seed is not None else (self._seed + 1 + number) * 2654435761
        return [
            Request(
                request_id=str(number),
                index=index,
                prompt_token_ids=token_ids,
                params=params,
                stop_ids=stop_ids,
                biases=biases,
                seed=(seed + index) % 2**63,
                max_len=max_len,
                detokenizer=Detokenizer(self._tokenizer) if self._tokenizer is not None else None,
                stop_strings=self._stop_strings(params),
            )
            for index in range(params.n)
        ]

    def _biases(self, params: SamplingParams) -> tuple[tuple[int, float], ...]:
        biases = {**params.logit_bias, **dict.fromkeys(params.bad_token_ids, -math.inf)}
        for name in ("logit_bias", "bad_token_ids"):
            wrong = next((token for token in getattr(params, name) if token >= self._vocab_size), None)
            if wrong is not None:
                raise RequestError(
                    f"{name} has the token id {wrong}, outside the vocabulary of {self._vocab_size} entries."
                )
        if len(biases) > self._limits.max_biases:
            raise RequestError(
                f"logit_bias and bad_token_ids name {len(biases)} tokens; the engine holds "
                f"{self._limits.max_biases}. Raise max_biased_token_ids."
            )
        return tuple(biases.items())

    def _check_stops(self, params: SamplingParams) -> None:
        if len(params.stop_sequences) > self._limits.max_stop_sequences:
            raise RequestError(
                f"The request has {len(params.stop_sequences)} stop_sequences; the engine holds "
                f"{self._limits.max_stop_sequences}. Raise max_stop_sequences."
            )
        longest = max(map(len, params.stop_sequences), default=0)
        if longest > self._limits.max_stop_sequence_tokens:
            raise RequestError(
                f"One of stop_sequences has {longest} tokens; the engine holds "
                f"{self._limits.max_stop_sequence_tokens}. Raise max_stop_sequence_tokens."
            )

    def _stop_strings(self, params: SamplingParams) -> StopStrings | None:
        if not params.stop:
            return None
        if self._tokenizer is None:
            raise RequestError("The model has no tokenizer, so that there is no text to find `stop` in.")
        return StopStrings(params.stop, self._tokenizer, params.min_tokens)

    def _token_ids(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise RequestError("The model has no tokenizer: give the prompt as a list of token ids.")
            try:
                prompt = self._tokenizer.encode(prompt)
            except Exception as failure:  # e.g. a lone surrogate; tokenizers raise what they like
                raise RequestError(f"The tokenizer refuses the prompt: {failure}") from failure
        try:
            token_ids = tuple(map(operator.index, prompt))
        except TypeError as failure:
            raise RequestError(f"A prompt is a text or a list of token ids: {failure}.") from failure
        if not token_ids:
            raise RequestError("The prompt is empty: it must have at least one token.")
        if len(token_ids) >= self._limits.max_tokens:
            raise RequestError(
                f"The prompt has {len(token_ids)} tokens; with max_model_len={self._limits.max_tokens} "
                "it may have one less than that."
            )
        wrong = next((token for token in token_ids if not 0 <= token < self._vocab_size), None)
        if wrong is not None:
            raise RequestError(f"Token id {wrong} is outside the vocabulary of {self._vocab_size} entries.")
        return token_ids


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, or several, as a list."""
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) > 0 and all(isinstance(entry, Integral) for entry in prompts):
        return [prompts]  # type: ignore[list-item]  # a list of ints is one prompt
    return list(prompts)  # type: ignore[arg-type]  # and anything else is a list of prompts
