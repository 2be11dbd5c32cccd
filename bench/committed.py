"""The results files that are committed, by what they measure: their names begin with it (see bench/gpu_round.sh)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Committed", "Results", "facts", "shown", "table"]

Results = dict[str, Any]


@dataclass(frozen=True)
class Committed:
    """Results by file name, without its ending.

    Attributes:
        files: of one folder, by name.
    """

    files: dict[str, Results]

    @classmethod
    def read(cls, folder: Path) -> Committed:
        return cls({path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))})

    def kind(self, kind: str) -> dict[str, Results]:
        """The files of a kind ("decode", "context", "startup", "peer"), by name."""
        return {name: results for name, results in self.files.items() if name.startswith(f"{kind}-")}

    def peers(self) -> dict[str, list[Results]]:
        """What was measured in one round, graphexec first; by the part of the files' names before the system's."""
        rounds: dict[str, list[Results]] = {}
        for name, results in self.kind("peer").items():
            rounds.setdefault(name.rpartition("-")[0], []).append(results)
        return {name: sorted(systems, key=_ours_first) for name, systems in rounds.items()}


def shown(value: object, digits: int = 3) -> str:
    """A figure as a cell of a table: that many digits, more only before the point."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value == 0:
        return "0"
    decimals = max(0, digits - len(str(int(abs(value))).lstrip("0")))
    return f"{value:,.{decimals}f}"


def facts(results: Results) -> str:
    """Where figures come from, in one line."""
    facts = (results["device"], f"torch {results['versions']['torch']}", f"commit {_short(results['commit'])}")
    return f"{', '.join(facts)}, {results['date'][:10]}"


def _short(commit: str) -> str:
    return commit[:10] + ("+" if commit.endswith("+") else "")  # "+": of a checkout with changes


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]


def _ours_first(results: Results) -> tuple[bool, str]:
    return results["system"] != "graphexec", results["system"]
