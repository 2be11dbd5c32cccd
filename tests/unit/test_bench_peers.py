"""The peers and starts are measured: small on the CPU where they run there, and their arithmetic everywhere."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.continuous_batching import cache

import bench.method
import bench.startup
from bench.method import STARTED, Slope, integers, measure_slope, random_prompts, seconds_since_start
from bench.peers import compiled, transformers_batching
from bench.peers.measure import Load, Results, arguments_for, load_of, measure_peer, run_peer
from bench.peers.transformers_batching import continuous_batching, random_model
from bench.peers.vllm import bench as vllm_bench
from bench.shapes import SHAPES
from bench.trace import Span, kernel_ns

ROOT = Path(__file__).parents[2]
TINY = ["--shape", "tiny", "--batch", "1,2", "--tokens", "4,10", "--repeats", "1", "--device", "cpu"]
LOAD = Load(SHAPES["tiny"], (1, 2), (12,), (4, 10), repeats=2, device="cpu")


@pytest.fixture(autouse=True)
def one_thread() -> object:
    """A tiny model on two threads waits for the second more than it computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def known_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks psutil how much memory a CPU has, and finds none where that is not installed."""
    monkeypatch.setattr(cache, "get_device_and_memory_breakdown", lambda: (torch.device("cpu"), 1 << 32, 0, 0))


class Echo:
    """A peer that answers with its prompt's first token."""

    name = "echo 1.0"
    handicap = "It has no model."
    settings: dict[str, object] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.runs: list[tuple[int, int]] = []

    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        self.runs.append((len(prompts), tokens))
        return [prompt[:1] * tokens for prompt in prompts]


def greedy_tokens(load: Load, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """What transformers' own `generate` gives."""
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = torch.tensor(prompts)
    given = random_model(load, "sdpa").generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return given[:, ids.shape[1] :].tolist()


def test_a_slope_leaves_out_what_both_runs_share() -> None:
    slope = Slope((32, 288), [5.0, 1.032, 1.032], [1.288, 1.288, 0.0])
    assert slope.step_ms == pytest.approx(1.0)
    assert slope.samples() == {"short_run_s": [5.0, 1.032, 1.032], "long_run_s": [1.288, 1.288, 0.0]}


def test_the_lengths_take_turns_after_a_run_to_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    clock = SimpleNamespace(now=0.0)

    def run(tokens: int) -> None:
        lengths.append(tokens)
        clock.now += 7.0 + tokens / 1000

    monkeypatch.setattr(bench.method, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    slope = measure_slope(run, (10, 30), 2)
    assert lengths == [5, 10, 30, 10, 30]
    assert (len(slope.short_s), len(slope.long_s)) == (2, 2)
    assert slope.step_ms == pytest.approx(1.0)


def test_prompts_are_the_same_for_every_system() -> None:
    assert random_prompts(2, 4, 256) == random_prompts(2, 4, 256)
    assert all(0 <= token < 256 for prompt in random_prompts(4, 64, 256) for token in prompt)
    assert integers("1,8,32") == (1, 8, 32)


def test_who_starts_a_process_can_say_when(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STARTED, str(time.time() - 100))
    assert 100 <= seconds_since_start() < 110
    monkeypatch.delenv(STARTED)
    assert 0 < seconds_since_start() < time.time() - 1e6


def test_peers_are_measured_without_graphexec() -> None:
    code = "import sys, bench.peers.measure, bench.peers.vllm.bench; sys.exit('graphexec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_peer_writes_the_same_shape_of_file_as_graphexec(tmp_path: Path) -> None:
    path = tmp_path / "results" / "echo.json"
    peer = Echo()
    assert run_peer(LOAD, lambda load: peer, ["python", "-m", "echo"], path) == 0
    results = json.loads(path.read_text())
    assert (results["system"], results["handicap"], results["shape"]) == ("echo 1.0", "It has no model.", "tiny")
    assert (results["errors"], results["skipped"], results["command"]) == ([], [], "python -m echo")
    assert [(row["batch"], row["prompt_tokens"]) for row in results["decode"]] == [(1, 12), (2, 12)]
    for row in results["decode"]:
        slope = Slope((4, 10), row["samples"]["short_run_s"], row["samples"]["long_run_s"])
        assert row["decode_step_ms"] == pytest.approx(slope.step_ms)
        assert len(slope.short_s) == len(slope.long_s) == 2
    assert peer.runs == [(batch, tokens) for batch in (1, 2) for tokens in (2, 4, 10, 4, 10)]


def test_a_peer_that_gives_too_few_tokens_has_no_figure(tmp_path: Path) -> None:
    class Lazy(Echo):
        def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
            given = super().generate(prompts, tokens)
            return [ids[:-1] for ids in given] if len(prompts) == 2 else given

    path = tmp_path / "lazy.json"
    assert run_peer(LOAD, lambda load: Lazy(), [], path) == 1
    results = json.loads(path.read_text())
    assert [row["batch"] for row in results["decode"]] == [1]
    [error] = results["errors"]
    assert error["part"] == "batch 2, prompts of 12"
    assert "lengths other than 2: [1, 1]" in error["error"]


def test_a_peer_out_of_time_names_what_it_skipped() -> None:
    files: list[Results] = []
    load = Load(SHAPES["tiny"], (1, 2), (12,), device="cpu", minutes=0)
    results = measure_peer(load, lambda load: Echo(), [], files.append)
    assert results["skipped"] == ["batch 1, prompts of 12", "batch 2, prompts of 12"]
    assert results["decode"] == []
    assert len(files) == 4  # at the start, after each row, at the end


def test_busy_time_counts_overlapping_kernels_once_and_copies_never() -> None:
    spans = [Span("b", 50, 120), Span("a", 0, 100), Span("c", 200, 210), Span("Memcpy HtoD", 300, 900)]
    assert kernel_ns(spans) == 130
    assert kernel_ns([]) == 0


def test_the_words_of_a_peers_command_line_make_its_load() -> None:
    parser = arguments_for("bench.peers.echo", "Echoes.")
    load = load_of(parser.parse_args([*TINY, "--prompt", "7,9", "--traced", "--minutes", "1.5"]))
    assert load == Load(SHAPES["tiny"], (1, 2), (7, 9), (4, 10), 1, True, "cpu", 1.5)
    assert load.longest == 19
    default = load_of(parser.parse_args([]))
    assert (default.batches, default.prompts, default.tokens) == ((1, 8, 32, 64, 128, 256), (128,), (32, 288))


def test_the_compiled_loop_gives_the_tokens_of_generate() -> None:
    peer = compiled.Compiled(LOAD, "eager")
    for batch in (2, 1):
        prompts = random_prompts(batch, 12, 256)
        expected = greedy_tokens(LOAD, prompts, 10)
        assert peer.generate(prompts, 10) == expected
        assert peer.generate(prompts, 4) == [ids[:4] for ids in expected]


def test_the_compiled_loop_runs_small_and_says_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "compiled.json"
    assert compiled.main([*TINY, "--compiler", "eager", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert results["system"] == f"torch.compile {torch.__version__}"
    assert "schedules nothing" in results["handicap"]
    assert len(results["decode"]) == 2
    assert results["settings"]["compiler"] == "eager"


def test_continuous_batching_gives_the_tokens_of_generate(known_memory: None) -> None:
    with continuous_batching(LOAD) as peer:
        for batch in (2, 1):
            prompts = random_prompts(batch, 12, 256)
            assert peer.generate(prompts, 10) == greedy_tokens(LOAD, prompts, 10)


def test_continuous_batching_runs_small_and_is_labelled_as_handicapped(known_memory: None, tmp_path: Path) -> None:
    path = tmp_path / "transformers.json"
    assert transformers_batching.main([*TINY, "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert results["system"].startswith("transformers 5.")
    assert "needs flash-attention" in results["handicap"]
    assert len(results["decode"]) == 2


def test_a_batching_thread_that_died_is_an_error_and_not_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "get_device_and_memory_breakdown", lambda: (torch.device("cpu"), 0, 0, 0))
    with continuous_batching(LOAD) as peer, pytest.raises(RuntimeError, match="Memory footprint"):
        peer.generate(random_prompts(1, 12, 256), 4)


def test_what_vllm_is_told_leaves_room_and_can_be_changed() -> None:
    settings = vllm_bench.engine_settings(LOAD, {"async_scheduling": False})
    assert settings["max_model_len"] == 12 + 10 + 736
    assert settings["enable_prefix_caching"] is False
    assert settings["async_scheduling"] is False
    longer = Load(SHAPES["qwen3-0.6b"], (512,), (8000,))
    assert vllm_bench.engine_settings(longer, {})["max_num_seqs"] == 512


def test_the_scripts_around_vllm_are_scripts(tmp_path: Path) -> None:
    folder = ROOT / "bench" / "peers" / "vllm"
    for name in ("pack.sh", "setup.sh"):
        subprocess.run(["bash", "-n", str(folder / name)], check=True)
        assert os.access(folder / name, os.X_OK)
    done = subprocess.run(["bash", str(folder / "setup.sh")], capture_output=True, text=True)
    assert done.returncode != 0
    assert "usage: setup.sh A B [SITE]" in done.stderr


def test_both_parts_of_a_packed_peer_are_put_away_whichever_comes_first(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "bench" / "peers" / "vllm").mkdir(parents=True)
    (checkout / "bench" / "gpu_round.sh").write_text((ROOT / "bench" / "gpu_round.sh").read_text())
    (checkout / "bench" / "peers" / "vllm" / "setup.sh").write_text('cat "$1/part" "$2/part" >"$3"\n')
    environment = os.environ | {
        "OUT": str(tmp_path / "out"),
        "PEER_PARTS": str(tmp_path / "parts"),
        "PEER_SITE": str(tmp_path / "site"),
    }
    for name in ("b", "a"):
        (checkout / ".peer" / name).mkdir(parents=True)
        (checkout / ".peer" / name / "part").write_text(name)
        command = ["bash", str(checkout / "bench" / "gpu_round.sh"), "peer-unpack"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("bring the other part" in done.stdout) == (name == "b")
    assert (tmp_path / "site").read_text() == "ab"


def test_a_start_is_measured_cold_and_warm_in_processes_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "startup.json"
    assert bench.startup.main([*TINY, "--compile", "off", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert [(row["compile"], row["cache"]) for row in results["startup"]] == [("off", "cold"), ("off", "warm")]
    for row in results["startup"]:
        assert 0 < row["imported_s"] < row["ready_s"] < row["first_token_s"] < 60
        assert row["graphs"] == 8
    cold, warm = results["startup"]
    assert results["saved_s"]["off"] == pytest.approx(cold["ready_s"] - warm["ready_s"])
    assert cold["steps"] == []
    assert [step["batch"] for step in warm["steps"]] == [1, 2]
    assert all(len(step["samples"]["long_run_s"]) == 1 for step in warm["steps"])


def test_a_cold_start_finds_empty_caches_and_a_warm_one_those_it_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[str, list[str], list[str]]] = []

    def process(command: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        caches = [Path(env[name]) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")]
        files = [file.name for folder in caches if folder.exists() for file in folder.iterdir()]
        for folder in caches:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{folder.name} entry").touch()
        found.append((str(caches[0]), files, command[command.index("--inside") :]))
        return subprocess.CompletedProcess(command, 0, "a line\n" + json.dumps({"ready_s": 1.0, "steps": []}) + "\n")

    monkeypatch.setattr(bench.startup.subprocess, "run", process)
    rows = bench.startup.starts(bench.startup.Start("tiny", "layer", batches=(1,)), 2, 2, 10)
    assert [row["cache"] for row in rows] == ["cold", "cold", "warm", "warm"]
    full = ["inductor entry", "triton entry", "cuda entry"]
    assert [files for _, files, _ in found] == [[], [], full, full]
    assert len({folder for folder, _, _ in found}) == 2
    assert ["--no-steps" in words for _, _, words in found] == [True, True, True, False]


def test_a_start_that_fails_is_recorded_and_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.startup.Start, "words", lambda self: ["--shape", "none"])
    path = tmp_path / "startup.json"
    assert bench.startup.main([*TINY, "--compile", "off,layer", "--json", str(path)]) == 1
    errors = json.loads(path.read_text())["errors"]
    assert [error["part"] for error in errors] == ["compile=off", "compile=layer"]
    assert "ended with code 2" in errors[0]["error"]


@pytest.mark.parametrize(
    ("words", "message"), [(["--compile", "all"], "'all' is none of"), (["--cold", "0"], "at least 1")]
)
def test_a_start_that_makes_no_sense_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.startup.main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_words_of_a_start_are_understood_by_its_process() -> None:
    start = bench.startup.Start("tiny", "model", "cpu", (1, 2), (4, 10), 2, False)
    given: argparse.Namespace = bench.startup._parse(start.words())
    assert given.inside
    assert (given.compile, given.batch, given.tokens, given.repeats) == (("model",), (1, 2), (4, 10), 2)
    assert (given.device, given.verify) == ("cpu", False)
    assert bench.startup._parse(bench.startup.Start("tiny", "off").words()).batch == ()
