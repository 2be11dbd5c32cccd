"""The text of one request's output as its consumer reads it: what was shown once stays."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial

from graphexec.engine.text.detokenizer import Detokenizer
from graphexec.engine.text.stop_strings import held_back
from graphexec.models.tokenizer import Tokenizer

__all__ = ["OutputText"]


class OutputText:
    """Decodes when it is read, and no token twice. Belongs to the consumer's thread.

    Args:
        tokenizer: may raise what it likes: the text then ends there, and `failure` says why.
        stop: stop strings; what may become one is held back.
        stop_sequences: token sequences, likewise.
        report: told of a failure, once.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        stop_sequences: Sequence[Sequence[int]],
        report: Callable[[str], None],
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=1)
        self._sequences = [tuple(sequence) for sequence in stop_sequences]
        self._report = report
        self._pieces: list[str] = []  # by token
        self._ends: list[int] = []  # characters up to and with each token
        self._incomplete = ""  # what stands behind them, once the output has ended
        self.failure: str | None = None

    def shown(self, token_ids: Sequence[int], end: int) -> int:
        """Characters of the first `end` tokens that no later token can make part of a stop."""
        if self._sequences:
            end = self._safe_tokens(token_ids, end)
        length = self._take(token_ids, end)
        if not self._stop:
            return length
        return length - held_back(self.between(max(length - self._longest + 1, 0), length), self._stop)

    def shown_at_end(self, token_ids: Sequence[int], end: int, cut: int | None) -> int:
        """Characters of the first `end` tokens of an output that has ended, `cut` where a stop string begins.

        With what an incomplete character at their end decodes to.
        """
        length = self._take(token_ids, end)
        if end == len(self._ends):
            self._incomplete = self._guarded(self._detokenizer.pending)
            length += len(self._incomplete)
        return length if cut is None else min(length, cut)

    def between(self, begin: int, end: int) -> str:
        """Characters `begin` to `end - 1`."""
        if begin >= end:
            return ""
        first = bisect_right(self._ends, begin)
        last = bisect_right(self._ends, end - 1)
        before = self._ends[first - 1] if first else 0
        return "".join([*self._pieces[first : last + 1], self._incomplete])[begin - before : end - before]

    def _take(self, token_ids: Sequence[int], end: int) -> int:
        """Decodes the tokens up to `end` that are new, and returns how many characters are complete with them."""
        length = self._ends[-1] if self._ends else 0
        for token in token_ids[len(self._ends) : end]:
            piece = self._guarded(partial(self._detokenizer.add, token))
            length += len(piece)
            self._pieces.append(piece)
            self._ends.append(length)
        return self._ends[end - 1] if end else 0

    def _guarded(self, decode: Callable[[], str]) -> str:
        """What `decode` returns, or nothing once the tokenizer has failed."""
        if self.failure is not None:
            return ""
        try:
            return decode()
        except Exception as failure:
            self.failure = f"The tokenizer cannot decode the output: {type(failure).__name__}: {failure}"
            self._report(self.failure)
            return ""

    def _safe_tokens(self, token_ids: Sequence[int], end: int) -> int:
        """Of the first `end` output tokens, those that cannot become part of a stop sequence."""
        longest = max(map(len, self._sequences))
        for count in range(min(longest - 1, end), 0, -1):
            tail = tuple(token_ids[end - count : end])
            if any(len(sequence) > count and sequence[:count] == tail for sequence in self._sequences):
                return end - count
        return end
