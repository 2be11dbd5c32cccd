"""bench.compare: what moved between two results files, and whether that is a failure."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.compare import METRICS, Metric, compare, figures_of, main

Results = dict[str, Any]
Write = Callable[[str, Results], str]

FACTS: Results = {"commit": "abc", "date": "2026-11-20", "device": "NVIDIA H200", "versions": {"torch": "2.11.0"}}
DECODE: Results = FACTS | {
    "shape": "qwen3-0.6b",
    "decode": [
        {
            "batch": batch,
            "prompt_tokens": 128,
            "depth": depth,
            "decode_step_ms": 1.6 + batch / 100,
            "overhead": 1.02,
            "decode_phase_ms": 1.58 + batch / 100,
            "decode_phase_overhead": 1.01,
            "busy": 0.97,
            "host_us": 200.0,
            "bubble_us": {"p50": 1.0, "p99": 4.0},
            "runs_with_other_tokens_than_eager": 0,
            "tokens_per_s": 625.0,
        }
        for depth in (0, 1)
        for batch in (1, 64)
    ],
    "eager": [{"batch": 1, "prompt_tokens": 128, "decode_step_ms": 9.0}],
    "capture": {
        "again": {
            "wall_s": 9.0,
            "capture_s": 1.0,
            "pool_mib": 300.0,
            "device_mib": 500.0,
            "variants": {"greedy": {"capture_s": 0.5, "warmup_s": 4.0, "pool_mib": 150.0}},
        }
    },
    "skipped": [],
    "errors": [],
}
STARTUP: Results = FACTS | {
    "shape": "qwen3-0.6b",
    "startup": [
        {"compile": "layer", "cache": "cold", "ready_s": 60.0, "first_token_s": 61.0, "compile_s": None, "steps": []},
        {"compile": "layer", "cache": "warm", "ready_s": 30.0, "first_token_s": 31.0, "compile_s": 2.0, "steps": []},
    ],
}
BENCHMARKS: Results = {
    "provenance": FACTS,
    "benchmarks": [
        {"name": "test_controller_step[64]", "stats": {"median": 30e-6}, "extra_info": {}},
        {"name": "test_engine_step[64]", "stats": {"median": 90e-6}, "extra_info": {"host_us_per_step": 80.0}},
    ],
}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, results: Results) -> str:
        path = tmp_path / name
        path.write_text(json.dumps(results))
        return str(path)

    return write


def changed(results: Results, change: Callable[[Results], object]) -> Results:
    """A copy of the results with a change."""
    new = copy.deepcopy(results)
    change(new)
    return new


@pytest.mark.parametrize("results", [DECODE, STARTUP, BENCHMARKS], ids=["decode", "startup", "benchmarks"])
def test_equal_files_pass_and_every_figure_was_compared(
    results: Results, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([write("old", results), write("new", results)]) == 0
    printed = capsys.readouterr().out
    assert "old: commit abc, 2026-11-20, NVIDIA H200" in printed
    assert f"{len(figures_of(results))} figures compared: 0 worse beyond their tolerance, 0 better" in printed


def test_the_figures_of_a_file_are_found_by_row_and_name() -> None:
    figures = figures_of(DECODE)
    assert figures["decode, prompt_tokens 128, batch 64, depth 1", "decode_step_ms"] == 2.24
    assert figures["decode, prompt_tokens 128, batch 64, depth 1", "bubble_us.p99"] == 4.0
    assert figures["eager, prompt_tokens 128, batch 1", "decode_step_ms"] == 9.0
    assert figures["capture of the ladder, again, greedy", "pool_mib"] == 150.0
    assert len(figures) == 4 * 9 + 1 + 4 + 3
    assert figures_of(BENCHMARKS)["test_engine_step[64]", "host_us"] == 80.0
    assert figures_of(BENCHMARKS)["test_controller_step[64]", "median_us"] == pytest.approx(30)
    assert ("start, compile layer, cold, number 1", "compile_s") not in figures_of(STARTUP)


def test_a_step_that_takes_longer_is_a_regression_and_is_named(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    slower = changed(DECODE, lambda new: new["decode"][3].update(decode_step_ms=2.24 * 1.2))
    old, new = write("old", DECODE), write("new", slower)
    assert main([old, new]) == 1
    line = "worse    decode, prompt_tokens 128, batch 64, depth 1: decode_step_ms 2.24 -> 2.688 (+20.0%, tolerance 8%)"
    assert line in capsys.readouterr().out.splitlines()
    assert main([old, new, "--tolerance", "0.25"]) == 0
    assert main([old, new, "--tolerance", "decode_step_ms=0.25"]) == 0
    assert main([old, new, "--tolerance", "host_us=0.25"]) == 1
    assert main([old, new, "--tolerance", "0.25", "--tolerance", "decode_step_ms=0.1"]) == 1


def test_an_improvement_is_told_and_passes(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    faster = changed(DECODE, lambda new: new["decode"][0].update(decode_step_ms=1.0))
    assert main([write("old", DECODE), write("new", faster)]) == 0
    assert "better   decode, prompt_tokens 128, batch 1, depth 0: decode_step_ms" in capsys.readouterr().out


def test_less_busy_is_worse_and_more_is_better(write: Write) -> None:
    idle = changed(DECODE, lambda new: new["decode"][0].update(busy=0.8))
    assert main([write("old", DECODE), write("new", idle)]) == 1
    assert main([write("old", idle), write("new", DECODE)]) == 0


def test_a_small_change_of_a_small_figure_is_noise(write: Write) -> None:
    assert METRICS["bubble_us.p50"].floor == 0.5
    old = write("old", DECODE)
    noise = changed(DECODE, lambda new: new["decode"][0]["bubble_us"].update(p50=1.4))  # 40 %, but 0.4 us
    assert main([old, write("new", noise)]) == 0
    gap = changed(DECODE, lambda new: new["decode"][0]["bubble_us"].update(p50=1.6))
    assert main([old, write("new", gap)]) == 1


def test_a_figure_that_was_nothing_and_is_something_is_a_regression(write: Write) -> None:
    other_tokens = changed(DECODE, lambda new: new["decode"][0].update(runs_with_other_tokens_than_eager=1))
    assert main([write("old", DECODE), write("new", other_tokens)]) == 1
    assert Metric().worse_by(0.0, -1.0) < 0 < Metric(higher_is_better=True).worse_by(0.0, -1.0)


def test_a_row_that_vanished_fails_unless_it_may(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    fewer = changed(DECODE, lambda new: new["decode"].pop())
    fewer["skipped"] = ["batch 64, prompts of 128, depth 1"]
    old, new = write("old", DECODE), write("new", fewer)
    assert main([old, new]) == 1
    printed = capsys.readouterr().out
    assert "vanished decode, prompt_tokens 128, batch 64, depth 1: decode_step_ms, 2.24 before" in printed
    assert "note: skipped in new: batch 64, prompts of 128, depth 1" in printed
    assert main([old, new, "--allow-missing"]) == 0


def test_a_figure_that_vanished_from_its_row_fails(write: Write) -> None:
    untraced = changed(DECODE, lambda new: new["decode"][0].pop("busy"))
    assert main([write("old", DECODE), write("new", untraced)]) == 1


def test_a_new_row_is_told_and_passes(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    row = DECODE["decode"][0] | {"depth": 2}
    assert main([write("old", DECODE), write("new", changed(DECODE, lambda new: new["decode"].append(row)))]) == 0
    assert "new      decode, prompt_tokens 128, batch 1, depth 2: overhead 1.02" in capsys.readouterr().out


def test_a_figure_that_is_new_in_its_row_is_told_and_passes(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    older = changed(DECODE, lambda old: [row.pop("decode_phase_overhead") for row in old["decode"]])
    assert main([write("old", older), write("new", DECODE)]) == 0
    line = "new      decode, prompt_tokens 128, batch 64, depth 1: decode_phase_overhead 1.01"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("name", ["overhead", "decode_phase_overhead"])
def test_an_overhead_that_grows_beyond_three_per_cent_is_a_regression(name: str, write: Write) -> None:
    old = write("old", DECODE)
    for growth, code in ((1.02, 0), (1.04, 1)):
        new = changed(
            DECODE, lambda new, growth=growth: new["decode"][3].update({name: new["decode"][3][name] * growth})
        )
        assert main([old, write("new", new)]) == code


def test_another_device_is_noted(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([write("old", DECODE), write("new", DECODE | {"device": "NVIDIA A10"})]) == 0
    assert "note: another device, so not every difference is the code's" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (STARTUP, "different measurements: ['decode'] and ['startup']"),
        (DECODE | {"shape": "qwen3-8b"}, "different shapes: qwen3-0.6b and qwen3-8b"),
        (FACTS | {"shape": "qwen3-0.6b", "decode": []}, "no figures"),
        (DECODE | {"decode": DECODE["decode"] * 2}, "two rows for decode, prompt_tokens 128, batch 1, depth 0"),
        (changed(DECODE, lambda new: new["decode"][0].update(busy="high")), "busy is 'high', which is no number"),
        (changed(DECODE, lambda new: new["decode"][0].update(busy=float("nan"))), "busy is nan"),
        (DECODE | {"decode": [1]}, "not as expected"),
    ],
)
def test_files_that_cannot_be_compared_are_refused(
    results: Results, message: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([write("old", DECODE), write("new", results)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[1]", "a JSON object is expected")])
def test_a_file_that_holds_no_results_is_refused(
    content: str, message: str, tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken"
    path.write_text(content)
    assert main([str(path), write("new", DECODE)]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_not_there_is_refused(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([write("old", DECODE), "/nowhere.json"]) == 2
    assert "Cannot read /nowhere.json: No such file or directory." in capsys.readouterr().err


@pytest.mark.parametrize("tolerance", ["step=0.1", "-0.1", "much", "nan"])
def test_a_tolerance_that_makes_no_sense_is_refused(tolerance: str, write: Write) -> None:
    path = write("old", DECODE)
    with pytest.raises(SystemExit) as stopped:
        main([path, path, f"--tolerance={tolerance}"])
    assert stopped.value.code == 2


def test_a_change_at_the_tolerance_passes() -> None:
    at = compare({("row", "overhead"): 1.0}, {("row", "overhead"): 1.5}, {"overhead": Metric(0.5)})
    assert at.worse == []
    over = compare({("row", "overhead"): 1.0}, {("row", "overhead"): 1.501}, {"overhead": Metric(0.5)})
    assert len(over.worse) == 1
