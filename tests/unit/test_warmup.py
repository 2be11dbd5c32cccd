"""The warm-up's tool: what a probe says of sizes that were not probed, and what is shown of a report."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.table import Table

from graphexec.capture.buckets import BucketTable, Ladders
from graphexec.capture.budget import Budget, Candidate, Choice, Demand, SizeLadder, choose
from graphexec.capture.frozen import FrozenCheck
from graphexec.capture.manifest import CapturedGraph, Manifest
from graphexec.capture.traffic import Traffic
from graphexec.config import BackendConfig
from graphexec.errors import ConfigError
from graphexec.plan import GraphKey, Phase
from graphexec.warmup.choice import overruns, selection
from graphexec.warmup.costs import size_ladders
from graphexec.warmup.frozen import sentences
from graphexec.warmup.plot import PANELS, draw, points
from graphexec.warmup.probe import Probe
from graphexec.warmup.report import graph_table, mode_table

MIB = 2**20


def graph(phase: Phase, rows: int, bucket: int, variant: str = "greedy", **figures: float | None) -> CapturedGraph:
    """One whose replay takes 100 us, and 1 us a row."""
    made = CapturedGraph(
        GraphKey(phase, rows, bucket, variant), 300, 298, pool_bytes=MIB, warmup_s=0.02, capture_s=0.01,
        fingerprint="f", verified=True, replay_us=100.0 + rows, launch_us=10.0,
    )  # fmt: skip
    return replace(made, **figures)


def manifest(*graphs: CapturedGraph) -> Manifest:
    return Manifest.of(torch.device("cpu"), graphs, {})


LADDERS = Ladders(BucketTable((1, 2, 4, 8)), BucketTable((16, 32, 48, 64)), BucketTable((4, 8)))
CHUNKS = [
    *(graph("mixed", 64, 8, pool_bytes=90 * MIB, capture_s=0.9), graph("mixed", 64, 4), graph("prefill", 64, 4)),
    *(graph(phase, rows, slots) for rows in (48, 16) for phase, slots in (("mixed", 8), ("mixed", 4), ("prefill", 4))),
]
DECODE = [
    graph("decode", size, size, variant, pool_bytes=size * MIB)
    for size in (8, 4, 1)
    for variant in ("greedy", "sampled")
]


def probe(*graphs: CapturedGraph) -> Probe:
    """Steps without a graph take 1000 us more."""
    eager_us = {each.key: 1000.0 + (each.replay_us or 0.0) for each in graphs}
    return Probe(LADDERS, 64, manifest(*graphs), eager_us, manifest(graph("decode", 8, 8, pool_bytes=30 * MIB)))


def test_the_first_graph_of_a_ladder_pays_for_the_pool_and_the_others_for_themselves() -> None:
    chunks, decode = size_ladders(probe(*CHUNKS, *DECODE), Traffic({1: 1}))
    assert chunks.name == "prefill_sizes"
    assert [(each.size, each.mib) for each in chunks.candidates] == [(16, 3.0), (32, 3.0), (48, 3.0), (64, 92.0)]
    assert [each.seconds for each in chunks.candidates] == pytest.approx([0.03, 0.03, 0.03, 0.92])
    assert decode.name == "capture_sizes"
    assert [(each.size, each.mib) for each in decode.candidates] == [
        *[(1, 2.0), (2, pytest.approx(4.0)), (4, 8.0), (8, 16.0)],  # two variants each; 2 lies between 1 and 4
    ]
    assert decode.pool_mib == 30.0 - 16.0, "what its largest size took where no steps with chunks had graphs"


def test_a_step_takes_the_time_of_the_graph_that_serves_it_or_that_of_its_padded_size_without_one() -> None:
    traffic = Traffic({3: 7}, {(16, 8): 2, (30, 3): 5})
    chunks, decode = size_ladders(probe(*CHUNKS, *DECODE), traffic)
    (step,) = decode.demands
    assert (step.items, step.steps, step.eager_us) == (3, 7, 1104.0)
    assert list(step.graph_us) == pytest.approx([101.0, 102.0, 104.0, 108.0])
    assert [(each.items, each.steps, each.eager_us) for each in chunks.demands] == [(16, 2, 1116.0), (30, 5, 1132.0)]
    assert list(chunks.demands[0].graph_us) == pytest.approx([116.0, 132.0, 148.0, 164.0])


def test_steps_with_more_slots_than_any_graph_run_eagerly_whatever_is_chosen() -> None:
    chunks, _ = size_ladders(probe(*CHUNKS, *DECODE), Traffic({}, {(16, 9): 1}))
    choice = choose([chunks], Budget())
    assert choice.expected_us == chunks.eager_us


def test_decode_steps_that_are_the_only_ones_with_graphs_pay_for_their_pool_themselves() -> None:
    (decode,) = size_ladders(probe(*DECODE), Traffic({1: 1}, {(16, 1): 1}))
    assert (decode.name, decode.pool_mib) == ("capture_sizes", 0.0)


def test_a_backend_that_measures_no_replays_cannot_choose() -> None:
    with pytest.raises(ConfigError, match="needs the time of replays"):
        size_ladders(probe(graph("decode", 1, 1, replay_us=None)), Traffic({1: 1}))


def ladder(name: str, sizes: tuple[int, ...]) -> SizeLadder:
    demands = (Demand(1, 2.0, 1000.0, [100.0 + size for size in sizes]),)
    return SizeLadder(name, tuple(Candidate(size, 2.0, 0.5) for size in sizes), demands)


def test_the_fragment_of_a_choice_reproduces_it() -> None:
    ladders = [ladder("prefill_sizes", (16, 32)), ladder("capture_sizes", (1, 2, 4))]
    chosen = selection(ladders, Choice(((), (1, 4)), 4.0, 1.0, 2202.0))
    read = tomllib.loads(chosen.to_toml())["backend"]
    assert read == {"prefill": "off", "capture_sizes": [1, 4]}
    assert BackendConfig(**read) == chosen.apply(BackendConfig())
    assert chosen.left_out == {"prefill_sizes": (16, 32), "capture_sizes": (2,)}
    assert [chosen.leaves_out(each.key) for each in (graph("mixed", 16, 4), graph("decode", 4, 4))] == [True, False]
    assert chosen.notes[:2] == (
        "expected: 4.0 MiB, 1.00 s of capturing; "
        "a step takes 550 us on average, 108 with every size, 1000 without graphs",
        "left out of prefill_sizes: 16, 32",
    )


def test_graphs_that_took_more_than_the_budget_are_not_passed_over() -> None:
    captured = manifest(*DECODE)
    assert overruns(captured, Budget(26.0, 1.0)) == []
    (sentence,) = overruns(captured, Budget(mib=20.0))
    assert sentence.startswith("The graphs took 26.00 MiB, 6.00 more than the budget of 20")
    (sentence,) = overruns(captured, Budget(seconds=0.05))
    assert sentence.startswith("The graphs took 0.06 s of capturing, 0.01 more than the budget of 0.05")


def shown(table: Table) -> list[list[str]]:
    """Its rows, as words."""
    columns = [list(column.cells) for column in table.columns]
    return [[str(cell) for cell in row] for row in zip(*columns, strict=True)]


def test_a_report_has_a_row_a_group_and_the_totals() -> None:
    rows = shown(graph_table(manifest(*CHUNKS[:1], *DECODE)))
    assert rows == [
        ["decode", "sampled", "1-8", "1-8", "3", "300", "298", "1", "13.0", "30.0", "101-108", "10", "3"],
        ["decode", "greedy", "1-8", "1-8", "3", "300", "298", "1", "13.0", "30.0", "101-108", "10", "3"],
        ["mixed", "greedy", "8", "64", "1", "300", "298", "1", "90.0", "900.0", "164", "10", "1"],
        ["all", "", "", "", "7", "300", "298", "1", "116.0", "960.0", "101-164", "10", "7"],
    ]


def test_what_nobody_measured_is_no_number() -> None:
    (row, total) = shown(graph_table(manifest(graph("decode", 1, 1, replay_us=None, launch_us=None))))
    assert row[-3:-1] == total[-3:-1] == ["-", "-"]


def test_modes_stand_beside_each_other_for_each_kind_of_step() -> None:
    whole = manifest(*CHUNKS[1:2], *DECODE[:1])
    pieces = replace(whole, graphs=tuple(replace(each, pieces=29, replay_us=500.0) for each in whole.graphs))
    rows = shown(mode_table({"full": whole, "piecewise": pieces, "off": manifest()}))
    assert [(row[0], row[2], row[6], row[9]) for row in rows] == [
        ("mixed", "full", "1", "164"),
        ("mixed", "piecewise", "29", "500"),
        ("decode", "full", "1", "108"),
        ("decode", "piecewise", "29", "500"),
    ]


def test_a_plot_shows_captures_and_memory_of_all_graphs_of_a_bucket_and_the_mean_of_their_replays(
    tmp_path: Path,
) -> None:
    captured = manifest(*CHUNKS[:2], *DECODE, graph("decode", 2, 2, replay_us=None))
    capture, memory, replays = (points(captured, panel) for panel in PANELS)
    assert memory == {"mixed": {64: 91.0}, "decode": {1: 2.0, 2: 1.0, 4: 8.0, 8: 16.0}}
    assert capture["decode"] == pytest.approx({1: 20.0, 2: 10.0, 4: 20.0, 8: 20.0})
    assert replays == {"mixed": {64: 164.0}, "decode": {1: 101.0, 4: 104.0, 8: 108.0}}
    pytest.importorskip("matplotlib")
    draw(captured, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    draw(manifest(), tmp_path / "nothing.png")


def test_the_frozen_number_check_is_told_with_what_it_could_not_look_at() -> None:
    key = GraphKey("decode", 8, 8, "greedy")
    leaking = FrozenCheck(key, ("node 3, scale, argument 1: bytes 0 to 3 of 4 hold 5 or 9",), 10, (), ("node 2",))
    unread = [f"node {index}, packed: its arguments are packed" for index in (4, 7)]
    assert sentences([leaking, FrozenCheck(key, (), 9, tuple(unread))]) == [
        "frozen numbers: 19 nodes of 2 graphs compared, 1 leaks",
        f"frozen: in the graph of the {key}, node 3, scale, argument 1: bytes 0 to 3 of 4 hold 5 or 9",
        "not compared: 1 stretches of arguments that differ with every capture, as padding does",
        "unchecked: 2 nodes of 1 names (packed): its arguments are packed",
    ]
