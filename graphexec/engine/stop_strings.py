"""Stop strings: found in the text as it grows, wherever the borders of tokens lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from graphexec.engine.detokenizer import Detokenizer, Tokenizer

__all__ = ["StopMatch", "StopStrings"]


class StopMatch(NamedTuple):
    """Where an output ends.

    Attributes:
        tokens: output tokens up to and with the one that completed the stop string.
        begin: characters before it.
    """

    tokens: int
    begin: int


class StopStrings:
    """The stop strings of one request, and how far its output was searched. Belongs to the engine's thread.

    Decodes by itself: the request's own detokenizer is the consumer's, who may be in another thread.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Tokenizer, min_tokens: int) -> None:
        self._strings = tuple(strings)
        self._longest = max(map(len, self._strings))
        self._min_tokens = min_tokens
        self._detokenizer = Detokenizer(tokenizer)
        self._searched = 0  # tokens
        self._length = 0  # characters of their text

    def find(self, token_ids: Sequence[int], final: bool = False) -> StopMatch | None:
        """Searches the text of the output tokens that are new since the last call.

        Of several matches that one token completes, the one that begins first counts. What a token below the minimum
        completes is no match. `final` also searches what stands before an incomplete character at the end, which is
        shown when no token follows.
        """
        while self._searched < len(token_ids):
            self._searched += 1
            match = self._search(token_ids, self._searched, final=False)
            if match is not None:
                return match
        return self._search(token_ids, len(token_ids), final=True) if final else None

    def _search(self, token_ids: Sequence[int], end: int, final: bool) -> StopMatch | None:
        text = self._detokenizer.text(token_ids, end, final)
        # From where a match would need a character that is new with this token.
        places = [text.find(string, max(self._length - len(string) + 1, 0)) for string in self._strings]
        found = [place for place in places if place >= 0]
        self._length = len(text)
        return StopMatch(end, min(found)) if found and end > self._min_tokens else None

    def safe_length(self, text: str) -> int:
        """Characters of `text` that cannot become part of a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(string.startswith(text[-length:]) for string in self._strings):
                return len(text) - length
        return len(text)
