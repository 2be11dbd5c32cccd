"""The benchmarks run: small on the CPU, with every figure that needs no GPU; and they notice what would spoil them."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bench.decode
import bench.linear_sweep
import bench.load
from bench.load import Timed, greedy, random_prompts, steady_decode, timed_generate, window
from bench.provenance import provenance
from bench.report import table
from bench.shapes import SHAPES, engine_config, write_config
from bench.trace import Span, StepGaps, step_gaps
from graphexec import BackendConfig, Engine, RequestOutput

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
    assert all("decode_phase_ms" in row and "long_decode_s" in row["samples"] for row in results["eager"])
    for row in results["decode"]:
        assert row["runs_with_other_tokens_than_eager"] == 0
        samples = row["samples"]
        assert row["overhead"] == pytest.approx(row["decode_step_ms"] / row["bare_replay_ms"])
        phase_s = statistics.median(samples["long_decode_s"]) - statistics.median(samples["short_decode_s"])
        assert row["decode_phase_ms"] == pytest.approx(phase_s / 16 * 1e3)
        assert row["decode_phase_overhead"] == pytest.approx(row["decode_phase_ms"] / row["bare_replay_ms"])
        assert all(part < whole for part, whole in zip(samples["long_decode_s"], samples["long_run_s"], strict=True))
        assert len(samples["long_run_s"]) == len(samples["bare_replay_ms"]) == len(row["windows"]) == 3
        assert row["host_us"] > 0
        assert row["wait_us"] > 0
    assert {name: set(entry["variants"]) for name, entry in results["capture"].items()} == {
        name: {"greedy", "sampled", "shaped", "logprobs"} for name in ("first", "again", "verified")
    }
    greedy = results["capture"]["again"]["variants"]["greedy"]
    assert [(entry["bucket"], entry["pool_mib"]) for entry in greedy["by_bucket"]] == [(2, 0.0), (1, 0.0)]
    printed = capsys.readouterr().out
    assert printed.strip() == table(results)
    assert "  overhead  overhead, decode alone  host us" in printed


def test_the_table_has_the_decode_alone_exactly_if_a_row_has_it() -> None:
    row = {"batch": 1, "prompt_tokens": 12, "depth": 1, "decode_step_ms": 1.5, "bare_replay_ms": 1.0, "overhead": 1.5}
    results = {"decode": [row, row], "eager": [], "capture": {}, "skipped": [], "errors": []}
    assert "  bare ms  overhead  host us" in table(results)
    lines = table(results | {"decode": [row, row | {"decode_phase_overhead": 1.25}]}).splitlines()
    assert "  overhead  overhead, decode alone  host us" in lines[0]
    assert [line.split()[5:7] for line in lines[1:]] == [["1.5", "-"], ["1.5", "1.25"]]


class Clock:
    """What bench.load reads as the time: a millisecond a step, and more while a request waits for its first output.

    Attributes:
        now: seconds.
        prompt_s: how much more, seconds.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.prompt_s = 0.0
        waiting: set[str] = set()
        add_request, step = Engine.add_request, Engine.step

        def noted(engine: Engine, *arguments: Any) -> str:
            request_id = add_request(engine, *arguments)
            waiting.add(request_id)
            return request_id

        def timed(engine: Engine) -> list[RequestOutput]:
            self.now += 0.001 + (self.prompt_s if waiting else 0)
            outputs = step(engine)
            waiting.difference_update(output.request_id for output in outputs)
            return outputs

        monkeypatch.setattr(Engine, "add_request", noted)
        monkeypatch.setattr(Engine, "step", timed)
        monkeypatch.setattr(bench.load, "time", SimpleNamespace(perf_counter=lambda: self.now))


def test_slow_prompts_in_the_long_runs_do_not_move_the_step_of_the_decode_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    clock = Clock(monkeypatch)

    def slower_when_long(engine: Engine, prompts: list[list[int]], tokens: int) -> Timed:
        clock.prompt_s = 0.2 if tokens == 24 else 0.0
        return timed_generate(engine, prompts, tokens)

    monkeypatch.setattr(bench.decode, "timed_generate", slower_when_long)
    path = tmp_path / "decode.json"
    few = ["--depth", "0,1,2", "--repeats", "1", "--no-captures"]
    assert bench.decode.main([*TINY, *few, "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    rows = [*results["decode"], *results["eager"]]
    assert len(rows) == 3 * 2 + 2
    for row in rows:
        assert row["decode_phase_ms"] == pytest.approx(1.0)
        assert row["decode_step_ms"] > 1.0 + 0.2 / 16 * 1e3 - 1e-6


@pytest.fixture(params=[0, 1, 2], ids=lambda depth: f"depth {depth}")
def engine(request: pytest.FixtureRequest, tmp_path: Path, one_thread: None) -> Iterator[Engine]:
    shape = SHAPES["tiny"]
    config = engine_config(shape, write_config(shape, tmp_path), BackendConfig(name="eager"), device="cpu")
    with Engine(config.model_copy(update={"overlap_depth": request.param})) as engine:
        yield engine


def test_a_timed_run_gives_what_generate_gives(engine: Engine) -> None:
    prompts = random_prompts(2, 12, 256)
    timed = timed_generate(engine, prompts, 8)
    assert timed.decode_seconds is not None
    assert 0 < timed.decode_seconds < timed.seconds
    assert timed.token_ids == [output.token_ids for output in engine.generate(prompts, greedy(8))]


def test_the_decode_phase_begins_with_the_first_output_of_the_last_prompt(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    clock.prompt_s = 5.0
    depth = engine.config.overlap_depth
    timed = timed_generate(engine, random_prompts(2, 12, 256), 8)  # the prompts take two steps of 16 rows
    calls = 7 - depth + (depth > 0)  # the last one collects all that is in flight
    assert timed.decode_seconds == pytest.approx(calls * 0.001)
    assert timed.seconds == pytest.approx((2 + depth) * 5.001 + calls * 0.001)


@pytest.mark.parametrize(("length", "tokens"), [(12, 1), (30, 2)])
def test_requests_that_never_decode_together_have_no_decode_phase(engine: Engine, length: int, tokens: int) -> None:
    timed = timed_generate(engine, random_prompts(2, length, 256), tokens)  # one at a time
    assert timed.decode_seconds is None
    assert list(map(len, timed.token_ids)) == [tokens, tokens]


def test_a_request_that_ends_early_fails_the_run(engine: Engine) -> None:
    with pytest.raises(RuntimeError, match="ended after 52 of 80 tokens"):
        timed_generate(engine, random_prompts(2, 12, 256), 80)
    with pytest.raises(RuntimeError, match="was refused: The prompt is empty"):
        timed_generate(engine, [[5, 6], []], 8)
    assert not engine.has_unfinished()


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
    def lying(engine: Engine, prompts: list[list[int]], tokens: int) -> Timed:
        timed = timed_generate(engine, prompts, tokens)
        if engine.config.backend.name == "cudagraph":
            timed.token_ids[-1][-1] += 1
        return timed

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
    assert "24 passed" in done.stdout or torch.cuda.is_available()


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


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs kernels on the CPU, under TRITON_INTERPRET=1"
)
@pytest.mark.parametrize("rows", [1, 8])
def test_a_sweep_of_products_tries_every_tile_on_right_products(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Under Triton's interpreter: what is timed elsewhere runs once here."""

    def launched(record: dict[str, Any], launches: list[Any]) -> dict[str, Any]:
        assert {tuple(launch().shape) for launch in launches} == {(rows, 40)}
        return record

    monkeypatch.setattr(bench.linear_sweep, "measure", launched)
    monkeypatch.setattr(bench.linear_sweep, "launches_to_rotate", lambda size: 2)
    monkeypatch.setattr(bench.linear_sweep, "DTYPE", torch.float16)
    records = list(bench.linear_sweep.sweep("o", 40, 96, rows, 1e12, device="cpu"))
    assert [record["kernel"] for record in records[:2]] == ["torch", "linear"]
    assert sum(record.get("chosen", False) for record in records) == 1
    assert all(record["relative_error"] < 1e-3 for record in records[1:])
