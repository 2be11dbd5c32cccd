"""The ladders of sizes that are captured, and the choice of one for a bound."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from graphexec.errors import ConfigError
from graphexec.plan import Phase

__all__ = ["BucketTable", "Ladders", "chunk_slot_ladder", "default_ladder", "row_ladder"]


def default_ladder(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, then steps of 8 to 256, then of 16, and always `max_num_seqs` itself."""
    sizes = {1, 2, 4, *range(8, 257, 8), *range(272, max_num_seqs + 1, 16), max_num_seqs}
    return tuple(sorted(size for size in sizes if size <= max_num_seqs))


def row_ladder(max_rows: int) -> tuple[int, ...]:
    """Padded row counts of steps with prompt chunks: steps of 16 to 256, of 64 to 1024, then of 256."""
    sizes = {*range(16, 257, 16), *range(320, 1025, 64), *range(1280, max_rows + 1, 256), max_rows}
    return tuple(sorted(size for size in sizes if size <= max_rows))


def chunk_slot_ladder(max_num_seqs: int) -> tuple[int, ...]:
    """Padded slot counts of steps with prompt chunks: few, since it is their rows that cost."""
    return tuple(sorted(size for size in {8, 32, 96, max_num_seqs} if size <= max_num_seqs))


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


class Ladders(NamedTuple):
    """The sizes to which steps are padded.

    Attributes:
        slots: of a step without prompt chunks.
        rows: of a step with prompt chunks.
        chunk_slots: slots of a step with prompt chunks; none has more slots than rows. Of steps in which every slot
            computes a chunk, the smallest size has graphs of its own: short prompts alone, where each launch counts.
    """

    slots: BucketTable
    rows: BucketTable
    chunk_slots: BucketTable

    def chunk_shape(self, bound: int, rows: int, chunk_slots: int) -> tuple[Phase, int, int] | None:
        """Phase, rows and slots for at most `bound` slots, `chunk_slots` of them with a chunk; None off the ladder."""
        padded, slots = self.rows.fit(rows), self.chunk_slots.fit(bound)
        if padded is None or slots is None:
            return None
        alone = bound == chunk_slots and slots == self.chunk_slots.sizes[0]
        return "prefill" if alone else "mixed", padded, min(slots, padded)

    def chunk_shapes(self) -> list[tuple[Phase, int, int]]:
        """Every value of `chunk_shape`, the largest first."""
        mixed = {(rows, min(slots, rows)) for rows in self.rows.sizes for slots in self.chunk_slots.sizes}
        alone = {(rows, min(self.chunk_slots.sizes[0], rows)) for rows in self.rows.sizes}
        shapes: list[tuple[Phase, int, int]] = [("mixed", *shape) for shape in mixed]
        shapes += [("prefill", *shape) for shape in alone]
        return sorted(shapes, key=lambda shape: (shape[1], shape[2], shape[0]), reverse=True)
