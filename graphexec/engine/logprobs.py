"""Log-probabilities of a step, from the record's extra words to the requests that asked for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphexec.plan import FloatArray, Int32Array, StepResult

__all__ = ["LogprobRows", "TokenLogprobs"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one output token, of the model's own distribution (before temperature and filters).

    Attributes:
        token_id: the chosen token.
        logprob: its log-probability.
        rank: 1 + the number of tokens that are more likely.
        top: `(token id, log-probability)` of the most likely tokens, the best first; as many as were asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class LogprobRows:
    """Log-probabilities of one step, by slot. The device packs them by the index of the active slot."""

    def __init__(self, arrays: tuple[FloatArray, Int32Array, Int32Array], result: StepResult) -> None:
        self._logprobs, self._ids, self._ranks = arrays
        self._index = np.cumsum(result.num_tokens >= 0) - 1

    def of(self, slot: int, top: int) -> TokenLogprobs:
        """Those of the token of `slot`, with the `top` most likely ones."""
        row = int(self._index[slot])
        values, ids = self._logprobs[row, : 1 + top].tolist(), self._ids[row, : 1 + top].tolist()
        pairs = tuple(zip(ids[1:], values[1:], strict=True))
        return TokenLogprobs(ids[0], values[0], int(self._ranks[row]), pairs)
