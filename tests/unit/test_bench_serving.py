"""bench.serving: arrivals, what is counted of them, and a small run on the CPU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import bench.serving
from bench.committed import Committed
from bench.headlines import decode_headline, serving, serving_figures
from bench.serving import OUTPUTS, PROMPTS, Arrival, draw_arrivals, serve
from bench.shapes import SHAPES
from graphexec.capture.traffic import Traffic

SHAPE = SHAPES["qwen3-0.6b"]


class EveryStepAToken:
    """Gives every request a token in each step, and one of them `extra` tokens more."""

    name = "fake"

    def __init__(self, extra: int = 0) -> None:
        self.settings: dict[str, object] = {}
        self.left: dict[int, int] = {}
        self.extra = extra

    def add(self, request: int, prompt: list[int], tokens: int) -> None:
        self.left[request] = tokens

    def step(self) -> list[tuple[int, int]]:
        news = [(request, 1 + (self.extra if left == 1 else 0)) for request, left in self.left.items()]
        self.left = {request: left - 1 for request, left in self.left.items() if left > 1}
        return news


def test_arrivals_are_the_same_for_the_same_seed_and_as_long_as_announced() -> None:
    arrivals = draw_arrivals(50.0, 2000, SHAPE, seed=3)
    assert arrivals == draw_arrivals(50.0, 2000, SHAPE, seed=3)
    assert arrivals[-1].at_s == pytest.approx(2000 / 50, rel=0.1)
    for lengths, (shortest, median, longest) in (
        ([len(each.prompt) for each in arrivals], PROMPTS),
        ([each.tokens for each in arrivals], OUTPUTS),
    ):
        assert shortest == min(lengths)
        assert longest == max(lengths)
        assert np.median(lengths) == pytest.approx(median, rel=0.1)


def test_at_an_infinite_rate_all_come_at_once_and_a_small_shape_gets_short_ones() -> None:
    arrivals = draw_arrivals(math.inf, 100, SHAPES["tiny"])
    assert {each.at_s for each in arrivals} == {0.0}
    assert max(len(each.prompt) + each.tokens for each in arrivals) <= SHAPES["tiny"].most_positions


def test_the_first_token_counts_from_the_arrival_and_the_others_from_the_one_before() -> None:
    arrivals = [Arrival(0.0, [1], 3), Arrival(0.05, [1], 2)]
    record = serve(EveryStepAToken(), arrivals)
    assert record["requests"] == 2
    assert 0.05 < float(str(record["seconds"])) < 1
    ttft, itl = record["ttft_ms"], record["itl_ms"]
    assert isinstance(ttft, dict)
    assert isinstance(itl, dict)
    assert 0 < ttft["p50"] < 40, "the second one's wait for its arrival is nobody's"
    assert 0 <= itl["p50"] <= itl["max"] < 40


def test_a_request_with_too_many_tokens_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"\[0\]"):
        serve(EveryStepAToken(extra=1), [Arrival(0.0, [1], 2)])


def test_a_small_run_on_the_cpu_gives_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path / "serving.json"
    words = ["--shape", "tiny", "--device", "cpu", "--rate", "8", "--at-once", "3", "--seconds", "0.5"]
    try:
        assert bench.serving.main([*words, "--json", str(path), "--trace-out", str(tmp_path / "trace.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    results = json.loads(path.read_text())
    assert [(run["rate"], run["requests"]) for run in results["runs"]] == [(None, 3), (8, 4)]
    assert all(0 < run["ttft_ms"]["p50"] <= run["ttft_ms"]["p99"] for run in results["runs"])
    assert "eager: {}" in capsys.readouterr().out
    assert Traffic.read(tmp_path / "trace.json").decode


def served(system: str, first_ms: float) -> dict[str, object]:
    figures = {"mean": first_ms, "p50": first_ms, "p99": 2 * first_ms}
    return {
        "system": system, "shape": "qwen3-0.6b", "device": "NVIDIA H200", "versions": {"torch": "2.11.0"},
        "commit": "0123456789abcdef", "date": "2026-11-20T10:00:00+00:00",
        "runs": [
            {"rate": None, "requests": 512, "tokens_per_s": 1e5 / first_ms},
            {"rate": 40, "requests": 320, "ttft_ms": figures, "itl_ms": figures},
        ],
    }  # fmt: skip


def test_the_table_has_ours_first_and_quotients_of_ours_over_theirs() -> None:
    committed = Committed({"serving-a": served("vllm 0.26.0", 8.0), "serving-b": served("graphexec", 4.0)})
    lines = serving(committed)
    assert "| 40 | first token, ms, p99 | 8.00 | 16.0 | 0.50 |" in lines
    assert "| all 512 at once | tokens a second | 25,000 | 12,500 | 2.00 |" in lines
    (figure,) = serving_figures(committed)
    assert figure.lines["graphexec, p50"] == ((40.0, 4.0),)
    assert decode_headline(committed) == []
