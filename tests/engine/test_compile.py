"""torch.compile takes the decoder without a graph break, and compiles exactly twice: for one row and for several.

Layer by layer it does so for two regions: what is in front of the layers, and a layer.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import triton
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._inductor.decomposition import select_decomp_table

from graphexec import BackendConfig, Engine, EngineConfig, SamplingParams
from graphexec.engine import assemble
from graphexec.kernels.lang import settle_cache_folder
from graphexec.kernels.linear import linear_op
from graphexec.models.decoder import Decoder
from graphexec.models.loader import load_config, load_model
from tests.support.checkpoints import make_checkpoint


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("mode", "regions"), [("model", 1), ("layer", 2)])
def test_each_region_is_compiled_twice_whatever_the_step_and_all_layers_are_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, regions: int
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
    assert counter.frame_count == 2 * regions


class Uncompiled(nn.Module):
    """Notes how it is to be compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[dict[str, object]] = []

    def compile(self, **options: object) -> None:
        self.given.append(options)


@pytest.mark.parametrize("mode", ["model", "layer", "off"])
@pytest.mark.parametrize(
    ("compiler", "early", "options"),
    [("inductor", True, {"triton.enable_pdl": True}), ("inductor", False, None), (CompileCounter(), True, None)],
)
def test_inductors_kernels_begin_early_where_ours_do(
    monkeypatch: pytest.MonkeyPatch, compiler: Any, early: bool, options: dict[str, bool] | None, mode: Any
) -> None:
    decoder, parts = Uncompiled(), [Uncompiled(), Uncompiled(), Uncompiled()]
    decoder.embedding, decoder.entry, decoder.layers = torch.zeros(2, 2), parts[0], nn.ModuleList(parts[1:])
    monkeypatch.setattr(assemble, "launches_early", lambda tensor: early)
    assemble.compile_decoder(cast(Decoder, decoder), mode, compiler)
    expected = {"backend": compiler, "dynamic": True, "fullgraph": True, "options": options}
    assert decoder.given == [expected] * (mode == "model")
    assert [part.given for part in parts] == [[expected] * (mode == "layer")] * 3


def small_decoder(folder: Path) -> tuple[Decoder, Any]:
    loaded = load_model(folder, load_config(folder), "auto", torch.device("cpu"), torch.bfloat16, 0)
    decoder = Decoder(loaded.model, max_tokens=64)
    assemble.allocate_caches(decoder, 4, 16)
    return decoder, loaded.model


def test_every_product_of_the_model_is_ours_and_tied_weights_stay_one(tmp_path: Path) -> None:
    _, model = small_decoder(make_checkpoint(tmp_path / "model"))
    assert not [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
def test_a_decoder_calls_four_products_a_layer_and_makes_no_tensor_out_of_nothing(
    tmp_path: Path, model_type: str
) -> None:
    """inductor's kernel for a tensor that is made of nothing would not wait for its predecessor."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    decoder, _ = small_decoder(make_checkpoint(tmp_path / "model", model_type))
    tracer: Any = aot_autograd(fw_compiler=keep, decompositions=select_decomp_table())
    assemble.compile_decoder(decoder, "model", tracer)
    row = torch.zeros(3, dtype=torch.int32)
    with torch.no_grad(), pytest.raises(LookupError):  # there is no running step: the trace is what is wanted
        decoder(row, row)
    (graph,) = graphs
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert sum(node.target is linear_op for node in calls) == 4 * len(decoder.layers)
    makers = [node for node in calls if isinstance(node.meta["val"], torch.Tensor)]
    for node in makers:
        inputs = [each.meta["val"] for each in node.all_input_nodes]
        assert any(isinstance(each, torch.Tensor | tuple | list) for each in inputs), node.format_node()


@cache
def written_for_hopper() -> dict[str, list[str]]:
    """Sources of inductor's kernels, in the order of their launches, by region, size and rows."""
    command = [sys.executable, "-m", "tests.support.inductor_kernels"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    sources: dict[str, list[str]] = json.loads(done.stdout)
    return sources


def test_inductor_makes_two_kernels_in_front_of_the_layers_and_three_of_a_layer() -> None:
    """Those of a layer: a sum with its norm, the activation, and once more a sum with its norm."""
    written = written_for_hopper()
    assert len(written) == 8
    for case, kernels in written.items():
        assert len(kernels) == {"entry": 2, "layer": 3}[case.partition(",")[0]], case


def test_until_they_wait_inductors_kernels_store_nothing_and_read_positions_alone() -> None:
    """The kernel of `prepare` wrote the positions, two launches before the one that looks them up."""
    for case, kernels in written_for_hopper().items():
        assert any("tl.range(" in kernel for kernel in kernels) is ("4096" in case), "as many loops as expected"
        for kernel in kernels:
            before, wait, behind = kernel.partition("tl.extra.cuda.gdc_wait()")
            assert wait, kernel
            assert "tl.store" in behind
            assert "gdc_launch_dependents" in behind
            assert not re.search(r"tl\.store|tl\.range|gdc_launch|atomic", before), kernel
            assert before.count("tl.load") == ("index_select" in kernel), kernel


START = """
from torch._dynamo.utils import compilation_time_metrics, counters
from graphexec import Engine, EngineConfig
with Engine(EngineConfig(model="tiny-random", device="cpu", compile="layer", max_num_seqs=2, max_model_len=32)):
    tracings = len(compilation_time_metrics["bytecode_tracing"])
    print(counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"], tracings)
"""


def test_a_second_start_finds_its_compilations_in_torchs_cache(tmp_path: Path) -> None:
    """And neither traces a compilation twice, as torch does where it has to give up a dynamic float."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    starts = [
        subprocess.run(
            [sys.executable, "-c", START], capture_output=True, text=True, check=True, env=environment, timeout=300
        ).stdout.split()
        for _ in range(2)
    ]
    assert starts == [["4", "0", "4"], ["0", "4", "4"]]


def test_triton_keeps_one_cache_folder_whatever_torch_sets_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    before = triton.knobs.cache.dir
    settle_cache_folder()
    assert os.environ["TRITON_CACHE_DIR"] == before == triton.knobs.cache.dir
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    settle_cache_folder()
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"
