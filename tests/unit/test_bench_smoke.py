"""The benchmarks run: small on the CPU, with every figure that needs no GPU; and they notice what would spoil them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bench.decode
from bench.load import random_prompts, steady_decode, window
from bench.provenance import provenance
from bench.report import table
from bench.shapes import SHAPES, engine_config, write_config
from bench.trace import Span, StepGaps, step_gaps
from graphexec import BackendConfig, Engine

ROOT = Path(__file__).parents[2]
TINY = ["--shape", "tiny", "--batch", "1,2", "--tokens", "8,24", "--device", "cpu"]


@pytest.fixture
def one_thread() -> None:
    """A tiny model on two threads waits for the second more than it computes."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def restored_threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_small_run_on_the_cpu_gives_every_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    path = tmp_path / "results" / "decode.json"
    assert bench.decode.main([*TINY, "--depth", "0,1", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert results["errors"] == results["skipped"] == []
    assert results["command"].startswith("python -m bench.decode --shape tiny")
    assert [(row["depth"], row["batch"]) for row in results["decode"]] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [(row["batch"], len(row["samples"]["long_run_s"])) for row in results["eager"]] == [(1, 1), (2, 1)]
    for row in results["decode"]:
        assert row["runs_with_other_tokens_than_eager"] == 0
        assert row["overhead"] == pytest.approx(row["decode_step_ms"] / row["bare_replay_ms"])
        assert len(row["samples"]["long_run_s"]) == len(row["samples"]["bare_replay_ms"]) == len(row["windows"]) == 3
        assert row["host_us"] > 0
        assert row["wait_us"] > 0
    assert {name: set(entry["variants"]) for name, entry in results["capture"].items()} == {
        name: {"greedy", "sampled", "shaped", "logprobs"} for name in ("first", "again", "verified")
    }
    greedy = results["capture"]["again"]["variants"]["greedy"]
    assert [(entry["bucket"], entry["pool_mib"]) for entry in greedy["by_bucket"]] == [(2, 0.0), (1, 0.0)]
    printed = capsys.readouterr().out
    assert printed.strip() == table(results)
    assert "overhead" in printed


def test_long_prompts_are_measured_where_their_keys_and_values_fit(tmp_path: Path, one_thread: None) -> None:
    path = tmp_path / "context.json"
    long = ["--prompt", "20,90", "--kv-gib", "0.0002", "--depth", "1", "--repeats", "1", "--no-captures"]
    assert bench.decode.main([*TINY, *long, "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert [(row["prompt_tokens"], row["batch"]) for row in results["decode"]] == [(20, 1), (20, 2), (90, 1)]
    assert all(row["runs_with_other_tokens_than_eager"] == 0 for row in results["decode"])
    assert len(results["skipped"]) == 1
    assert results["skipped"][0].startswith("batch 2, prompts of 90: its keys and values take")
    assert results["engine"]["max_model_len"] == 90 + 24 + 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "500"], "tiny has 512 positions, and 610 are asked"),
        (["--kv-gib", "0.000001"], "nothing fits into --kv-gib: batch 1, prompts of 12"),
        (["--tokens", "8,8"], "two rising numbers"),
        (["--batch", "one"], "invalid integers value"),
    ],
)
def test_a_plan_that_cannot_be_measured_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.decode.main([*TINY, *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_keys_and_values_of_the_published_shapes_have_their_known_size() -> None:
    assert SHAPES["qwen3-0.6b"].kv_bytes == 28 * 2 * 8 * 128 * 2
    assert SHAPES["tiny"].kv_bytes == 2 * 2 * 1 * 64 * 4


def test_when_the_time_is_up_the_rest_is_named(tmp_path: Path, one_thread: None) -> None:
    path = tmp_path / "decode.json"
    assert bench.decode.main([*TINY, "--depth", "1", "--minutes", "0", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert results["decode"] == []
    assert results["skipped"][:2] == [f"batch {batch}, prompts of 12, depth 1" for batch in (1, 2)]


def test_a_part_that_fails_does_not_keep_the_next_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    def broken(*_: object) -> object:
        raise RuntimeError("the lights went out")

    monkeypatch.setattr(bench.decode, "window", broken)
    path = tmp_path / "decode.json"
    arguments = [*TINY, "--depth", "1", "--repeats", "1", "--no-captures", "--json", str(path)]
    assert bench.decode.main(arguments) == 1
    results = json.loads(path.read_text())
    assert [error["part"] for error in results["errors"]] == [
        f"windows of batch {batch}, prompts of 12, depth 1" for batch in (1, 2)
    ]
    assert all(row["decode_step_ms"] for row in results["decode"])


def test_other_tokens_than_eager_fail_the_run(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    honest: Callable[..., tuple[float, list[list[int]]]] = bench.decode.timed_generate

    def lying(engine: Engine, *arguments: object) -> tuple[float, list[list[int]]]:
        seconds, given = honest(engine, *arguments)
        if engine.config.backend.name == "cudagraph":
            given[-1][-1] += 1
        return seconds, given

    monkeypatch.setattr(bench.decode, "timed_generate", lying)
    assert bench.decode.main([*TINY, "--depth", "1", "--repeats", "1", "--no-captures"]) == 1


def test_a_window_that_is_no_steady_decode_is_refused(tmp_path: Path, one_thread: None) -> None:
    shape = SHAPES["tiny"]
    config = engine_config(shape, write_config(shape, tmp_path), BackendConfig(name="eager"), device="cpu")
    prompts = random_prompts(2, 4, shape.vocab_size)
    with Engine(config) as engine:
        with steady_decode(engine, prompts, 24):
            assert window(engine, 2, 4).steps == 4
            with pytest.raises(RuntimeError, match="too short"):
                window(engine, 2, 24)
        assert not engine.has_unfinished()
        with pytest.raises(RuntimeError, match="never decoded together"), steady_decode(engine, prompts, 1):
            pass


def traced_step(begin_us: int, copies: bool = False) -> list[Span]:
    """Three kernels of 30, 40 and 10 microseconds with a microsecond between the last two."""
    spans = [
        Span("_prepare", begin_us * 1000, begin_us * 1000 + 30_000),
        Span("gemm", begin_us * 1000 + 30_000, begin_us * 1000 + 70_000),
        Span("_update", begin_us * 1000 + 71_000, begin_us * 1000 + 81_000),
    ]
    if copies:  # on the copy stream, in the gap
        spans.append(Span("Memcpy DtoH (Device -> Pinned)", begin_us * 1000 + 82_000, begin_us * 1000 + 84_000))
    return spans


def test_bubbles_lie_between_the_last_kernel_of_a_step_and_the_first_of_the_next() -> None:
    begins = [0, 85, 170, 500, 590, 680, 765]  # the steps that starting the trace held up come first
    spans = [span for begin in begins for span in traced_step(begin, copies=True)]
    gaps = step_gaps(reversed(spans), skip=3)
    assert gaps == StepGaps(bubble_us=(9.0, 9.0, 4.0), busy=pytest.approx(240 / 265), step_us=90.0, kernels=3)
    assert gaps.as_dict()["bubble_us"]["p50"] == 9.0  # type: ignore[index]  # JSON values


def test_a_kernel_that_overlaps_the_last_one_of_its_step_belongs_to_the_step() -> None:
    spans = [span for begin in range(0, 900, 100) for span in traced_step(begin)]
    spans += [Span("side branch", begin * 1000 + 60_000, begin * 1000 + 90_000) for begin in range(0, 900, 100)]
    assert set(step_gaps(spans).bubble_us) == {10.0}


def test_a_trace_without_steps_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="0 steps and 1 kernels, among them \\['gemm'\\]"):
        step_gaps([Span("gemm", 0, 5), Span("Memset (Device)", 5, 6)])


def test_the_commit_comes_from_the_environment_where_there_is_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHEXEC_COMMIT", "abc123")
    facts = provenance(["python", "-m", "bench.decode", "--json", "a b"], torch.device("cpu"))
    assert facts["commit"] == "abc123"
    assert facts["command"] == "python -m bench.decode --json 'a b'"
    spelled = ["pytest", "bench/test_gpu.py", "--benchmark-json=/tmp/out/gpu.json", "--json", "/tmp/a.json"]
    assert provenance(spelled, torch.device("cpu"))["command"] == (
        "pytest bench/test_gpu.py --benchmark-json=gpu.json --json a.json"
    )
    monkeypatch.delenv("GRAPHEXEC_COMMIT")
    monkeypatch.setenv("PATH", "")
    assert provenance([], torch.device("cpu"))["commit"] == "unknown"


def test_the_benchmarks_of_the_host_run_once() -> None:
    files = ["bench/test_host.py", "bench/test_gpu.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 passed" in done.stdout or torch.cuda.is_available()


def test_the_round_on_the_gpu_is_a_script_that_refuses_other_words() -> None:
    script = str(ROOT / "bench" / "gpu_round.sh")
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run(["bash", script, "toast"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: bench/gpu_round.sh tests|bench|bench-8b|context|")
    text = Path(script).read_text()
    for name in done.stderr.split()[-1].split("|"):
        assert f"\n{name}() {{" in text, f"{name} is offered, and is no function of the script"
    for part in ("", "bench|bench-8b", "install"):  # a function that is no round, too
        assert subprocess.run(["bash", script, part], capture_output=True).returncode == 2
