"""The prefix cache: which KV blocks hold which tokens, who uses them, and which unused ones to give up first.

Invariant: a block is found only behind the tokens that its KV was computed behind. Keys are the tokens themselves, so
equal hashes cannot deceive.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

__all__ = ["NO_PREFIX", "Prefix", "PrefixCache"]

_NONE: tuple[int, ...] = ()


class Prefix(NamedTuple):
    """The beginning of a sequence that is in the cache: its blocks, and the chain that ends with the last of them."""

    blocks: tuple[int, ...]
    chain: int


NO_PREFIX = Prefix((), 0)


class PrefixCache:
    """Full KV blocks by what they hold. Never touches the device.

    The blocks of one sequence that were entered together form a *run*, and what happens to a run costs the same
    however long it is. A run has users as a whole: it is split where a sequence that shares its beginning goes on
    otherwise. Runs form a tree, like the radix tree of SGLang (Zheng et al. 2023). A *chain* is a number that stands
    for all tokens up to the end of a run; it is given once and never again, so that behind an evicted block nothing is
    found, whatever its place is used for later. A run without users stays until its place is needed (`evict`): which
    of them has waited longest goes first, from its end.

    Blocks are found as soon as their computation is scheduled, so they may turn out to hold NaN. They are *sound* once
    a token was chosen by logits that attended to them; until then their users know that they trust them unseen
    (`doubts`), and one that meets NaN takes them out (`drop`).

    All is kept in tables of numbers, bytes and tuples of numbers, by the first block of a run: an object for each of
    some hundred thousand blocks would be walked by every full garbage collection.

    Args:
        num_blocks: blocks of the KV cache, the reserved one included.
        block_bytes: of the tokens of a block, as int32 words.
    """

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._runs: dict[bytes, int] = {}  # by the parent's chain and the tokens of the first block
        self._keys: list[bytes | None] = [None] * num_blocks  # None: no run; empty: not found, for its users alone
        self._tokens: list[bytes] = [b""] * num_blocks
        self._blocks: list[tuple[int, ...]] = [_NONE] * num_blocks
        self._chains = [0] * num_blocks
        self._users = [0] * num_blocks
        self._sound = bytearray(num_blocks)
        self._unused: OrderedDict[int, None] = OrderedDict()  # runs, in the order in which they became so
        self._newest_chain = NO_PREFIX.chain
        self.unused = 0
        """Number of blocks that nobody uses."""

    def find(self, tokens: bytes, sound_only: bool = False) -> Prefix:
        """The longest prefix of a sequence, in whole blocks, that is here. `share` is another call.

        Args:
            tokens: as int32 words.
            sound_only: end before the first block that nobody vouches for.
        """
        found: list[int] = []
        chain, begin = NO_PREFIX.chain, 0
        while len(tokens) - begin >= self._block_bytes:
            run = self._behind(chain, tokens, begin)
            if run is None or (sound_only and not self._sound[run]):
                break
            found += self._blocks[run]
            chain = self._chains[run]
            begin += len(self._tokens[run])
        return Prefix(tuple(found), chain)

    def enter(self, parent: int, tokens: bytes, blocks: Sequence[int], sound: bool = False) -> int:
        """Makes blocks findable, each behind the one before it, and returns the chain that ends with the last.

        If other blocks that hold the same are here already, those stay, and ours remain their user's own.

        Args:
            parent: the chain that ends before them.
            tokens: what they hold, as int32 words, and maybe more.
            blocks: each of which has one user.
            sound: whether logits without NaN have attended to them.
        """
        tokens, chain, begin = tokens[: len(blocks) * self._block_bytes], parent, 0
        while begin < len(tokens):
            run = self._behind(chain, tokens, begin)
            if run is None:
                mine = blocks[begin // self._block_bytes :]
                return self._make(chain, tokens[begin:], tuple(mine), 1, sound, self._new_chain())
            chain = self._chains[run]
            begin += len(self._tokens[run])
        return chain

    def share(self, blocks: Sequence[int]) -> None:
        """One user more for each of `blocks`, which `find` has found."""
        for run in self._runs_of(blocks):
            if not self._users[run]:
                del self._unused[run]
                self.unused -= len(self._blocks[run])
            self._users[run] += 1

    def release(self, blocks: Sequence[int]) -> list[int]:
        """One user less for each of `blocks`, a sequence's; returns those that are not here, and so have no other user.

        The end of the sequence will be evicted first: without its beginning, the rest is never found.
        """
        strangers = []
        for run in reversed(list(self._runs_of(blocks))):
            key = self._keys[run]
            if key is None:
                strangers.append(run)  # a block by itself
            elif self._users[run] > 1:
                self._users[run] -= 1
            elif key:
                self._users[run] = 0
                self._unused[run] = None
                self.unused += len(self._blocks[run])
            else:  # dropped, and its last user has gone
                strangers += reversed(self._forget(run))
        return strangers

    def count_unused(self, blocks: Sequence[int]) -> int:
        """How many of `blocks`, which `find` has found, nobody uses."""
        return sum(len(self._blocks[run]) for run in self._runs_of(blocks) if not self._users[run])

    def evict(self, count: int) -> list[int]:
        """Forgets as many blocks of those that have been unused for longest, and returns them."""
        evicted: list[int] = []
        while len(evicted) < count:
            run = next(iter(self._unused))
            kept = len(self._blocks[run]) - (count - len(evicted))
            if kept > 0:
                evicted += self._blocks[run][kept:]
                self._cut(run, kept)
            else:
                del self._unused[run]
                del self._runs[self._keys[run] or b""]
                evicted += self._forget(run)
        self.unused -= count
        return evicted

    def vouch_for(self, blocks: Sequence[int]) -> None:
        """Logits without NaN have attended to these blocks. Those that are not here are left alone."""
        for run in self._runs_of(blocks):
            if self._keys[run] is not None:
                self._sound[run] = True

    def doubts(self, blocks: Sequence[int]) -> bool:
        """Whether one of these blocks, all of them here, was never vouched for."""
        return not all(self._sound[run] for run in self._runs_of(blocks))

    def drop(self, blocks: Sequence[int]) -> None:
        """These blocks, of which somebody uses each, are never found again, but for those that are sound."""
        for run in self._runs_of(blocks):
            key = self._keys[run]
            if key and not self._sound[run]:
                del self._runs[key]
                self._keys[run] = b""

    def _runs_of(self, blocks: Sequence[int]) -> Iterator[int]:
        """The runs that a sequence's blocks belong to, in order; a block that is not here stands for itself."""
        index = 0
        while index < len(blocks):
            run = blocks[index]
            yield run
            index += 1 if self._keys[run] is None else len(self._blocks[run])

    def _behind(self, chain: int, tokens: bytes, begin: int) -> int | None:
        """The run behind a chain that begins like `tokens[begin:]`, split where they part; None if there is none."""
        size = self._block_bytes
        run = self._runs.get(_key(chain, tokens[begin : begin + size]))
        if run is not None and not tokens.startswith(self._tokens[run], begin):
            held, common = self._tokens[run], size
            while held[common : common + size] == tokens[begin + common : begin + common + size]:
                common += size
            self._split(run, common // size)
        return run

    def _split(self, run: int, count: int) -> None:
        """Makes a run of the blocks behind the first `count`; it keeps the chain, and with it what follows."""
        rest, words = self._blocks[run][count:], self._tokens[run][count * self._block_bytes :]
        users, sound, end = self._users[run], bool(self._sound[run]), self._chains[run]
        self._cut(run, count)
        self._make(self._chains[run], words, rest, users, sound, end)
        if not users:
            self._unused[rest[0]] = None

    def _cut(self, run: int, count: int) -> None:
        """Leaves the first `count` blocks of a run; nothing is found behind them any more."""
        self._blocks[run] = self._blocks[run][:count]
        self._tokens[run] = self._tokens[run][: count * self._block_bytes]
        self._chains[run] = self._new_chain()

    def _make(self, parent: int, tokens: bytes, blocks: tuple[int, ...], users: int, sound: bool, chain: int) -> int:
        run, key = blocks[0], _key(parent, tokens[: self._block_bytes])
        self._runs[key] = run
        self._keys[run] = key
        self._tokens[run], self._blocks[run], self._users[run] = tokens, blocks, users
        self._sound[run] = sound
        self._chains[run] = chain
        return chain

    def _forget(self, run: int) -> tuple[int, ...]:
        """Clears the tables of a run that is not found any more, and returns its blocks."""
        blocks = self._blocks[run]
        self._keys[run], self._blocks[run], self._tokens[run] = None, _NONE, b""
        return blocks

    def _new_chain(self) -> int:
        self._newest_chain += 1
        return self._newest_chain


def _key(parent: int, tokens: bytes) -> bytes:
    return parent.to_bytes(8, "little") + tokens
