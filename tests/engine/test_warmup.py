"""The warm-up's tool over a whole engine: budgets, capture modes, comparisons and what is written."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from graphexec.capture.budget import Budget
from graphexec.capture.manifest import Manifest
from graphexec.capture.traffic import Traffic
from graphexec.config import BackendConfig, EngineConfig
from graphexec.engine import Engine, SamplingParams
from graphexec.errors import ConfigError
from graphexec.warmup.tool import Wishes, capture_modes, warm_up

SIZES = BackendConfig(capture_sizes=(1, 2, 4), prefill_sizes=(16, 32), prefill_slots=(4,))
CONFIG = EngineConfig(max_num_seqs=4, max_model_len=64, max_num_batched_tokens=28, device="cpu", backend=SIZES)


def run(config: EngineConfig, wishes: Wishes) -> tuple[bool, str, str]:
    """Whether nothing is worse, what was printed, and what was said."""
    output, notes = io.StringIO(), io.StringIO()
    good = warm_up(config, wishes, Console(file=output, width=200), Console(file=notes, width=200))
    return good, output.getvalue(), notes.getvalue()


def test_every_mode_is_measured_and_leaves_a_report_beside_the_configured_one(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    good, printed, _ = run(CONFIG, Wishes(path, modes=capture_modes("full, piecewise,off")))
    assert good
    whole, pieces = Manifest.read(path), Manifest.read(tmp_path / "report-piecewise.json")
    assert {graph.key for graph in whole.graphs} == {graph.key for graph in pieces.graphs}
    assert {graph.pieces for graph in whole.graphs} == {1}
    assert min(graph.pieces for graph in pieces.graphs) > 1
    assert all(graph.replay_us and graph.launch_us for graph in (*whole.graphs, *pieces.graphs))
    assert Manifest.read(tmp_path / "report-off.json").graphs == ()
    modes = printed[printed.index("Capture modes") :].split()
    assert modes.count("full") == modes.count("piecewise") == 4, "prefill, mixed, and two samplers of decode steps"


def test_without_matplotlib_a_line_says_so_and_the_reports_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    off = CONFIG.model_copy(update={"backend": SIZES.model_copy(update={"prefill": "off"})})
    _, _, said = run(off, Wishes(tmp_path / "report.json", modes=("piecewise",)))
    assert "report.png needs matplotlib (pip install 'graphexec[plot]')" in said
    assert len(Manifest.read(tmp_path / "report.json").graphs) == 6
    assert not (tmp_path / "report.png").exists()
    pieces = Manifest.read(tmp_path / "report-piecewise.json")
    assert {graph.key.phase for graph in pieces.graphs} == {"decode"}, "what is off is off in every mode"


def test_a_budget_captures_what_it_chose_and_what_it_left_out_is_not_worse(tmp_path: Path) -> None:
    before, path = tmp_path / "before.json", tmp_path / "report.json"
    run(CONFIG, Wishes(before))
    trace = tmp_path / "trace.json"
    Traffic({2: 10}, {(16, 4): 1}).write(trace)
    good, printed, said = run(
        CONFIG, Wishes(path, compare=before, tolerance=1000.0, budget=Budget(seconds=60.0), trace=trace)
    )
    assert good, said
    assert "[backend]" in printed
    assert "a step takes" in said
    assert "without graphs" in said
    assert "more than the budget" not in said
    settings = Manifest.read(path).settings
    assert settings["backend.decode"] == "off" or 1 not in settings["backend.capture_sizes"], "nobody needs that size"


def test_a_budget_of_nothing_is_refused_with_the_least_that_would_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="The budget of 0 s is nothing. The smallest that would do is .* s, for size"):
        run(CONFIG, Wishes(tmp_path / "report.json", budget=Budget(seconds=0)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("backend", "settings", "message"),
    [
        (BackendConfig(name="eager"), {}, "There is nothing to choose: backend.name='eager' captures nothing"),
        (BackendConfig(decode="off", prefill="off"), {}, "captures nothing with decode='off' and prefill='off'"),
        (SIZES.model_copy(update={"decode": "off"}), {}, "The traffic has no step that could have a graph"),
        (SIZES, {"expected_manifest": "x.json"}, "expected_manifest fixes the sizes"),
    ],
)
def test_a_budget_for_what_captures_nothing_or_may_not_change_is_refused(
    tmp_path: Path, backend: BackendConfig, settings: dict[str, object], message: str
) -> None:
    config = CONFIG.model_copy(update={"backend": backend, **settings})
    Traffic({1: 3}).write(tmp_path / "trace.json")
    with pytest.raises(ConfigError, match=message):
        run(config, Wishes(tmp_path / "report.json", budget=Budget(mib=100.0), trace=tmp_path / "trace.json"))


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (Wishes(Path("/nowhere/report.json")), "Cannot write the report"),
        (Wishes(Path("report.png")), "its plot stands beside it"),
        (Wishes(Path("report.json"), trace=Path("trace.json")), "give --budget-mib or --budget-seconds"),
        (Wishes(Path("report.json"), compare=Path("/nowhere.json")), "Cannot read /nowhere.json"),
        (Wishes(Path("report.json"), budget=Budget(mib=1), trace=Path("/nowhere.json")), "Cannot read /nowhere.json"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused_before_anything_takes_long(wishes: Wishes, message: str) -> None:
    nothing = CONFIG.model_copy(update={"model": "/nowhere"})
    with pytest.raises(ConfigError, match=message):
        run(nothing, wishes)


@pytest.mark.parametrize("words", ["whole", "full,whole", "", ","])
def test_a_mode_that_does_not_exist_is_refused(words: str) -> None:
    with pytest.raises(ConfigError, match="name some of full, piecewise, off"):
        capture_modes(words)


def test_an_engine_counts_its_steps_by_the_size_that_they_need() -> None:
    with Engine(CONFIG) as engine:
        engine.generate([[5] * 9, [6] * 4, [7]], SamplingParams(max_tokens=5, ignore_eos=True))
        traffic, stats = engine.stats().traffic, engine.stats()
    idle = stats.eager_steps.get("idle", 0)
    assert traffic.steps == stats.steps - idle
    assert traffic.chunks == {(16, 4): 1}, "14 rows in 3 slots, counted by 16 rows and all 4 slots"
    assert traffic.decode[3] == 4
