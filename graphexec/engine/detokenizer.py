"""Text from tokens, piece by piece: tokens of one character may arrive in different steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

__all__ = ["Detokenizer", "Tokenizer"]

_REPLACEMENT = "\ufffd"


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer: a subset of transformers' interface."""

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...

    def apply_chat_template(
        self, conversation: list[Mapping[str, str]], *, tokenize: Literal[False], add_generation_prompt: bool
    ) -> str: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...


class Detokenizer:
    """Incremental decoding of one request's output.

    Decodes only the tokens behind the last complete piece, together with that piece, since the text of a token can
    depend on the token before it (word boundaries). Remembers where each token's text ends, so that the output of an
    earlier step can still be asked for.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._text = ""
        self._ends: list[int] = []  # length of the complete text behind each token
        self._context = 0  # first token that is decoded again as context
        self._complete = 0  # tokens whose text is complete

    def text(self, token_ids: Sequence[int], end: int, final: bool) -> str:
        """Text of the first `end` tokens; `final` also gives what an incomplete character at their end decodes to."""
        while len(self._ends) < end:
            self._take(token_ids, len(self._ends) + 1)
        complete = self._text[: self._ends[end - 1]] if end else ""
        if final and end == len(self._ends):
            complete += self._pending(token_ids, end)
        return complete

    def _take(self, token_ids: Sequence[int], end: int) -> None:
        pending = self._pending(token_ids, end)
        if pending and not pending.endswith(_REPLACEMENT):
            self._text += pending
            self._context, self._complete = self._complete, end
        self._ends.append(len(self._text))

    def _pending(self, token_ids: Sequence[int], end: int) -> str:
        known = self._decode(token_ids[self._context : self._complete])
        return self._decode(token_ids[self._context : end])[len(known) :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)
