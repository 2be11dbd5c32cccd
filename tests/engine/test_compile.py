"""torch.compile takes the decoder without a graph break, and compiles it exactly twice: for one row and for several."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from graphexec import BackendConfig, Engine, EngineConfig, SamplingParams
from graphexec.engine import assemble
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
