"""The ladder of batch sizes that are captured, and the choice of one for a bound."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from graphexec.errors import ConfigError

__all__ = ["BucketTable", "default_ladder", "row_ladder"]


def default_ladder(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, then steps of 8 to 256, then of 16, and always `max_num_seqs` itself."""
    sizes = {1, 2, 4, *range(8, 257, 8), *range(272, max_num_seqs + 1, 16), max_num_seqs}
    return tuple(sorted(size for size in sizes if size <= max_num_seqs))


def row_ladder(max_rows: int) -> tuple[int, ...]:
    """Padded row counts of steps with prompt chunks: steps of 16 to 256, of 64 to 1024, then of 256."""
    sizes = {*range(16, 257, 16), *range(320, 1025, 64), *range(1280, max_rows + 1, 256), max_rows}
    return tuple(sorted(size for size in sizes if size <= max_rows))


@dataclass(frozen=True, slots=True)
class BucketTable:
    """Sizes in ascending order; `fit` finds the smallest one that holds a bound."""

    sizes: tuple[int, ...]

    @classmethod
    def of(cls, sizes: Sequence[int], limit: int, name: str = "capture_sizes") -> BucketTable:
        """Validates a list of sizes.

        Raises:
            ConfigError: the list is empty, or an entry is not between 1 and `limit`, or stands twice.
        """
        if not sizes:
            raise ConfigError(f"{name} is empty. Leave it out for the default ladder.")
        outside = [size for size in sizes if not 1 <= size <= limit]
        if outside:
            raise ConfigError(f"{name} has {outside}; every size must be between 1 and {limit}.")
        if len(set(sizes)) != len(sizes):
            raise ConfigError(f"{name} names a size twice: {sorted(sizes)}.")
        return cls(tuple(sorted(sizes)))

    def fit(self, bound: int) -> int | None:
        """The smallest size >= `bound`, or None off the ladder. A bound of 0 is nobody's bucket."""
        if bound < 1:
            raise ValueError("An empty step has no bucket.")
        index = bisect_left(self.sizes, bound)
        return self.sizes[index] if index < len(self.sizes) else None
