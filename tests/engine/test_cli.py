"""The command line: text on standard output, figures and errors on standard error, exit codes 0, 1 and 2."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

SMALL = ["--max-model-len", "64", "--max-num-seqs", "2", "--device", "cpu"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "graphexec", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, errors="replace", check=False)


PROMPT = 'def load(filename):\n    """Load a file and return its content."""\n'


def test_generate_prints_a_completed_function_and_closes_with_figures() -> None:
    done = run("generate", PROMPT, "--echo", *SMALL, "--backend", "eager", "--overlap-depth", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(PROMPT)
    (function,) = ast.parse(done.stdout).body
    assert len(function.body) > 1
    assert "tiny (license apache-2.0) on cpu" in done.stderr.splitlines()[-1]
    assert "tokens/s" in done.stderr
    assert "depth 2" in done.stderr


def test_one_bad_prompt_costs_the_others_nothing_and_the_exit_code_says_so() -> None:
    done = run("generate", "def f(", "", *SMALL, "--max-tokens", "8")
    assert done.returncode == 2
    assert done.stdout.strip()
    assert "prompt '': The prompt is empty" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "Missing argument"),
        (["generate", "x", "--no-such-option"], "No such option"),
        (["generate", "x", "--backend", "cudagrap"], "Did you mean 'cudagraph'"),
        (["generate", "x", "--overlap-depth", "9"], "overlap_depth=9"),
        (["generate", "x", "--top-p", "0"], "top_p=0.0"),
        (["generate", "x", "--model", "/nowhere"], "There is no folder"),
        (["generate", "x", "--config", "/nowhere.toml"], "Cannot read /nowhere.toml"),
        (["warmup", "--report", "/nowhere/report.json"], "Cannot write the report"),
        (["warmup", "--trace", "/nowhere.json"], "give --budget-mib or --budget-seconds"),
        (["warmup", "--budget-mib", "0"], "--budget-mib=0 is a budget of nothing"),
        (["warmup", "--device", "cpu", "--check-frozen"], "--check-frozen reads captured graphs, and needs CUDA"),
    ],
)
def test_bad_input_exits_with_two(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_key_of_a_toml_file_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "engine.toml"
    path.write_text("max_num_seq = 2\n[backend]\nname = 'eager'\n")
    done = run("generate", "x", "--config", str(path))
    assert done.returncode == 2
    assert "Did you mean 'max_num_seqs'" in done.stderr


def test_warmup_captures_the_ladder_and_writes_a_report_that_an_engine_is_held_to(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    config = tmp_path / "engine.toml"
    config.write_text(
        "max_num_seqs = 3\nmax_model_len = 64\nmax_num_batched_tokens = 29\n"
        "[backend]\ncapture_sizes = [1, 3]\nprefill_sizes = [32]\nverify = true\n"
    )
    warm_up = ["warmup", "--config", str(config), "--device", "cpu", "--report", str(report)]
    done = run(*warm_up)
    assert done.returncode == 0, done.stderr
    written = json.loads(report.read_text())
    assert [tuple(graph["key"].values()) for graph in written["graphs"]] == [
        ("prefill", 32, 3, "sampled"),
        ("mixed", 32, 3, "sampled"),
        *(("decode", bucket, bucket, variant) for bucket in (3, 1) for variant in ("greedy", "sampled")),
    ]
    assert all(graph["verified"] and graph["replay_us"] > 0 for graph in written["graphs"])
    assert written["missing"] == {}
    assert "6 graphs on cpu" in done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    (decode,) = (words for words in lines if words[:2] == ["decode", "greedy"])
    assert decode[2:8] == ["1-3", "1-3", "2", "1", "0", "1"]
    (total,) = (words for words in lines if words[:1] == ["all"])
    assert total[:2] == ["all", "6"]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    config.write_text(f"expected_manifest = '{report}'\n" + config.read_text())
    other = run("generate", "x", "--config", str(config), "--device", "cpu", "--max-num-seqs", "4")
    assert other.returncode == 2
    assert "manifest mismatch: max_num_seqs is 4 here and 3 there" in " ".join(other.stderr.split())
    written["graphs"][0] |= {"nodes": 0, "fingerprint": ""}
    report.write_text(json.dumps(written))
    worse = run(*warm_up, "--compare", str(report))
    assert worse.returncode == 1
    assert "changed: In 1 graphs of prefill steps, sampled" in worse.stderr
    assert "worse: 1 graphs of prefill steps, sampled, grew from 0 to 1 nodes" in worse.stderr
    assert run(*warm_up, "--compare", str(report)).returncode == 0, "it is compared with what the last one wrote"


def test_a_budget_chooses_for_the_traffic_that_generate_has_counted(tmp_path: Path) -> None:
    trace, report = tmp_path / "trace.json", tmp_path / "report.json"
    small = [*SMALL, "--max-num-seqs", "4"]
    done = run("generate", "x", "y", "z", *small, "--max-tokens", "6", "--trace-out", str(trace))
    assert done.returncode == 0, done.stderr
    assert json.loads(trace.read_text())["decode"]["3"] >= 5
    chosen = run("warmup", *small, "--report", str(report), "--trace", str(trace), "--budget-seconds", "60")
    assert chosen.returncode == 0, chosen.stderr
    assert "expected: " in chosen.stderr
    fragment = tomllib.loads(chosen.stdout.partition("\n\n")[0])["backend"]
    settings = json.loads(report.read_text())["settings"]
    assert fragment
    assert {name: settings[f"backend.{name}"] for name in fragment} == fragment


def test_capture_sizes_of_a_file_set_the_slots_of_generate(tmp_path: Path) -> None:
    config = tmp_path / "engine.toml"
    config.write_text("max_model_len = 64\n[backend]\ncapture_sizes = [1, 8]\n")
    done = run("generate", "x", "--config", str(config), "--device", "cpu", "--max-tokens", "2")
    assert done.returncode == 0, done.stderr


def test_the_version_is_printed() -> None:
    assert run("--version").returncode == 0


def test_env_prints_the_resolved_configuration() -> None:
    done = run("env")
    assert done.returncode == 0, done.stderr
    for word in ("torch", "max_model_len", "overlap_depth", "1024"):
        assert word in done.stdout


def test_a_stop_text_ends_the_output_before_it() -> None:
    whole = run("generate", PROMPT, *SMALL).stdout
    stop = whole.strip()[2:6]
    done = run("generate", PROMPT, *SMALL, "--stop", stop, "--min-p", "0.1", "--repetition-penalty", "1.0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == whole[: whole.index(stop)] + "\n"
