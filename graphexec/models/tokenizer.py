"""What the engine needs of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

__all__ = ["Tokenizer"]


class Tokenizer(Protocol):
    """A subset of transformers' interface."""

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...

    def apply_chat_template(
        self, conversation: list[Mapping[str, str]], *, tokenize: Literal[False], add_generation_prompt: bool
    ) -> str: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...
