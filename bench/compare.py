"""Compares two results files of the same measurement, and fails when a figure got worse beyond its tolerance.

    python -m bench.compare OLD.json NEW.json [--tolerance 0.05] [--tolerance host_us=0.3] [--allow-missing]

Takes the files of bench.decode, bench.startup, the peers and pytest-benchmark. Exit codes: 0, 1 for a regression or a
figure that vanished, 2 for files that cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["METRICS", "Comparison", "Metric", "UnusableFile", "compare", "figures_of", "read"]

Json = dict[str, object]
Figures = dict[tuple[str, str], float]
"""Values by row and metric."""


class UnusableFile(Exception):
    """The files cannot be compared; the message says which and why."""


@dataclass(frozen=True)
class Metric:
    """How to judge a change.

    Attributes:
        tolerance: share of the old value by which it may get worse.
        floor: a change up to this, in the metric's own unit, is noise whatever its share.
        higher_is_better: whether growth is good.
    """

    tolerance: float = 0.08  # what a shared card drifts by from day to day
    floor: float = 0.0
    higher_is_better: bool = False

    def worse_by(self, old: float, new: float) -> float:
        """By which share of the old value the new one is worse; negative where it is better."""
        change = old - new if self.higher_is_better else new - old
        if abs(change) <= self.floor or change == 0:
            return 0.0
        return change / abs(old) if old else math.copysign(math.inf, change)


METRICS: dict[str, Metric] = {
    "decode_step_ms": Metric(),
    "bare_replay_ms": Metric(),
    "overhead": Metric(tolerance=0.03),  # a quotient of the same minutes: the drift cancels
    "decode_phase_ms": Metric(),
    "decode_phase_overhead": Metric(tolerance=0.03),
    "busy_ms": Metric(),
    "busy": Metric(tolerance=0.03, higher_is_better=True),
    "host_us": Metric(tolerance=0.2, floor=3.0),
    "bubble_us.p50": Metric(tolerance=0.2, floor=0.5),
    "bubble_us.p99": Metric(tolerance=0.5, floor=5.0),
    "kernels_per_step": Metric(tolerance=0.0),
    "runs_with_other_tokens_than_eager": Metric(tolerance=0.0),
    "wall_s": Metric(tolerance=0.3, floor=1.0),
    "warmup_s": Metric(tolerance=0.3, floor=1.0),
    "capture_s": Metric(tolerance=0.3, floor=0.1),
    "pool_mib": Metric(tolerance=0.05, floor=2.0),
    "device_mib": Metric(tolerance=0.05, floor=16.0),
    "startup_s": Metric(tolerance=0.2, floor=2.0),
    "ready_s": Metric(tolerance=0.2, floor=2.0),
    "first_token_s": Metric(tolerance=0.2, floor=2.0),
    "compile_s": Metric(tolerance=0.2, floor=2.0),
    "median_us": Metric(tolerance=0.2, floor=0.5),
}
"""The figures that are compared; others in a file are for reading."""


@dataclass(frozen=True)
class Comparison:
    """What moved: lines of text, by kind."""

    worse: list[str]
    better: list[str]
    vanished: list[str]
    new: list[str]
    compared: int

    def lines(self) -> Iterator[str]:
        for kind, lines in (
            ("worse", self.worse),
            ("better", self.better),
            ("vanished", self.vanished),
            ("new", self.new),
        ):
            yield from (f"{kind:9}{line}" for line in lines)
        yield (
            f"{self.compared} figures compared: {len(self.worse)} worse beyond their tolerance, {len(self.better)} "
            f"better, {len(self.vanished)} vanished, {len(self.new)} new."
        )


def compare(old: Figures, new: Figures, metrics: Mapping[str, Metric] = METRICS) -> Comparison:
    """Judges every figure that both have; the others are vanished or new."""
    worse, better = [], []
    common = [key for key in old if key in new]
    for row, name in common:
        before, after, metric = old[row, name], new[row, name], metrics[name]
        share = metric.worse_by(before, after)
        change = f"{(after - before) / abs(before):+.1%}" if before else "from nothing"
        line = f"{row}: {name} {before:.5g} -> {after:.5g} ({change}, tolerance {metric.tolerance:.0%})"
        if share > metric.tolerance:
            worse.append(line)
        elif share < -metric.tolerance:
            better.append(line)
    return Comparison(
        worse,
        better,
        [f"{row}: {name}, {old[row, name]:.5g} before" for row, name in old if (row, name) not in new],
        [f"{row}: {name} {new[row, name]:.5g}" for row, name in new if (row, name) not in old],
        len(common),
    )


def read(path: Path) -> Json:
    """The content of a results file.

    Raises:
        UnusableFile: it cannot be read, or is no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as failure:
        raise UnusableFile(f"Cannot read {path}: {failure.strerror}.") from failure
    except ValueError as failure:
        raise UnusableFile(f"{path} is not JSON: {failure}.") from failure
    if not isinstance(content, dict):
        raise UnusableFile(f"{path} holds no results: a JSON object is expected.")
    return content


def figures_of(results: Json) -> Figures:
    """The figures of a results file, by row and metric.

    Raises:
        UnusableFile: it has none, holds a row twice, or is not of the shape that the benchmarks write.
    """
    try:
        rows = list(_rows(results))
    except (KeyError, TypeError, AttributeError) as failure:
        raise UnusableFile(f"A row of the file is not as expected: {failure!r}.") from failure
    figures: Figures = {}
    for row, values in rows:
        for name in METRICS:
            value = _look_up(values, name)
            if value is None:
                continue
            if (row, name) in figures:
                raise UnusableFile(f"The file has two rows for {row}.")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise UnusableFile(f"{row}: {name} is {value!r}, which is no number.")
            figures[row, name] = float(value)
    if not figures:
        raise UnusableFile("The file has no figures that this knows.")
    return figures


def _rows(results: Json) -> Iterator[tuple[str, Json]]:
    """What identifies a row, as text, and the row."""
    if isinstance(results.get("startup_s"), float):
        yield "start", results
    for kind in ("decode", "eager"):
        for row in _entries(results, kind):
            words = [kind, *(f"{name} {row[name]}" for name in ("prompt_tokens", "batch", "depth") if name in row)]
            yield ", ".join(words), row
    captures = results.get("capture")
    for name, entry in captures.items() if isinstance(captures, dict) else ():
        yield f"capture of the ladder, {name}", entry
        yield from ((f"capture of the ladder, {name}, {kind}", each) for kind, each in entry["variants"].items())
    seen: dict[str, int] = {}
    for row in _entries(results, "startup"):
        name = f"start, compile {row['compile']}, {row['cache']}"
        seen[name] = seen.get(name, 0) + 1
        yield f"{name}, number {seen[name]}", row
        for step in _entries(row, "steps"):
            yield f"compile {row['compile']}, batch {step['batch']}", step
    for benchmark in _entries(results, "benchmarks"):
        host_us = _look_up(benchmark, "extra_info.host_us_per_step")
        yield str(benchmark["name"]), {"median_us": benchmark["stats"]["median"] * 1e6, "host_us": host_us}


def _entries(results: Json, name: str) -> list[Any]:
    entries = results.get(name, [])
    return entries if isinstance(entries, list) else []


def _look_up(row: Json, name: str) -> object:
    value: object = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _facts(results: Json) -> Json:
    """Commit, date, device and shape; pytest-benchmark's files have ours under a name of their own."""
    facts = results.get("provenance", results)
    return facts if isinstance(facts, dict) else {}


def _check_same_measurement(old: Json, new: Json) -> None:
    kinds = [[name for name in ("decode", "startup", "benchmarks") if name in each] for each in (old, new)]
    if kinds[0] != kinds[1]:
        raise UnusableFile(f"The files hold different measurements: {kinds[0]} and {kinds[1]}.")
    if old.get("shape") != new.get("shape"):
        raise UnusableFile(f"The files are of different shapes: {old.get('shape')} and {new.get('shape')}.")


def _notes(old: Json, new: Json) -> Iterator[str]:
    for name, facts in (("old", _facts(old)), ("new", _facts(new))):
        yield f"{name}: commit {facts.get('commit')}, {facts.get('date')}, {facts.get('device')}"
    for name in ("device", "versions"):
        if _facts(old).get(name) != _facts(new).get(name):
            yield f"note: another {name}, so not every difference is the code's"
    for kind in ("skipped", "errors"):
        yield from (f"note: {kind} in new: {entry}" for entry in _entries(new, kind))


def _tolerance(text: str) -> tuple[str | None, float]:
    name, _, share = text.rpartition("=")
    if name and name not in METRICS:
        raise argparse.ArgumentTypeError(f"there is no figure {name!r}; known are {', '.join(METRICS)}")
    value = float(share)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{share} is no share of zero or more")
    return name or None, value


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--tolerance", type=_tolerance, action="append", default=[], metavar="[FIGURE=]SHARE",
        help="0.05 lets every figure get worse by 5 %%, host_us=0.3 one of them by 30 %%; may be given several times",
    )  # fmt: skip
    parser.add_argument("--allow-missing", action="store_true", help="figures that vanished are no failure")
    given = parser.parse_args(arguments)
    tolerances = dict(given.tolerance)
    metrics = {
        name: Metric(tolerances.get(name, tolerances.get(None, each.tolerance)), each.floor, each.higher_is_better)
        for name, each in METRICS.items()
    }
    try:
        old, new = read(given.old), read(given.new)
        _check_same_measurement(old, new)
        comparison = compare(figures_of(old), figures_of(new), metrics)
    except UnusableFile as failure:
        print(f"Cannot compare {given.old} with {given.new}. {failure}", file=sys.stderr)
        return 2
    print("\n".join([*_notes(old, new), *comparison.lines()]))
    return 1 if comparison.worse or (comparison.vanished and not given.allow_missing) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
