"""A placement: where a request is, and how far. Owned by the scheduler; nobody else reads it."""

from __future__ import annotations

from dataclasses import dataclass

from graphexec.engine.generation import Generation

__all__ = ["Placement"]


@dataclass(eq=False, slots=True)
class Placement:
    """A request that waits or runs.

    Attributes:
        slot: None while it waits.
        shared: blocks, from the first on, that it found in the prefix cache.
        computed: tokens that are cached, or whose computation was scheduled, while the prompt is being computed.
        entered: blocks that the prefix cache knows, from the first on.
        chain: what the prefix cache calls the tokens in them.
        words: all its tokens at its admission, as int32 words.
        distrusts: it met NaN behind blocks that nobody had vouched for, and is computed again without such.
    """

    generation: Generation
    slot: int | None = None
    shared: int = 0
    computed: int = 0
    entered: int = 0
    chain: int = 0
    words: bytes = b""
    distrusts: bool = False
