"""Manifests: groups for a reader, the way to a file and back, and what a comparison calls worse."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graphexec.capture.manifest import CapturedGraph, Manifest
from graphexec.capture.regressions import changed_kernels, regressions
from graphexec.errors import ConfigError
from graphexec.plan import GraphKey, Phase


def graph(phase: Phase, rows: int, bucket: int, nodes: int = 300, variant: str = "greedy") -> CapturedGraph:
    return CapturedGraph(
        GraphKey(phase, rows, bucket, variant), nodes, nodes - 2, pool_bytes=2**20, warmup_s=0.02, capture_s=0.01,
        fingerprint=f"{phase}{rows}", verified=rows == 1,
    )  # fmt: skip


def manifest(*graphs: CapturedGraph) -> Manifest:
    return Manifest.of(torch.device("cpu"), graphs, {GraphKey("decode", 9, 9, "greedy"): "out of memory"})


LADDER = manifest(
    *(graph("mixed", rows, slots) for rows in (64, 32) for slots in (32, 8)),
    graph("mixed", 16, 16),
    *(graph("decode", size, size, 300 if size > 2 else 200) for size in (8, 4, 2, 1)),
    graph("decode", 1, 1, variant="sampled"),
)


def test_graphs_that_differ_in_little_but_their_size_make_one_group() -> None:
    groups = [(each.first.key, each.last.key, len(each.graphs)) for each in LADDER.groups()]
    assert groups == [
        (GraphKey("decode", 1, 1, "sampled"), GraphKey("decode", 1, 1, "sampled"), 1),
        (GraphKey("decode", 1, 1, "greedy"), GraphKey("decode", 2, 2, "greedy"), 2),
        (GraphKey("decode", 4, 4, "greedy"), GraphKey("decode", 8, 8, "greedy"), 2),
        (GraphKey("mixed", 16, 16, "greedy"), GraphKey("mixed", 32, 32, "greedy"), 2),
        (GraphKey("mixed", 32, 8, "greedy"), GraphKey("mixed", 64, 8, "greedy"), 2),
        (GraphKey("mixed", 64, 32, "greedy"), GraphKey("mixed", 64, 32, "greedy"), 1),
    ]


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    LADDER.write(tmp_path / "manifest.json")
    assert Manifest.read(tmp_path / "manifest.json") == LADDER


def test_a_manifest_from_before_graphs_had_pieces_kernel_names_and_replay_times_is_read(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    content = json.loads(LADDER.to_json())
    for each in content["graphs"]:
        for name in ("pieces", "launches", "replay_us", "launch_us"):
            del each[name]
    path.write_text(json.dumps(content))
    assert Manifest.read(path) == LADDER
    measured = replace(LADDER, graphs=tuple(replace(each, replay_us=9.0, launches={"a": 1}) for each in LADDER.graphs))
    assert regressions(LADDER, measured, 0.0) == changed_kernels(LADDER, measured) == []


@pytest.mark.parametrize(("content", "message"), [("{", "no manifest"), ("{}", "no manifest"), (None, "Cannot read")])
def test_what_is_no_manifest_is_refused_by_name(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=f"{message}.*other.json|other.json.*{message}"):
        Manifest.read(path)


def test_a_manifest_of_another_device_version_or_setting_is_a_mismatch() -> None:
    settings = {"max_num_seqs": 8, "backend.capture_sizes": (1, 8)}
    made = replace(LADDER, settings={"max_num_seqs": 8, "backend.capture_sizes": [1, 8]})
    made.check(torch.device("cpu"), settings)
    for changed, message in (
        (replace(made, device="NVIDIA H200"), "manifest mismatch: device is 'cpu' here and 'NVIDIA H200' there"),
        (replace(made, versions=made.versions | {"torch": "1.0"}), "torch is .* here and '1.0' there"),
        (replace(made, settings={"max_num_seqs": 4}), "max_num_seqs is 8 here and 4 there; backend.capture_sizes is"),
    ):
        with pytest.raises(ConfigError, match=message):
            changed.check(torch.device("cpu"), settings)


def test_nothing_is_worse_than_itself_or_with_more_graphs() -> None:
    more = replace(LADDER, graphs=(*LADDER.graphs, graph("decode", 16, 16)))
    assert regressions(LADDER, LADDER, 0.0) == regressions(LADDER, more, 0.0) == []


def test_graphs_that_vanished_or_gained_nodes_are_named() -> None:
    fewer = replace(LADDER, graphs=LADDER.graphs[1:])
    assert regressions(LADDER, fewer, 0.2) == [
        "There is no graph for the mixed step, bucket 32, 64 rows, greedy any more."
    ]
    assert regressions(LADDER, replace(LADDER, graphs=LADDER.graphs[5:]), 0.2) == [
        "There are no graphs for 5 mixed steps, greedy, any more; "
        "the first is the mixed step, bucket 32, 64 rows, greedy."
    ]
    grown = replace(LADDER, graphs=tuple(replace(each, nodes=each.nodes + 28) for each in LADDER.graphs))
    found = regressions(LADDER, grown, 0.2)
    assert any(
        each.startswith("5 graphs of mixed steps, greedy, grew from 300 to 328 nodes; the first") for each in found
    )
    shrunk = replace(LADDER, graphs=tuple(replace(each, nodes=each.nodes - 28) for each in LADDER.graphs))
    assert regressions(LADDER, shrunk, 0.2) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool_bytes": 9 * 2**20}, "memory.*from 10.00 to 90.00 MiB"),
        ({"capture_s": 0.05}, "time to capture.*from 0.10 to 0.50 s"),
    ],
)
def test_time_and_memory_may_grow_by_the_tolerance(changes: dict[str, float], message: str) -> None:
    dear = replace(LADDER, graphs=tuple(replace(each, **changes) for each in LADDER.graphs))
    (sentence,) = regressions(LADDER, dear, 0.2)
    assert re.search(message, sentence)
    assert regressions(LADDER, dear, 10.0) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pool_bytes": 18 * 2**20},
            "memory of the decode step, bucket 1, 1 rows, sampled grew from 1.00 to 18.00 MiB",
        ),
        (
            {"capture_s": 0.6},
            "to capture of the decode step, bucket 1, 1 rows, sampled grew from 0.01 to 0.60 s",
        ),
        (
            {"replay_us": 160.0},
            "of a replay of the decode step, bucket 1, 1 rows, sampled grew from 100.00 to 160.00 us",
        ),
    ],
)
def test_a_single_graph_that_grew_beyond_any_noise_is_named(changes: dict[str, float], message: str) -> None:
    old = replace(LADDER, device="H200", graphs=tuple(replace(each, replay_us=100.0) for each in LADDER.graphs))
    last = replace(old.graphs[-1], **changes)
    found = regressions(old, replace(old, graphs=(*old.graphs[:-1], last)), 0.0)
    assert any(message in sentence for sentence in found)
    assert regressions(old, replace(old, graphs=(*old.graphs[:-1], last)), 70.0) == []


def test_of_many_graphs_that_grew_the_worst_are_named_and_the_others_counted() -> None:
    grown = [replace(each, pool_bytes=(30 + index) << 20) for index, each in enumerate(LADDER.graphs)]
    found = regressions(LADDER, replace(LADDER, graphs=tuple(grown)), 0.2)
    assert len(found) == 1 + 4 + 1
    assert "from 1.00 to 39.00 MiB" in found[1]
    assert found[-1] == "So did that of 6 other graphs, by less."


def test_replays_that_all_take_longer_are_worse() -> None:
    old, new = (
        replace(LADDER, device="H200", graphs=tuple(replace(each, replay_us=us) for each in LADDER.graphs))
        for us in (100.0, 150.0)
    )
    assert regressions(old, new, 0.2) == [
        "The time of a replay of the 10 graphs in both grew from 1000.00 to 1500.00 us."
    ]
    assert regressions(old, new, 0.4) == [], "20 us of each graph are nobody's doing"
    assert regressions(replace(old, device="cpu"), replace(new, device="cpu"), 0.2) == []


def with_launches(launches: dict[str, int], fingerprint: str, **changes: int) -> Manifest:
    graphs = [replace(each, launches=launches, fingerprint=fingerprint, **changes) for each in LADDER.graphs[-5:-1]]
    return replace(LADDER, graphs=tuple(graphs))


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (with_launches({"matmul": 2, "norm": 1}, "b"), "norm came, matmul went"),
        (with_launches({"matmul": 5}, "b"), "matmul (2 times) came"),
        (with_launches(dict.fromkeys("abcdef", 1) | {"matmul": 3}, "b"), "a, b, c, d and 2 others came"),
        (with_launches({"matmul": 3}, "b"), "names and counts of the kernels are the same, and grids or edges differ"),
        (with_launches({"matmul": 3}, "b", nodes=9), "0 nodes became 9, and the kernels are the same"),
        (with_launches({"matmul": 3}, "b", pieces=2), "1 pieces became 2"),
        (with_launches({}, "b"), "the fingerprint changed"),
    ],
)
def test_kernels_that_came_or_went_are_named_once_for_all_graphs_of_a_kind(new: Manifest, words: str) -> None:
    old = with_launches({"matmul": 3}, "a", nodes=0)
    new = new if "nodes" in words else replace(new, graphs=tuple(replace(each, nodes=0) for each in new.graphs))
    assert changed_kernels(old, new) == [
        f"In 4 graphs of decode steps, greedy, {words}; the first is the decode step, bucket 8, 8 rows, greedy."
    ]
    assert changed_kernels(new, new) == []
