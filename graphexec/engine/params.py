"""What a user asks of one request."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import SupportsFloat, SupportsIndex

from graphexec.errors import RequestError

__all__ = ["MAX_LOGPROBS", "MAX_SAMPLES", "SamplingParams"]

MAX_LOGPROBS = 20
MAX_SAMPLES = 1024
_MAX_BIAS = 100.0
_LISTS = ("logit_bias", "bad_token_ids", "stop", "stop_token_ids", "stop_sequences")
"""None stands for nothing."""
_LEAST_FLOAT, _LARGEST_FLOAT = 2.0**-126, 2.0**127
"""Within them a number stays what it is on the device, which holds it in float32: neither 0 nor infinite."""


@dataclass(frozen=True)
class SamplingParams:
    """How a request is sampled and when it ends.

    The order in which they act: logit_bias and bad_token_ids, the penalties, min_tokens, temperature, min_p, top_k,
    top_p. Log-probabilities are the model's own, before any of them.

    Attributes:
        max_tokens: most output tokens.
        min_tokens: nothing stops the request before it has that many output tokens; stop tokens cannot be chosen.
        temperature: 0 is greedy.
        top_k: choose among the k most likely tokens; 0 for all. Tokens as likely as the k-th are kept.
        top_p: choose among the most likely tokens that together have this probability; 1 for all.
        min_p: choose among the tokens that are at least this share as likely as the likeliest one; 0 for all.
        repetition_penalty: above 1, tokens of prompt and output become less likely (their logit is divided by it if
            it is positive, else multiplied); between 0 and 1 more likely; 1 for none.
        presence_penalty: -2 to 2; taken from the logit of every token that is in the output.
        frequency_penalty: -2 to 2; taken from the logit of a token as often as the output holds it.
        logit_bias: -100 to 100 by token id; added to the logit.
        bad_token_ids: never chosen.
        seed: of this request's random numbers; None for one that the engine derives from its own.
        n: samples of the prompt; sample i has the seed `seed + i`. More than one needs a temperature.
        stop: texts that end the request; the output ends before the first one, wherever its tokens end.
        stop_token_ids: end the request, beside the model's own end tokens; the one that did is part of the output.
        stop_sequences: token sequences that end the request when the output ends with one; its tokens are part of the
            output, and its text is not.
        ignore_eos: do not end at the model's own end tokens.
        logprobs: None, or the number of most likely tokens (0 to 20) to report beside the chosen one.
        prompt_logprobs: the same for every token of the prompt but the first.

    Raises:
        RequestError: a value is out of range; the message names it.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    bad_token_ids: Sequence[int] = ()
    seed: int | None = None
    n: int = 1
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    stop_sequences: Sequence[Sequence[int]] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "min_tokens", "top_k", "seed", "n", "logprobs", "prompt_logprobs"):
            self._convert(name, operator.index, "a whole number")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            self._convert(name, float, "a number")
        for name in ("stop_token_ids", "bad_token_ids"):
            self._convert(name, _token_ids, "a list of token ids")
        self._convert("stop_sequences", _sequences, "a list of lists of token ids")
        self._convert("logit_bias", _biases, "a dict from token ids to numbers")
        self._convert("stop", _texts, "a text or a list of texts")
        self._check_ranges()
        self._check_lists()

    @property
    def penalizes(self) -> bool:
        """Whether what the sequence holds changes the logits."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def _check_ranges(self) -> None:
        _require(1 <= self.max_tokens < 2**31, "max_tokens", self.max_tokens, "at least 1")
        _require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "between 0 and max_tokens")
        good = self.temperature == 0 or _LEAST_FLOAT <= self.temperature <= _LARGEST_FLOAT
        _require(good, "temperature", self.temperature, "0, or a number above 0 that float32 holds")
        _require(0 <= self.top_k < 2**31, "top_k", self.top_k, "0 (all tokens) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        good = _LEAST_FLOAT <= self.repetition_penalty <= _LARGEST_FLOAT
        _require(good, "repetition_penalty", self.repetition_penalty, "a number above 0 that float32 holds")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(-2 <= getattr(self, name) <= 2, name, getattr(self, name), "between -2 and 2")
        _require(self.seed is None or 0 <= self.seed < 2**63, "seed", self.seed, "between 0 and 2**63 - 1")
        _require(1 <= self.n <= MAX_SAMPLES, "n", self.n, f"between 1 and {MAX_SAMPLES}")
        _require(
            self.n == 1 or self.temperature > 0, "n", self.n, "1 where temperature is 0: all samples were the same"
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= MAX_LOGPROBS, name, value, f"None or between 0 and {MAX_LOGPROBS}")

    def _check_lists(self) -> None:
        for name in ("stop_token_ids", "bad_token_ids"):
            _require(_are_ids(getattr(self, name)), name, getattr(self, name), "a list of token ids")
        good = all(sequence and _are_ids(sequence) for sequence in self.stop_sequences)
        _require(good, "stop_sequences", self.stop_sequences, "a list of lists of token ids, none of them empty")
        good = _are_ids(self.logit_bias) and all(abs(value) <= _MAX_BIAS for value in self.logit_bias.values())
        _require(good, "logit_bias", self.logit_bias, "a dict from token ids to numbers from -100 to 100")
        _require(all(self.stop), "stop", self.stop, "a text or a list of texts, none of them empty")

    def _convert(self, name: str, convert: Callable[..., object], meaning: str) -> None:
        value = getattr(self, name)
        if value is None and name in ("seed", "logprobs", "prompt_logprobs"):
            return
        if value is None and name in _LISTS:
            value = {} if name == "logit_bias" else ()
        try:
            object.__setattr__(self, name, convert(value))
        except (TypeError, ValueError, OverflowError, AttributeError):
            _require(False, name, value, meaning)


def _token_ids(values: Iterable[SupportsIndex]) -> tuple[int, ...]:
    return tuple(map(operator.index, values))


def _sequences(values: Iterable[Iterable[SupportsIndex]]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(_token_ids, values))


def _biases(values: Mapping[SupportsIndex, SupportsFloat]) -> dict[int, float]:
    return {operator.index(token): float(value) for token, value in values.items()}


def _texts(values: str | Iterable[str]) -> tuple[str, ...]:
    texts = (values,) if isinstance(values, str) else tuple(values)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("not a text")
    return texts


def _are_ids(values: Iterable[int]) -> bool:
    return all(0 <= value < 2**31 for value in values)


def _require(holds: bool, name: str, value: object, meaning: str) -> None:
    if not holds:
        raise RequestError(f"{name}={value!r} is not possible: it must be {meaning}.")
