"""The warm-up's tool on a device, where graphs take memory and replays are faster than the steps."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from graphexec import BackendConfig, EngineConfig
from graphexec.capture.budget import Budget
from graphexec.capture.manifest import Manifest
from graphexec.warmup.tool import Wishes, warm_up
from tests.support.checkpoints import make_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SETTINGS = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "initializer_range": 0.1,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return EngineConfig(
        model=str(make_checkpoint(tmp_path_factory.mktemp("model") / "model", **SETTINGS)),
        device="cuda", dtype="bfloat16", compile="off", max_num_seqs=64, max_model_len=256, num_kv_blocks=1100,
        max_num_batched_tokens=512, backend=BackendConfig(verify=False),
    )  # fmt: skip


@pytest.fixture(scope="module")
def everything(config: EngineConfig, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return run(config, Wishes(tmp_path_factory.mktemp("everything") / "report.json"))[0]


def run(config: EngineConfig, wishes: Wishes) -> tuple[Manifest, str]:
    """The report, and what was said."""
    notes = io.StringIO()
    assert warm_up(config, wishes, Console(file=io.StringIO()), Console(file=notes, width=200))
    return Manifest.read(wishes.report), notes.getvalue()


def test_a_budget_in_mib_is_kept_or_its_overrun_is_said(
    config: EngineConfig, everything: Manifest, tmp_path: Path
) -> None:
    mib = 0.4 * everything.pool_bytes / 2**20
    chosen, said = run(config, Wishes(tmp_path / "report.json", budget=Budget(mib=mib)))
    assert 0 < len(chosen.graphs) < len(everything.graphs)
    assert chosen.pool_bytes / 2**20 <= mib or "more than the budget" in said
    assert chosen.pool_bytes < 0.9 * everything.pool_bytes
    assert max(graph.key.bucket for graph in chosen.graphs if not graph.key.has_chunks) == 64


def test_a_budget_in_seconds_captures_fewer_graphs(config: EngineConfig, everything: Manifest, tmp_path: Path) -> None:
    chosen, _ = run(config, Wishes(tmp_path / "report.json", budget=Budget(seconds=everything.capture_s / 2)))
    assert 0 < len(chosen.graphs) < len(everything.graphs)


def test_pieces_take_longer_to_launch_than_one_graph(config: EngineConfig, tmp_path: Path) -> None:
    whole, _ = run(config, Wishes(tmp_path / "report.json", modes=("full", "piecewise")))
    pieces = {graph.key: graph for graph in Manifest.read(tmp_path / "report-piecewise.json").graphs}
    longer = [pieces[graph.key].launch_us > graph.launch_us for graph in whole.graphs]
    assert sum(longer) > 0.8 * len(longer)
