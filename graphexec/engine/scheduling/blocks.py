"""The KV block allocator: which blocks of the paged cache are free."""

from __future__ import annotations

from collections.abc import Sequence

from graphexec.engine.scheduling.prefix_cache import PrefixCache

__all__ = ["BlockAllocator"]


class BlockAllocator:
    """Hands out block numbers 1 to `num_blocks - 1`; block 0 is reserved for padding rows.

    A freed block may be handed out at once: all that reads and writes it is ordered on the compute stream.

    Args:
        num_blocks: blocks, the reserved one included.
        prefixes: keeps blocks that are given back, if it knows what they hold; None to keep nothing.
    """

    def __init__(self, num_blocks: int, prefixes: PrefixCache | None = None) -> None:
        self._empty = list(range(num_blocks - 1, 0, -1))
        self.prefixes = prefixes

    @property
    def free(self) -> int:
        """Number of blocks that nobody uses, the cached ones included."""
        return len(self._empty) + (0 if self.prefixes is None else self.prefixes.unused)

    def take(self, count: int, behind: Sequence[int] = (), spare: int = 0) -> list[int] | None:
        """`count` blocks that nobody uses, and a share in the cached blocks `behind` which they are to stand.

        None, and nothing taken, if fewer than `spare` blocks would stay free. Cached blocks are evicted last.
        """
        prefixes, wanted = self.prefixes, count + spare
        if prefixes is not None and behind:
            wanted += prefixes.count_unused(behind)  # free until they are shared
        if wanted > self.free:
            return None
        begin = max(len(self._empty) - count, 0)
        taken = self._empty[begin:]
        del self._empty[begin:]
        if prefixes is not None:
            prefixes.share(behind)  # first, or they might be evicted
            taken += prefixes.evict(count - len(taken))
        return taken

    def give_back(self, blocks: Sequence[int]) -> None:
        """Ends one use of a sequence's blocks; those that are not cached are the next to be handed out."""
        prefixes = self.prefixes
        if prefixes is None:
            self._empty.extend(reversed(blocks))
        else:
            self._empty += prefixes.release(blocks)
