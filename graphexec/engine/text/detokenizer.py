"""Text from tokens, piece by piece: tokens of one character may arrive in different steps.

Invariant: a token costs the same however long the output is, and whatever it holds.
"""

from __future__ import annotations

from graphexec.models.tokenizer import Tokenizer

__all__ = ["Detokenizer"]

_REPLACEMENT = "\ufffd"
_WINDOW = 8  # tokens, of complete text, that are decoded again with a new one before the window moves on
_MOST_HELD = 12  # tokens without a complete text; a character has at most 4 bytes, hence tokens, so these hold none
_KEPT = 6  # of them that stay in the window, with room for an incomplete character at their end


class Detokenizer:
    """Incremental decoding of one request's output.

    Decodes a window of the last tokens again with each new one, since the text of a token can depend on the tokens
    before it (word boundaries, bytes of a character), and gives out what is new at the window's end.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._known = 0  # characters of the window's text that were given out
        self._held = 0  # tokens at the window's end whose text is incomplete
        self._textless: dict[int, bool] = {}

    def add(self, token: int) -> str:
        """The text that is complete with the next token of the output, and was not before."""
        self._window.append(token)
        text = self._decode(self._window)
        piece = text[self._known :]
        if piece and not piece.endswith(_REPLACEMENT):
            self._settle(text)
            return piece
        if not piece and self._is_textless(token):
            self._window.pop()
            return ""
        self._held += 1
        return self._give_up(piece) if self._held > _MOST_HELD else ""

    def pending(self) -> str:
        """What an incomplete character at the end of the output decodes to."""
        return self._decode(self._window)[self._known :] if self._held else ""

    def _settle(self, text: str) -> None:
        """All of the window's text was given out; of a long window, the last piece suffices for what follows."""
        last_piece = self._held + 1
        self._held = 0
        if len(self._window) < _WINDOW:
            self._known = len(text)
        else:
            self._window = self._window[-last_piece:]
            self._known = len(self._decode(self._window))

    def _give_up(self, piece: str) -> str:
        """Gives out what no later token can complete: all but a few replacement characters at the end."""
        unsure = min(len(piece) - len(piece.rstrip(_REPLACEMENT)), 3)
        self._window = self._window[-_KEPT:]
        self._known = max(len(self._decode(self._window)) - unsure, 0)  # the two windows end alike
        self._held = min(unsure, _KEPT)
        return piece[: len(piece) - unsure]

    def _is_textless(self, token: int) -> bool:
        """Whether it is a special token, which decoding skips: it can become part of no character."""
        known = self._textless.get(token)
        if known is None:
            shown = self._tokenizer.decode([token], skip_special_tokens=False)
            known = self._textless[token] = bool(shown) and not self._decode([token])
        return known

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)
