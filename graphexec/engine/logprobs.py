"""Log-probabilities of a step, from the record's extra words to the requests that asked for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from graphexec.plan import FloatArray, Int32Array, StepResult

if TYPE_CHECKING:
    from graphexec.engine.request import Request

__all__ = ["PROMPT_LOGPROBS", "LogprobRows", "PromptChunk", "TokenLogprobs", "take_prompt_logprobs"]

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


def take_prompt_logprobs(
    arrays: LogprobArrays,
    chunks: Mapping[int, PromptChunk],
    owners: Sequence[Request | None],
    result: StepResult,
) -> None:
    """Gives the requests in `owners` the log-probabilities of the prompt tokens behind each row of their chunks.

    Args:
        arrays: by row of the step.
        chunks: all chunks of the step, by slot; the other slots that ran have one row.
        owners: by slot.
        result: of the step, which says which slots ran.
    """
    row = 0
    for slot in np.flatnonzero(result.num_tokens >= 0).tolist():
        chunk, request = chunks.get(slot), owners[slot]
        if chunk is None:
            row += 1
            continue
        if request is not None and request.params.prompt_logprobs is not None:
            _take_chunk(arrays, row, chunk, request, request.params.prompt_logprobs)
        row += chunk.end - chunk.begin


def _take_chunk(arrays: LogprobArrays, first_row: int, chunk: PromptChunk, request: Request, top: int) -> None:
    prompt_len = len(request.prompt_token_ids)
    found = request.prompt_logprobs
    # After a preemption the prompt is computed again, to the same end.
    for position in range(max(chunk.begin, len(found) - 1), min(chunk.end, prompt_len - 1)):
        found.append(_row(arrays, first_row + position - chunk.begin, top))


def _row(arrays: LogprobArrays, row: int, top: int) -> TokenLogprobs:
    logprobs, ids, ranks = arrays
    values, tokens = logprobs[row, : 1 + top].tolist(), ids[row, : 1 + top].tolist()
    return TokenLogprobs(tokens[0], values[0], int(ranks[row]), tuple(zip(tokens[1:], values[1:], strict=True)))
