"""What `graphexec warmup` does: choose under a budget, capture, report, compare."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from graphexec.backends import Progress
from graphexec.capture.budget import Budget
from graphexec.capture.frozen import FrozenCheck
from graphexec.capture.manifest import Manifest
from graphexec.capture.regressions import changed_kernels, regressions
from graphexec.capture.traffic import Traffic
from graphexec.config import CaptureMode, EngineConfig
from graphexec.engine.assemble import assemble
from graphexec.errors import ConfigError
from graphexec.plan import GraphKey
from graphexec.warmup.choice import overruns, select
from graphexec.warmup.frozen import check_graphs, refuse_on_cpu, sentences
from graphexec.warmup.plot import draw
from graphexec.warmup.report import graph_table, mode_table

__all__ = ["Wishes", "capture_modes", "warm_up"]

_PHASES = ("decode", "prefill")
"""Settings of the backend that name a capture mode."""


@dataclass(frozen=True)
class Wishes:
    """What is asked of a warm-up.

    Attributes:
        report: file for the manifest; the plot stands beside it.
        compare: an older report, or None.
        tolerance: share by which time and memory may have grown since.
        budget: for the graphs; None to capture the ladders as they are configured.
        trace: file with the traffic to choose for; None for steps of all sizes alike.
        modes: capture modes to measure beside the configured one.
        check_frozen: look for host numbers that were frozen into a graph, which takes several times as long.
    """

    report: Path
    compare: Path | None = None
    tolerance: float = 0.2
    budget: Budget | None = None
    trace: Path | None = None
    modes: tuple[CaptureMode, ...] = ()
    check_frozen: bool = False


def capture_modes(words: str) -> tuple[CaptureMode, ...]:
    """The modes in a list like "full,piecewise".

    Raises:
        ConfigError: there is no such mode.
    """
    known: dict[str, CaptureMode] = {each: each for each in get_args(CaptureMode)}
    asked = [word.strip() for word in words.split(",") if word.strip()]
    unknown = [word for word in asked if word not in known]
    if unknown or not asked:
        raise ConfigError(f"--modes={words!r} is not possible: name some of {', '.join(known)}, with commas between.")
    return tuple(dict.fromkeys(known[word] for word in asked))


def warm_up(config: EngineConfig, wishes: Wishes, output: Console, notes: Console) -> bool:
    """Captures what `config` needs, and writes and prints the report.

    Whether nothing is worse than in the older one, and no host number was frozen.

    Args:
        output: for tables and settings.
        notes: for progress, and for everything that is said about the run.

    Raises:
        ConfigError: the wishes contradict each other, a file cannot be read or written, or the budget is too small.
        CaptureError: a step cannot be captured.
    """
    if wishes.check_frozen:
        refuse_on_cpu(config)
    old, traffic = _read(wishes)
    config = config.model_copy(update={"backend": config.backend.model_copy(update={"measure": True})})
    if wishes.budget is not None:
        with _progress("probing", notes) as show:
            chosen = select(config, wishes.budget, traffic, show)
        config = config.model_copy(update={"backend": chosen.apply(config.backend)})
        if old is not None:  # what was left out on purpose has not got lost
            old = replace(old, graphs=tuple(graph for graph in old.graphs if not chosen.leaves_out(graph.key)))
        _say(notes, *chosen.notes)
        output.print(chosen.to_toml() + "\n", markup=False, highlight=False, soft_wrap=True)
    captured, checks = _capture(config, "capturing", notes, wishes.check_frozen)
    captured.write(wishes.report)
    if captured.graphs:
        output.print(graph_table(captured))
    _plot(captured, wishes.report.with_suffix(".png"), notes)
    if wishes.budget is not None:
        _say(notes, *overruns(captured, wishes.budget))
    if wishes.modes:
        _compare_modes(config, wishes, captured, output, notes)
    worse: list[str] = []
    if old is not None:
        _say(notes, *_other_settings(old, captured))
        worse = regressions(old, captured, wishes.tolerance)
        _say(notes, *(f"changed: {sentence}" for sentence in changed_kernels(old, captured)))
        _say(notes, *(f"worse: {sentence}" for sentence in worse))
        if not worse:
            _say(notes, f"nothing is worse than in {wishes.compare} (tolerance {wishes.tolerance:g})")
    if wishes.check_frozen:
        _say(notes, *sentences(checks))
    return not worse and not any(check.leaks for check in checks)


def _other_settings(old: Manifest, new: Manifest) -> list[str]:
    """Settings in which the reports differ: what is worse may come from there."""
    names = dict.fromkeys((*old.settings, *new.settings))
    here, there = json.loads(json.dumps(dict(new.settings))), old.settings
    return [
        f"other setting: {name} is {here.get(name)!r} here and {there.get(name)!r} there"
        for name in names
        if here.get(name) != there.get(name)
    ]


def _read(wishes: Wishes) -> tuple[Manifest | None, Traffic | None]:
    """The files that were named, before anything takes long, and before a new report takes an old one's place."""
    if not wishes.report.parent.is_dir() or wishes.report.is_dir():
        raise ConfigError(f"Cannot write the report to {wishes.report}: give a file in a folder that exists.")
    if wishes.report.suffix == ".png":
        raise ConfigError(f"The report is JSON, and its plot stands beside it: give another name than {wishes.report}.")
    if wishes.trace is not None and wishes.budget is None:
        raise ConfigError("--trace says which sizes are worth a budget: give --budget-mib or --budget-seconds, too.")
    return (
        None if wishes.compare is None else Manifest.read(wishes.compare),
        None if wishes.trace is None else Traffic.read(wishes.trace),
    )


def _capture(
    config: EngineConfig, doing: str, notes: Console, checks_frozen: bool = False
) -> tuple[Manifest, list[FrozenCheck]]:
    """What an engine of this configuration captures, and what its graphs were given; nothing of it is left."""
    started = time.perf_counter()
    with _progress(doing, notes) as show:
        parts = assemble(config, show)
    captured, seconds = parts.manifest, time.perf_counter() - started
    parts.backend.close()
    checks: list[FrozenCheck] = []
    if checks_frozen:
        with _progress("checking", notes) as show:
            checks = check_graphs(parts, config, show)
    del parts
    gc.collect()  # a model and its cache are in circles, and the next one needs their place
    _say(
        notes,
        f"{len(captured.graphs)} graphs on {captured.device} in {captured.capture_s:.2f} s, "
        f"{captured.pool_bytes / 2**20:.0f} MiB; ready after {seconds:.1f} s",
        *(f"no graph for the {key}: {reason}" for key, reason in captured.missing.items()),
    )
    return captured, checks


def _compare_modes(config: EngineConfig, wishes: Wishes, captured: Manifest, output: Console, notes: Console) -> None:
    """Captures in the other modes, too, writes their reports beside the first one, and prints them side by side.

    Steps that are configured to run eagerly do so in every mode.
    """
    phases = [each for each in _PHASES if getattr(config.backend, each) != "off"] or list(_PHASES)
    configured: set[str] = {getattr(config.backend, each) or "full" for each in phases}
    found: dict[str, Manifest] = {"as configured" if len(configured) > 1 else next(iter(configured)): captured}
    for mode in wishes.modes:
        if {mode} == configured:
            continue
        backend = config.backend.model_copy(update=dict.fromkeys(phases, mode))
        other = config.model_copy(update={"backend": backend, "expected_manifest": None})
        found[mode], _ = _capture(other, f"capturing, {mode}", notes)
        path = wishes.report.with_stem(f"{wishes.report.stem}-{mode}")
        found[mode].write(path)
        if found[mode].graphs:
            output.print(graph_table(found[mode], title=f"Capture mode {mode}"))
        _say(notes, f"report of the mode {mode} in {path}")
    output.print(mode_table(found))


def _plot(captured: Manifest, path: Path, notes: Console) -> None:
    try:
        draw(captured, path)
    except ImportError:
        _say(notes, f"no plot: {path} needs matplotlib (pip install 'graphexec[plot]')")


@contextmanager
def _progress(doing: str, notes: Console) -> Iterator[Progress]:
    """A bar on `notes`, and what moves it."""
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with ProgressBar(*columns, TimeElapsedColumn(), console=notes) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, key: GraphKey) -> None:
            bar.update(task, completed=done, total=total, description=str(key))

        yield show


def _say(notes: Console, *sentences: str) -> None:
    for sentence in sentences:
        notes.print(sentence, markup=False, soft_wrap=True)
