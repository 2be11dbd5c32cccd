"""bench.tables: the README's figures and plots are made from results files, and what is stale is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.committed import Committed, shown
from bench.plots import PLOTS, Bars, Figure, draw, fingerprint_in
from bench.sections import SECTIONS, figures
from bench.startup_section import startup_figures
from bench.tables import Page, filled, main

ROOT = Path(__file__).parents[2]
Results = dict[str, Any]

FACTS: Results = {
    "commit": "0123456789abcdef+",
    "date": "2026-11-20T10:00:00+00:00",
    "device": "NVIDIA H200",
    "versions": {"torch": "2.11.0"},
    "round": "peer 1",
    "shape": "qwen3-0.6b",
    "system": "graphexec",
    "handicap": None,
    "skipped": [],
    "errors": [],
}


def decode_row(batch: int, depth: int, step_ms: float, prompt: int = 128) -> Results:
    return {"batch": batch, "depth": depth, "prompt_tokens": prompt, "decode_step_ms": step_ms} | (
        {"bare_replay_ms": 1.5, "overhead": step_ms / 1.5, "host_us": 211.7, "bubble_us": {"p50": 1.04, "p99": 3.5},
         "busy": 0.987, "hand_written_ms": 1.71} if depth == 1 else {}
    )  # fmt: skip


def variant(pool_mib: float) -> Results:
    buckets = [(256, pool_mib), (64, 0.0), (48, 0.0), (1, 0.0)]
    by_bucket = [{"bucket": bucket, "nodes": 368, "pool_mib": pool, "capture_s": 0.01} for bucket, pool in buckets]
    return {"graphs": 4, "by_bucket": by_bucket}


CAPTURE: Results = {"wall_s": 9.0, "capture_s": 1.25, "pool_mib": 300.0, "device_mib": 512.0} | {
    "variants": {"greedy": variant(200.0), "sampled": variant(100.0)}
}
DECODE: Results = FACTS | {
    "decode": [decode_row(1, 1, 1.6), decode_row(64, 1, 2.4), decode_row(1, 0, 1.9)],
    "eager": [{"batch": 1, "prompt_tokens": 128, "decode_step_ms": 9.25}],
    "capture": {"again": CAPTURE},
    "plan": {"batches": [1, 64], "prompts": [128], "depths": [1, 0]},
}
PEER: Results = FACTS | {
    "system": "vllm 0.26.0",
    "handicap": "Wears boots.",
    "startup_s": 61.4,
    "decode": [{"batch": batch, "prompt_tokens": 128, "decode_step_ms": 1.64} for batch in (1, 8)],
}
STARTUP: Results = FACTS | {
    "startup": [
        {"compile": "layer", "cache": cache, "ready_s": ready, "first_token_s": ready + 1, "compile_s": None}
        | {"imported_s": 1.0, "warmup_s": 4.0, "capture_s": 1.5, "steps": steps}
        for cache, ready, steps in (
            ("cold", 60.0, []),
            ("cold", 70.0, []),
            ("warm", 30.0, [{"batch": 64, "decode_step_ms": 2.41}]),
        )
    ]
}
MIXED: Results = FACTS | {
    "prompts": [
        {"sampling": sampling, "prompt_tokens": length, "wall_ms": wall}
        for sampling, walls in (("greedy", (1.4, 3.5)), ("sampled", (1.5, 3.6)))
        for length, wall in zip((16, 1000), walls, strict=True)
    ],
    "steps": [
        {"load": "a chunk of 256", "kernels": 262, "replay_ms": 1.52, "busy_ms": 1.41, "eager_unpadded_busy_ms": 1.42}
    ],
    "gaps": {
        "decodes": 64,
        "in front of a decode step, us": {"p50": 1.92},
        "in front of a mixed step, us": {"p50": 10.5},
        "applying a delta, us": {"of the kernel": 6.5},
    },
}
FILES: dict[str, Results] = {
    "mixed-qwen3-0.6b": MIXED,
    "decode-qwen3-0.6b": DECODE,
    "context-qwen3-0.6b": FACTS
    | {"decode": [decode_row(1, 1, 1.9, 8000)], "eager": [], "skipped": ["batch 256, prompts of 8000: too large"]}
    | {"plan": {"batches": [1, 64, 256], "prompts": [8000], "depths": [1]}},
    "startup-qwen3-0.6b": STARTUP,
    "peer-qwen3-0.6b-vllm": PEER,
    "peer-qwen3-0.6b-graphexec": FACTS | {"decode": [decode_row(1, 1, 1.6)], "eager": []},
}
ATTENTION: Results = FACTS | {
    "bandwidth": 4.27e12,
    "decode": [
        {"batch": 64, "context": 300, "num_heads": 16, "num_kv_heads": 8, "head_dim": 128, "num_splits": splits}
        | {"chosen": splits == 1, "microseconds": 25.0 * splits, "over_bytes": 1.36 * splits}
        for splits in (1, 2)
    ],
    "prefill": [
        {"sequences": 4, "chunk": 512, "H": 16, "kernel": kernel, "microseconds": time, "chosen": kernel != "torch"}
        for kernel, time in (("torch", 20.0), ("paged_prefill", 30.0))
    ],
}
README = "# A title\n\n" + "".join(f"<!-- bench:{name} -->\nold\n<!-- /bench -->\n\nbetween\n\n" for name in SECTIONS)


@pytest.fixture
def page(tmp_path: Path) -> Page:
    """A repository with results, and a README that does not show them."""
    results = tmp_path / "bench" / "results" / "h200"
    results.mkdir(parents=True)
    for name, content in FILES.items():
        (results / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "README.md").write_text(README)
    return Page(tmp_path)


def section(name: str, files: dict[str, Results] = FILES) -> str:
    return filled(f"<!-- bench:{name} -->\n<!-- /bench -->", Committed(files))


def test_the_readme_of_this_repository_is_up_to_date() -> None:
    command = [sys.executable, "-m", "bench.tables", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_results_every_section_says_so_in_a_sentence() -> None:
    text = filled(README, Committed({}))
    assert text.count("No figures are committed yet; `bench/gpu_round.sh ") == len(SECTIONS)
    assert "\nold\n" not in text
    assert text.count("\nbetween\n") == len(SECTIONS)


def test_what_is_made_is_up_to_date_and_making_it_again_changes_nothing(page: Page) -> None:
    page.write()
    assert page.out_of_date() == []
    before = {path: path.read_bytes() for path in (page.readme, *page.plots.iterdir())}
    page.write()
    assert {path: path.read_bytes() for path in before} == before
    drawn = {f"{kind}-qwen3-0.6b.png" for kind in ("decode", "mixed", "peer", "startup")}
    assert {path.name for path in page.plots.iterdir()} == drawn
    for name in drawn:
        assert f"]({PLOTS}/{name})" in page.readme.read_text()


def test_a_second_page_shows_sections_with_paths_of_its_own(page: Page) -> None:
    further = page.root / "bench" / "RESULTS.md"
    further.write_text("# More\n\n<!-- bench:decode -->\nold\n<!-- /bench -->\n")
    assert "bench/RESULTS.md" in page.out_of_date()
    page.write()
    assert page.out_of_date() == []
    assert "](results/plots/decode-qwen3-0.6b.png)" in further.read_text()
    assert "](bench/results/plots/decode-qwen3-0.6b.png)" in page.readme.read_text()


def test_a_check_names_what_is_stale_and_changes_nothing(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"], page.root) == 1
    wrong = capsys.readouterr().err
    assert "Out of date: README.md." in wrong
    assert f"Out of date: {PLOTS}/decode-qwen3-0.6b.png." in wrong
    assert page.readme.read_text() == README
    assert not page.plots.exists()
    assert main([], page.root) == 0
    assert main(["--check"], page.root) == 0


def test_other_results_make_text_and_plot_stale(page: Page) -> None:
    page.write()
    path = page.root / "bench" / "results" / "h200" / "decode-qwen3-0.6b.json"
    path.write_text(path.read_text().replace('"decode_step_ms": 2.4,', '"decode_step_ms": 2.6,'))
    assert page.out_of_date() == ["README.md", f"{PLOTS}/decode-qwen3-0.6b.png"]


def test_results_that_a_plot_does_not_show_leave_it_alone(page: Page) -> None:
    page.write()
    path = page.root / "bench" / "results" / "h200" / "decode-qwen3-0.6b.json"
    path.write_text(path.read_text().replace('"host_us": 211.7', '"host_us": 300.0'))
    assert page.out_of_date() == ["README.md"]


def test_a_text_changed_by_hand_is_stale(page: Page) -> None:
    page.write()
    page.readme.write_text(page.readme.read_text().replace("| 1.90 | 1.60 |", "| 1.90 | 1.50 |"))
    assert page.out_of_date() == ["README.md"]


def test_a_plot_that_nothing_shows_is_stale_and_is_removed(page: Page) -> None:
    page.write()
    stray = page.plots / "older.png"
    stray.write_bytes(b"x")
    assert page.out_of_date() == [f"{PLOTS}/older.png, which nothing shows"]
    page.write()
    assert not stray.exists()


def test_the_decode_table_has_the_depths_side_by_side() -> None:
    lines = section("decode").splitlines()
    assert lines[1].startswith("**qwen3-0.6b**: prompts of 128 tokens (NVIDIA H200, torch 2.11.0, commit 0123456789+,")
    assert lines[3].startswith("| batch | step ms, depth 0 | step ms, depth 1 | bare replay ms | overhead | host µs |")
    assert lines[5] == "| 1 | 1.90 | 1.60 | 1.50 | 1.07 | 212 | 1.04 / 3.50 | 0.987 | 1.71 | 9.25 |"
    assert lines[6] == "| 64 | - | 2.40 | 1.50 | 1.60 | 212 | 1.04 / 3.50 | 0.987 | 1.71 | - |"


@pytest.mark.parametrize(
    ("name", "kind", "with_it"),
    [
        (
            "decode-qwen3-0.6b",
            "decode",
            "| 1 | 1.90 | 1.60 | 1.50 | 1.07 | 1.02 | 212 | 1.04 / 3.50 | 0.987 | 1.71 | 9.25 |",
        ),
        ("context-qwen3-0.6b", "context", "| 8,000 | 1 | 1 | 1.90 | 1.50 | 1.27 | 1.02 | 0.987 | 1.71 |"),
    ],
)
def test_the_overhead_of_the_decode_alone_has_a_column_exactly_if_a_row_has_it(
    name: str, kind: str, with_it: str
) -> None:
    assert "decode alone" not in section(kind)
    first, *others = FILES[name]["decode"]
    measured = FILES[name] | {"decode": [first | {"decode_phase_overhead": 1.02}, *others]}
    lines = section(kind, FILES | {name: measured}).splitlines()
    assert "| bare replay ms | overhead | overhead, decode alone | " in lines[3]
    assert lines[5] == with_it
    if kind == "decode":
        assert lines[6] == "| 64 | - | 2.40 | 1.50 | 1.60 | - | 212 | 1.04 / 3.50 | 0.987 | 1.71 | - |"


def test_peers_are_shown_with_their_quotient_and_their_handicap() -> None:
    text = section("peers")
    assert "| prompt | batch | graphexec | vllm 0.26.0 |" in text
    assert "| 128 | 1 | 1.60 | 1.64 (1.02) |" in text
    assert "| 128 | 8 | - | 1.64 |" in text
    assert "- vllm 0.26.0: Wears boots." in text
    assert "Not all of these" not in text
    other_day = FILES | {"peer-qwen3-0.6b-vllm": PEER | {"round": "peer 2"}}
    assert "Not all of these were measured in one run" in section("peers", other_day)


def test_starts_are_medians_and_stand_beside_those_of_peers() -> None:
    text = section("startup")
    assert "| layer | cold | 65.0 | 66.0 | - | 1.50 | - |" in text
    assert "| layer | warm | 30.0 | 31.0 | - | 1.50 | 2.41 |" in text
    assert "- vllm 0.26.0, for prompts of 128 tokens: 61.4 s until it took requests" in text


def test_the_seconds_of_a_start_are_shown_in_the_parts_that_are_known() -> None:
    (bars,) = (figure for figure in figures(Committed(FILES)) if figure.name == "startup-qwen3-0.6b.png")
    assert isinstance(bars, Bars)
    parts = {"importing": 1.0, "loading, sizing, verifying": 23.5, "first runs, compiling": 4.0, "capturing": 1.5}
    assert bars.bars["layer, warm"] == parts | {"first request": 1.0}
    staged = {"load": 3.0, "size the KV cache": 10.0, "warm up": 12.0}
    rows = [row | {"stages_s": staged} for row in STARTUP["startup"]]
    (bars,) = startup_figures(Committed({"startup-qwen3-0.6b": STARTUP | {"startup": rows}}))
    assert bars.bars["layer, warm"] == {
        "importing": 1.0, "loading": 3.0, "sizing the KV cache": 10.0, "first runs, compiling": 4.0, "capturing": 1.5,
        "verifying": 6.5, "first request": 1.0,
    }  # fmt: skip


def test_steps_with_prompt_chunks_are_shown_with_the_gaps_in_front_of_them() -> None:
    text = section("mixed")
    assert "| greedy | 1.40 | 3.50 |" in text
    assert "| a chunk of 256 | 262 | 1.52 | 1.41 | 1.42 |" in text
    assert (
        "in front of a mixed step, at depth 1: 10.5 µs (p50), in which a delta is applied: of the kernel 6.50." in text
    )


def test_graph_memory_is_shown_by_bucket() -> None:
    lines = section("capture").splitlines()
    assert "| again | 8 | 1.25 | 9.00 | 300 | 512 |" in lines
    assert "| 256 | 200 | 100 | 368 |" in lines
    assert "| 64 | 0 | 0 | 368 |" in lines
    assert not any(line.startswith("| 48 |") for line in lines), "costs nothing, and is no size that is measured"


def test_long_contexts_name_what_was_left_out() -> None:
    text = section("context")
    assert "| 8,000 | 1 | 1 | 1.90 | 1.50 | 1.27 | 0.987 | 1.71 |" in text
    assert "Left out: batch 256, prompts of 8000: too large." in text
    assert text.count("The round ended") == 1
    assert "- The round ended before: batch 64, prompts of 8000, depth 1." in text


def test_steps_name_the_depths_that_a_round_did_not_reach() -> None:
    plan = DECODE["plan"] | {"depths": [1, 0, 2]}
    skipped = [
        "windows of batch 1, prompts of 128, depth 0",
        *(f"batch {each}, prompts of 128, depth 2" for each in (1, 64)),
    ]
    text = section("decode", {"decode-qwen3-0.6b": DECODE | {"plan": plan, "skipped": skipped}})
    missing = ("batch 64, prompts of 128, depth 0", *skipped[1:])
    assert f"- The round ended before: {'; '.join(missing)}." in text
    assert "windows" not in text


@pytest.mark.parametrize(
    "text",
    [
        "no section",
        "<!-- bench:speed -->\n<!-- /bench -->",
        "<!-- bench:decode -->\n",
        "<!-- bench:decode -->\n<!-- bench:peers -->\n<!-- /bench -->",
        "<!-- bench:decode -->\n<!-- /bench -->\n<!-- /bench -->",
    ],
)
def test_markers_that_do_not_match_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="benchmark section"):
        filled(text, Committed({}))


def test_a_plot_carries_what_it_shows(tmp_path: Path) -> None:
    figure = Figure("a.png", "Title", {"depth 1": ((1.0, 1.6), (64.0, 2.4)), "bare replay": ()})
    draw(figure, tmp_path)
    assert fingerprint_in(tmp_path / "a.png") == figure.fingerprint
    assert figure.fingerprint != Figure("a.png", "Title", {"depth 1": ((1.0, 1.7), (64.0, 2.4))}).fingerprint


def test_no_other_file_passes_for_a_plot(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    assert fingerprint_in(path) is None
    path.write_bytes(b"no image")
    assert fingerprint_in(path) is None
    figure = Figure("a.png", "Title", {"depth 1": ((1.0, 1.6),)})
    draw(figure, tmp_path)
    path.write_bytes(path.read_bytes().replace(figure.fingerprint.encode(), b"0" * 64))  # checksum no longer fits
    assert fingerprint_in(path) is None
    path.write_bytes(path.read_bytes()[:40])
    assert fingerprint_in(path) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.6044, "1.60"),
        (0.0123, "0.012"),
        (0.987, "0.987"),
        (0.9996, "1.000"),
        (12.34, "12.3"),
        (1234.5, "1,234"),
        (8000, "8,000"),
        (0.0, "0"),
        (None, "-"),
    ],
)
def test_figures_are_shown_with_few_digits(value: float | None, text: str) -> None:
    assert shown(value) == text


def test_attention_is_shown_as_it_is_chosen_beside_torchs_own() -> None:
    text = section("attention", {"attention": ATTENTION})
    assert "| 16 / 8 / 128 | 64 | 300 | 1 | 25.0 | 1.36 |" in text
    assert "50.0" not in text
    assert "| 4 | 512 | 16 | 30.0 | 20.0 | 1.50 |" in text
