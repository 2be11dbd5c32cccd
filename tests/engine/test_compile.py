"""torch.compile takes the decoder without a graph break, and compiles it exactly twice: for one row and for several."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton
from torch._dynamo.testing import CompileCounter

from graphexec import BackendConfig, Engine, EngineConfig, SamplingParams
from graphexec.engine import assemble
from graphexec.kernels.lang import settle_cache_folder
from tests.support.checkpoints import make_checkpoint


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["model", "layer"])
def test_a_decoder_is_compiled_twice_whatever_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    counter = CompileCounter()
    compile_decoder = assemble.compile_decoder
    monkeypatch.setattr(assemble, "compile_decoder", lambda decoder, mode: compile_decoder(decoder, mode, counter))
    folder = make_checkpoint(tmp_path / "model", num_hidden_layers=3)

    def tokens(compile: str) -> list[list[int]]:
        config = EngineConfig(
            model=str(folder), device="cpu", dtype="float64", max_num_seqs=6, max_model_len=64, compile=compile,
            max_num_batched_tokens=16, backend=BackendConfig(verify=False),
        )  # fmt: skip
        with Engine(config) as engine:
            outputs = engine.generate(
                [[5] * length for length in (1, 2, 3, 9, 30, 17)], SamplingParams(max_tokens=6, temperature=0)
            )
        return [output.token_ids for output in outputs]

    assert tokens(mode) == tokens("off")
    assert counter.frame_count == 2


START = """
from torch._dynamo.utils import compilation_time_metrics, counters
from graphexec import Engine, EngineConfig
with Engine(EngineConfig(model="tiny-random", device="cpu", compile="layer", max_num_seqs=2, max_model_len=32)):
    tracings = len(compilation_time_metrics["bytecode_tracing"])
    print(counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"], tracings)
"""


def test_a_second_start_finds_its_two_compilations_in_torchs_cache(tmp_path: Path) -> None:
    """And neither traces a compilation twice, as torch does where it has to give up a dynamic float."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    starts = [
        subprocess.run(
            [sys.executable, "-c", START], capture_output=True, text=True, check=True, env=environment, timeout=300
        ).stdout.split()
        for _ in range(2)
    ]
    assert starts == [["2", "0", "2"], ["0", "2", "2"]]


def test_triton_keeps_one_cache_folder_whatever_torch_sets_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    before = triton.knobs.cache.dir
    settle_cache_folder()
    assert os.environ["TRITON_CACHE_DIR"] == before == triton.knobs.cache.dir
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    settle_cache_folder()
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"
