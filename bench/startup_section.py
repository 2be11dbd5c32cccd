"""The section of starts: when the first token comes, and where the seconds until then go."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from bench.committed import Committed, Results, facts, shown, table
from bench.plots import PLOTS, Bars

__all__ = ["startup", "startup_figures"]


def startup(committed: Committed) -> list[str]:
    """Starts of every compile mode, and what peers need."""
    lines: list[str] = []
    for name, results in committed.kind("startup").items():
        lines += [f"**{results['shape']}**: seconds from the start of the process ({facts(results)})", ""]
        batches = sorted({step["batch"] for row in results["startup"] for step in row["steps"]})
        names = ("ready_s", "first_token_s", "compile_s", "capture_s")
        head = ["compile", "caches", "ready", "first token", "of which compiling", "capturing"]
        head += [f"step ms, batch {batch}" for batch in batches]
        body = []
        for (mode, cache), rows in _by_kind(results).items():
            steps = {step["batch"]: step["decode_step_ms"] for row in rows for step in row["steps"]}
            cells = [*(_median(row[each] for row in rows) for each in names), *map(steps.get, batches)]
            body.append([mode, cache, *map(shown, cells)])
        lines += [*table(head, body), "", f"![{name}]({PLOTS}/{name}.png)", ""]
        peers = [each for each in committed.kind("peer").values() if each["shape"] == results["shape"]]
        lines += [
            f"- {peer['system']}, for prompts of {_prompts(peer)} tokens: {shown(peer['startup_s'])} s until it took "
            "requests, with the caches that it found."
            for peer in peers
            if "startup_s" in peer
        ]
        lines.append("")
    return lines


def startup_figures(committed: Committed) -> list[Bars]:
    """Where the seconds of a start go."""
    return [
        Bars(
            f"{name}.png",
            f"{results['shape']}: from the process's start to the first token on {results['device']}",
            {f"{mode}, {cache}": _parts(rows) for (mode, cache), rows in _by_kind(results).items()},
            "seconds",
        )
        for name, results in committed.kind("startup").items()
    ]


def _parts(rows: list[Results]) -> dict[str, float]:
    """Medians of the seconds of each part; they add up to the first token, but for the medians."""
    parts = [_parts_of_one(row) for row in rows]
    names = dict.fromkeys(name for each in parts for name in each)
    return {name: round(statistics.median(each.get(name, 0.0) for each in parts), 3) for name in names}


def _parts_of_one(row: Results) -> dict[str, float]:
    stages = row.get("stages_s")
    parts = {"importing": row["imported_s"]}
    known = row["warmup_s"] + row["capture_s"]
    if stages is None:  # measured before an engine told them apart
        parts["loading, sizing, verifying"] = row["ready_s"] - row["imported_s"] - known
    else:
        parts |= {"loading": stages["load"], "sizing the KV cache": stages["size the KV cache"]}
    parts |= {"first runs, compiling": row["warmup_s"], "capturing": row["capture_s"]}
    if stages is not None:
        parts["verifying"] = stages["warm up"] - known
    return parts | {"first request": row["first_token_s"] - row["ready_s"]}


def _by_kind(results: Results) -> dict[tuple[str, str], list[Results]]:
    found: dict[tuple[str, str], list[Results]] = {}
    for row in results["startup"]:
        found.setdefault((row["compile"], row["cache"]), []).append(row)
    return found


def _prompts(results: Results) -> str:
    return ", ".join(map(str, sorted({row["prompt_tokens"] for row in results["decode"]})))


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(statistics.median(known)) if known else None
