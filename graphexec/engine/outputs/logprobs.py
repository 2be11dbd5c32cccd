"""Log-probabilities of a step, from the record's extra words to the requests that asked for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from graphexec.plan import FloatArray, Int32Array, StepResult

__all__ = ["PROMPT_LOGPROBS", "LogprobArrays", "LogprobRows", "PromptChunk", "PromptLogprobRows", "TokenLogprobs"]

PROMPT_LOGPROBS = "prompt_logprobs"
"""The variant of a step that reports log-probabilities of prompt tokens, beside what the dearest sampler does."""

LogprobArrays = tuple[FloatArray, Int32Array, Int32Array]
"""Log-probabilities `[N, 1 + top]`, their token ids `[N, 1 + top]`, ranks `[N]`."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one token, of the model's own distribution (before temperature and filters).

    Attributes:
        token_id: the chosen token, or the prompt's.
        logprob: its log-probability.
        rank: 1 + the number of tokens that are more likely.
        top: `(token id, log-probability)` of the most likely tokens, the best first; as many as were asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class PromptChunk(NamedTuple):
    """Positions `begin` to `end - 1` of a sequence, computed in one step."""

    begin: int
    end: int


class LogprobRows:
    """Log-probabilities of one step, by slot. The device packs them by the index of the active slot."""

    def __init__(self, arrays: LogprobArrays, result: StepResult) -> None:
        self._arrays = arrays
        self._index = np.cumsum(result.num_tokens >= 0) - 1

    def of(self, slot: int, top: int) -> TokenLogprobs:
        """Those of the token of `slot`, with the `top` most likely ones."""
        return _row(self._arrays, int(self._index[slot]), top)


class PromptLogprobRows:
    """Log-probabilities of the prompt tokens behind each row of one step's chunks.

    Args:
        arrays: by row of the step.
        chunks: all chunks of the step, by slot; the other slots that ran have one row.
        result: of the step, which says which slots ran.
    """

    def __init__(self, arrays: LogprobArrays, chunks: Mapping[int, PromptChunk], result: StepResult) -> None:
        self._arrays = arrays
        self._chunks = chunks
        self._result = result

    def first_rows(self) -> Iterator[tuple[int, PromptChunk, int]]:
        """Each chunk that ran: its slot, its positions, and its first row.

        Slots of one row lie in front of the longer ones, in ascending order both (`prepare`).
        """
        ran = np.flatnonzero(self._result.num_tokens >= 0).tolist()
        chunks = [(slot, self._chunks.get(slot)) for slot in ran]
        row = 0
        for is_long in (False, True):
            for slot, chunk in chunks:
                rows = 1 if chunk is None else chunk.end - chunk.begin
                if (rows > 1) is not is_long:
                    continue
                if chunk is not None:
                    yield slot, chunk, row
                row += rows

    def of(self, row: int, top: int) -> TokenLogprobs:
        """Those of the token behind a row, with the `top` most likely ones."""
        return _row(self._arrays, row, top)


def _row(arrays: LogprobArrays, row: int, top: int) -> TokenLogprobs:
    logprobs, ids, ranks = arrays
    values, tokens = logprobs[row, : 1 + top].tolist(), ids[row, : 1 + top].tolist()
    return TokenLogprobs(tokens[0], values[0], int(ranks[row]), tuple(zip(tokens[1:], values[1:], strict=True)))
