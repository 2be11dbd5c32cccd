"""The prefix cache: which KV blocks hold which tokens, who uses them, and which unused one to give up first.

Invariant: a block is found only behind the tokens that its KV was computed behind. Keys are the tokens themselves, so
equal hashes cannot deceive.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["NO_PREFIX", "Prefix", "PrefixCache"]


class Prefix(NamedTuple):
    """The beginning of a sequence that is in the cache: its blocks, and the chain that ends with the last of them."""

    blocks: tuple[int, ...]
    chain: int


NO_PREFIX = Prefix((), 0)


_Key = tuple[int, tuple[int, ...]]
"""What a block holds: tokens, behind those of a chain."""


@dataclass(slots=True)
class _Entry:
    key: _Key
    chain: int
    users: int


class PrefixCache:
    """Full KV blocks by what they hold. Never touches the device; every operation takes the same time for each block.

    A *chain* is a number that stands for all the tokens up to the end of a block. It is given when the block is
    entered, and never again: behind an evicted block nothing is found, whatever its place is used for later.
    A block without users stays until its place is needed (`evict`); which of them has waited longest goes first.
    """

    def __init__(self) -> None:
        self._blocks: dict[_Key, int] = {}
        self._entries: dict[int, _Entry] = {}  # by block
        self._unused: OrderedDict[int, None] = OrderedDict()  # in the order in which they became so
        self._chains = itertools.count(NO_PREFIX.chain + 1)

    @property
    def unused(self) -> int:
        """Number of blocks that nobody uses."""
        return len(self._unused)

    def count_unused(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody uses."""
        return sum(block in self._unused for block in blocks)

    def find(self, tokens: Iterable[tuple[int, ...]]) -> Prefix:
        """The longest prefix of a sequence that is here; the tokens come block by block. `share` is another call."""
        blocks: list[int] = []
        chain = NO_PREFIX.chain
        for held in tokens:
            block = self._blocks.get((chain, held))
            if block is None:
                break
            blocks.append(block)
            chain = self._entries[block].chain
        return Prefix(tuple(blocks), chain)

    def enter(self, parent: int, tokens: tuple[int, ...], block: int) -> int:
        """Makes a block findable that has one user, and returns the chain that ends with it.

        If another block that holds the same is here already, that one stays, and `block` remains its user's own.
        """
        key = (parent, tokens)
        known = self._blocks.get(key)
        if known is not None:
            return self._entries[known].chain
        entry = _Entry(key, next(self._chains), users=1)
        self._blocks[key] = block
        self._entries[block] = entry
        return entry.chain

    def share(self, blocks: Sequence[int]) -> None:
        """One user more for each of `blocks`."""
        for block in blocks:
            self._entries[block].users += 1
            self._unused.pop(block, None)

    def release(self, block: int) -> bool:
        """One user less; False for a block that is not here, and so has no other user."""
        entry = self._entries.get(block)
        if entry is None:
            return False
        entry.users -= 1
        if entry.users == 0:
            self._unused[block] = None
        return True

    def evict(self) -> int:
        """Forgets the block that has been unused for longest, and returns it."""
        block, _ = self._unused.popitem(last=False)
        del self._blocks[self._entries.pop(block).key]
        return block
