"""What a user asks of one request."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import SupportsIndex

from graphexec.errors import RequestError

__all__ = ["MAX_LOGPROBS", "SamplingParams"]

MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How a request is sampled and when it ends.

    Attributes:
        max_tokens: most output tokens.
        min_tokens: stop tokens cannot be chosen before that many output tokens.
        temperature: 0 is greedy.
        top_k: choose among the k most likely tokens; 0 for all. Tokens as likely as the k-th are kept.
        top_p: choose among the most likely tokens that together have this probability; 1 for all.
        seed: of this request's random numbers; None for one that the engine derives from its own.
        stop_token_ids: end the request, beside the model's own end tokens; the one that did is part of the output.
        ignore_eos: do not end at the model's own end tokens.
        logprobs: None, or the number of most likely tokens (0 to 20) to report beside the chosen one.

    Raises:
        RequestError: a value is out of range; the message names it.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "min_tokens", "top_k", "seed", "logprobs"):
            self._convert(name, operator.index, "a whole number")
        for name in ("temperature", "top_p"):
            self._convert(name, float, "a number")
        self._convert("stop_token_ids", _token_ids, "a list of token ids")
        _require(1 <= self.max_tokens < 2**31, "max_tokens", self.max_tokens, "at least 1")
        _require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "between 0 and max_tokens")
        good = math.isfinite(self.temperature) and self.temperature >= 0
        _require(good, "temperature", self.temperature, "a finite number, 0 or more")
        _require(0 <= self.top_k < 2**31, "top_k", self.top_k, "0 (all tokens) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(self.seed is None or 0 <= self.seed < 2**63, "seed", self.seed, "between 0 and 2**63 - 1")
        valid_stops = all(0 <= token < 2**31 for token in self.stop_token_ids)
        _require(valid_stops, "stop_token_ids", self.stop_token_ids, "a list of token ids")
        valid_logprobs = self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS
        _require(valid_logprobs, "logprobs", self.logprobs, f"None or between 0 and {MAX_LOGPROBS}")

    def _convert(self, name: str, convert: Callable[..., object], meaning: str) -> None:
        value = getattr(self, name)
        if value is None and name in ("seed", "logprobs"):
            return
        try:
            object.__setattr__(self, name, convert(value))
        except (TypeError, ValueError, OverflowError):
            _require(False, name, value, meaning)


def _token_ids(values: Iterable[SupportsIndex]) -> tuple[int, ...]:
    return tuple(map(operator.index, values))


def _require(holds: bool, name: str, value: object, meaning: str) -> None:
    if not holds:
        raise RequestError(f"{name}={value!r} is not possible: it must be {meaning}.")
