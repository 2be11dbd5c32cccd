"""Traffic: how many steps of which size were served. It says which graphs are worth their memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from graphexec.errors import ConfigError

__all__ = ["Traffic", "TrafficCounter"]

_Number = TypeVar("_Number", int, float)
_ROWS, _SLOTS = 16, 8
"""Steps with prompt chunks are counted by so many rows and slots at a time: the default ladders know no finer sizes,
and the table of a server that runs for months stays small."""


@dataclass(frozen=True)
class Traffic:
    """A histogram of steps, by the size that a graph must have for them.

    Attributes:
        decode: steps without prompt chunks, by their slots, padding not included.
        chunks: steps with prompt chunks, by their rows and slots, padding not included.

    As JSON: `{"decode": {"SLOTS": STEPS, ...}, "chunks": [[ROWS, SLOTS, STEPS], ...]}`.
    """

    decode: Mapping[int, float] = field(default_factory=dict)
    chunks: Mapping[tuple[int, int], float] = field(default_factory=dict)

    @classmethod
    def uniform(cls, max_slots: int, max_rows: int) -> Traffic:
        """Steps of all sizes alike, as many with prompt chunks as without: the assumption where nothing is known."""
        rows = {min(each, max_rows) for each in range(_ROWS, max_rows + _ROWS, _ROWS)}
        slots = {min(each, max_slots) for each in range(_SLOTS, max_slots + _SLOTS, _SLOTS)}
        shapes = sorted({(each, min(bound, each)) for each in rows for bound in slots})
        return cls(dict.fromkeys(range(1, max_slots + 1), 1 / max_slots), dict.fromkeys(shapes, 1 / len(shapes)))

    @property
    def steps(self) -> float:
        """All of them."""
        return sum(self.decode.values()) + sum(self.chunks.values())

    @classmethod
    def read(cls, path: Path) -> Traffic:
        """Reads what `write` wrote.

        Raises:
            ConfigError: the file cannot be read, holds something else, or counts no step.
        """
        try:
            content = json.loads(path.read_text())
            traffic = cls(
                {_at_least(1, int(slots)): _at_least(0, float(steps)) for slots, steps in content["decode"].items()},
                {
                    (_at_least(1, int(rows)), _at_least(1, int(slots))): _at_least(0, float(steps))
                    for rows, slots, steps in content["chunks"]
                },
            )
        except OSError as failure:
            raise ConfigError(f"Cannot read {path}: {failure.strerror}.") from failure
        except (ValueError, KeyError, TypeError, AttributeError) as failure:
            raise ConfigError(
                f"{path} is no histogram of traffic, as generate --trace-out writes it: "
                f"{type(failure).__name__}: {failure}."
            ) from failure
        if traffic.steps == 0:
            raise ConfigError(f"{path} counts no step: there is no traffic to choose graphs for.")
        return traffic

    def write(self, path: Path) -> None:
        chunks = [[rows, slots, steps] for (rows, slots), steps in sorted(self.chunks.items())]
        path.write_text(json.dumps({"decode": dict(sorted(self.decode.items())), "chunks": chunks}) + "\n")


class TrafficCounter:
    """Counts the steps of a program with `max_slots` slots and at most `max_rows` rows.

    Attributes:
        rows: of all steps, padding not included.
        launched_rows: of all steps, padding included.
    """

    def __init__(self, max_slots: int, max_rows: int) -> None:
        self._max_slots = max_slots
        self._max_rows = max_rows
        self._decode: Counter[int] = Counter()
        self._chunks: Counter[tuple[int, int]] = Counter()
        self.rows = self.launched_rows = 0

    def count_decode(self, slots: int, rows: int, launched_rows: int) -> None:
        """A step without prompt chunks for so many slots."""
        self._decode[slots] += 1
        self.rows += rows
        self.launched_rows += launched_rows

    def count_chunks(self, slots: int, rows: int, launched_rows: int) -> None:
        """A step with prompt chunks, of so many rows in so many slots."""
        self._chunks[-(-rows // _ROWS), -(-slots // _SLOTS)] += 1
        self.rows += rows
        self.launched_rows += launched_rows

    def traffic(self) -> Traffic:
        """What was counted: rows rounded up to 16, and slots of steps with prompt chunks to 8."""
        chunks: Counter[tuple[int, int]] = Counter()
        for (rows, slots), steps in self._chunks.items():
            chunks[min(rows * _ROWS, self._max_rows), min(slots * _SLOTS, self._max_slots)] += steps
        return Traffic(dict(self._decode), dict(chunks))


def _at_least(least: int, value: _Number) -> _Number:
    if not least <= value < float("inf"):
        raise ValueError(f"{value} where a number from {least} on belongs")
    return value
