"""The intake: turns prompts into requests in the caller's thread, and hands them to the engine's."""

from __future__ import annotations

import itertools
import math
import operator
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import NamedTuple

from graphexec.deltas import as_words
from graphexec.engine.generation import Generation, Live
from graphexec.engine.params import SamplingParams
from graphexec.engine.request import Request
from graphexec.engine.text.output_text import OutputText
from graphexec.engine.text.stop_strings import StopStrings
from graphexec.errors import RequestError
from graphexec.models.tokenizer import Tokenizer
from graphexec.slots import SlotLimits

__all__ = ["Abort", "Intake", "Prompt", "as_batch"]

Prompt = str | Sequence[int]
"""A text, or token ids."""


class Abort(NamedTuple):
    """The wish to end a request.

    Attributes:
        request_id: whose.
        sample: which of its samples; None for all.
        error: why, where it failed; None where somebody wants it to end.
    """

    request_id: str
    sample: int | None = None
    error: str | None = None


class Intake:
    """Checks what comes in, and queues it. `submit` and `abort` may be called from any thread.

    Args:
        live: the requests that were not ended yet; those that come in are entered.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        limits: SlotLimits,
        num_kv_blocks: int,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        seed: int,
        live: Live,
    ) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._num_kv_blocks = num_kv_blocks
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._seed = seed
        self._live = live
        self._ids = itertools.count()
        self._arrivals: deque[Generation] = deque()
        self._aborts: deque[Abort] = deque()
        self._closing = threading.Lock()
        self._closed: RequestError | None = None

    def check(self, prompt: Prompt, params: SamplingParams) -> list[Generation]:
        """A request for each sample of a prompt, not queued yet.

        Raises:
            RequestError: it cannot be served.
        """
        requests = self._make(prompt, params)
        return [Generation(each, self._output_text(each), self._stop_strings(params)) for each in requests]

    def submit(self, generations: Sequence[Generation]) -> None:
        """Queues what `check` made: enters it among the live requests, and lets the engine's thread see it.

        Raises:
            RequestError: nothing comes in any more; nothing was queued.
        """
        with self._closing:
            if self._closed is not None:
                raise self._closed
            request = generations[0].request
            self._live[request.request_id] = {each.request.index: each for each in generations}
            self._arrivals.extend(generations)

    def refuse(self, params: SamplingParams, refusal: RequestError) -> Generation:
        """A request that has failed before it was queued."""
        generation = Generation(Request(f"refused-{next(self._ids)}", (), params, (), 0, 0))
        generation.finish("error", str(refusal))
        return generation

    def abort(self, abort: Abort) -> None:
        """Takes no lock: the garbage collector calls it too, in the middle of anything."""
        self._aborts.append(abort)

    def take(self) -> tuple[list[Generation], list[Abort]]:
        """What has come in since the last call: requests, and those to abort.

        Aborts are taken out first: an abort that is seen was called after its request was queued, which is then seen
        as well.
        """
        aborts = [self._aborts.popleft() for _ in range(len(self._aborts))]
        arrivals = [self._arrivals.popleft() for _ in range(len(self._arrivals))]
        return arrivals, aborts

    def close(self, why: RequestError) -> None:
        """From now on nothing comes in: `submit` raises `why`."""
        with self._closing:
            self._closed = why

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
        words = as_words(token_ids)
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
                prompt_words=words,
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

    def _output_text(self, request: Request) -> OutputText | None:
        if self._tokenizer is None:
            return None
        params = request.params
        report = partial(self._report, request.request_id, request.index)
        return OutputText(self._tokenizer, params.stop, params.stop_sequences, report)

    def _report(self, request_id: str, index: int, error: str) -> None:
        self.abort(Abort(request_id, index, error))

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
