"""The KV block allocator: which blocks of the paged cache are free."""

from __future__ import annotations

__all__ = ["BlockAllocator"]


class BlockAllocator:
    """Hands out block numbers 1 to `num_blocks - 1`; block 0 is reserved for padding rows.

    A freed block may be handed out at once: all that reads and writes it is ordered on the compute stream.
    """

    def __init__(self, num_blocks: int) -> None:
        self._free = list(range(num_blocks - 1, 0, -1))

    @property
    def free(self) -> int:
        """Number of free blocks."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` blocks, or None (and nothing taken) when fewer are free."""
        if count > len(self._free):
            return None
        if count == 0:
            return []
        taken = self._free[-count:]
        del self._free[-count:]
        return taken

    def give_back(self, blocks: list[int]) -> None:
        """Frees blocks; they are the next to be handed out."""
        self._free.extend(reversed(blocks))
