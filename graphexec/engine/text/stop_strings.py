"""Stop strings: found in the text as it grows, wherever the borders of tokens lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from graphexec.engine.text.detokenizer import Detokenizer
from graphexec.models.tokenizer import Tokenizer

__all__ = ["StopMatch", "StopStrings", "held_back"]


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

    Decodes by itself: what the consumer reads is the consumer's, who may be in another thread.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Tokenizer, min_tokens: int) -> None:
        self._strings = tuple(strings)
        self._kept = max(map(len, self._strings)) - 1  # characters that may be the beginning of a match
        self._min_tokens = min_tokens
        self._detokenizer = Detokenizer(tokenizer)
        self._searched = 0  # tokens
        self._length = 0  # characters of their text
        self._tail = ""  # the last of them

    def find(self, token_ids: Sequence[int], final: bool = False) -> StopMatch | None:
        """Searches the text of the output tokens that are new since the last call.

        Of several matches that one token completes, the one that begins first counts. What a token below the minimum
        completes is no match. `final` also searches what stands before an incomplete character at the end, which is
        shown when no token follows.
        """
        for token in token_ids[self._searched :]:
            self._searched += 1
            match = self._search(self._detokenizer.add(token))
            if match is not None:
                return match
        return self._search(self._detokenizer.pending()) if final else None

    def _search(self, piece: str) -> StopMatch | None:
        before = len(self._tail)
        text = self._tail + piece
        # From where a match would need a character of the new piece.
        places = [text.find(string, max(before - len(string) + 1, 0)) for string in self._strings]
        begin = self._length - before
        self._length += len(piece)
        self._tail = text[-self._kept :] if self._kept else ""
        found = [place for place in places if place >= 0]
        return StopMatch(self._searched, begin + min(found)) if found and self._searched > self._min_tokens else None


def held_back(text: str, strings: Sequence[str]) -> int:
    """Characters at the end of `text` that can become part of one of `strings`."""
    for length in range(min(max(map(len, strings), default=1) - 1, len(text)), 0, -1):
        if any(string.startswith(text[-length:]) for string in strings):
            return length
    return 0
