"""The whole engine on the GPU: the same tokens as eager, no synchronising call on the step path."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.collatz import run as run_collatz
from graphexec import BackendConfig, Engine, EngineConfig, SamplingParams
from graphexec.kernels.sample import SamplerVariant
from tests.support.checkpoints import make_checkpoint
from tests.support.scripts import run_script

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
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "model", **SETTINGS)


def open_engine(
    checkpoint: Path, backend: BackendConfig, dtype: str = "float32", compile: str = "off", **settings: object
) -> Engine:
    values = {"max_num_seqs": 8, "max_model_len": 256, "num_kv_blocks": 160} | settings
    return Engine(
        EngineConfig(model=str(checkpoint), device="cuda", dtype=dtype, compile=compile, backend=backend, **values)
    )


def one_bucket(name: str) -> BackendConfig:
    return BackendConfig(name=name, capture_sizes=(8,), prefill_sizes=(264,))


def requests(count: int) -> list[tuple[list[int], SamplingParams]]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 100, (count,), generator=generator).tolist()
    prompts = [torch.randint(2, 2048, (length,), generator=generator).tolist() for length in lengths]
    params = [
        SamplingParams(
            max_tokens=20 + index % 17,
            temperature=[0.0, 0.8, 1.2][index % 3],
            top_k=[0, 20, 0, 5][index % 4],
            top_p=[1.0, 0.9][index % 2],
            min_p=[0.0, 0.02][index // 2 % 2],
            repetition_penalty=[1.0, 1.0, 1.25][index % 3],
            presence_penalty=[0.0, 0.5][index // 3 % 2],
            frequency_penalty=[0.0, 0.0, 0.0, 0.25][index % 4],
            logit_bias={7: 2.5, 300 + index: -4.0} if index % 4 == 1 else {},
            bad_token_ids=[index, 2047] if index % 7 == 2 else [],
            stop_sequences=[[index, 5], [9]] if index % 3 == 1 else [],
            seed=index,
            logprobs=2 if index % 5 == 0 else None,
            prompt_logprobs=1 if index % 6 == 4 else None,
        )
        for index in range(count)
    ]
    return list(zip(prompts, params, strict=True))


def tokens(engine: Engine, wanted: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    outputs = engine.generate([prompt for prompt, _ in wanted], [params for _, params in wanted])
    assert all(output.error is None for output in outputs)
    return [output.token_ids for output in outputs]


def test_with_one_bucket_graphs_depths_and_batch_mates_change_no_token(checkpoint: Path) -> None:
    """In float32 with IEEE dots. A decoding row that shares a step with prompt chunks runs through other kernels, and
    who shares a step depends on the crowd and the depth: what remains are differences of the last bits.
    """
    wanted = requests(20)
    settings = {"max_num_batched_tokens": 256}
    with open_engine(checkpoint, one_bucket("eager"), overlap_depth=0, prefix_caching=False, **settings) as engine:
        expected = tokens(engine, wanted)
        alone = [tokens(engine, [request])[0] for request in wanted[:6]]
    assert alone == expected[:6]
    for depth in (0, 1, 2, 4):
        with open_engine(checkpoint, one_bucket("cudagraph"), overlap_depth=depth, **settings) as engine:
            assert tokens(engine, wanted) == expected
            assert engine.stats().replays > 0
    with open_engine(checkpoint, one_bucket("cudagraph"), num_kv_blocks=40, **settings) as engine:
        assert tokens(engine, wanted) == expected
        assert engine.stats().preemptions > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("depth", [0, 1, 2, 4])
def test_the_same_steps_as_graphs_or_eagerly_agree_in_every_bit(checkpoint: Path, dtype: str, depth: int) -> None:
    wanted = [
        (prompt, replace(params, logprobs=3, max_tokens=24, ignore_eos=True, stop_sequences=()))
        for prompt, params in requests(8)
    ]  # as many as there are slots, and of one length: both engines make the same steps
    produced = []
    for name in ("eager", "cudagraph"):
        with open_engine(
            checkpoint, one_bucket(name), dtype, overlap_depth=depth, max_num_batched_tokens=256
        ) as engine:
            outputs = engine.generate([prompt for prompt, _ in wanted], [params for _, params in wanted])
            produced.append([(output.token_ids, output.logprobs, output.prompt_logprobs) for output in outputs])
    assert produced[0] == produced[1]


def test_cached_prefixes_change_no_token(checkpoint: Path) -> None:
    """In float32: a cached block may have been written by the decode kernel, or in a chunk of another size."""
    stems = torch.randint(2, 2048, (3, 50), generator=torch.Generator().manual_seed(8)).tolist()
    wanted = [
        (stems[index % 3] + [2 + index] * (1 + index % 5), SamplingParams(temperature=index % 2, seed=index))
        for index in range(20)
    ]
    produced = []
    for caching in (False, True):
        with open_engine(checkpoint, one_bucket("cudagraph"), prefix_caching=caching) as engine:
            produced.append(tokens(engine, wanted))
            assert (engine.stats().prefix_cached_tokens > 0) == caching
    assert produced[0] == produced[1]


@pytest.mark.parametrize("mode", ["off", "layer", "model"])
def test_across_buckets_a_token_differs_only_where_the_logits_are_close(checkpoint: Path, mode: str) -> None:
    """Teacher-forced: transformers, in float64, judges every token of a bfloat16 engine with the whole ladder."""
    from transformers import AutoModelForCausalLM

    wanted = [(prompt, SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)) for prompt, _ in requests(12)]
    with open_engine(checkpoint, BackendConfig(), "bfloat16", mode) as engine:
        produced = tokens(engine, wanted)
        assert engine.stats().eager_steps.keys() <= {"idle"}
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).double().cuda()
    close, error = 0, 0.35  # logits of this model have a spread of about 5; bfloat16 moves them by up to 0.15
    for (prompt, _), output in zip(wanted, produced, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + output], device="cuda")).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(output, device="cuda")[:, None])[:, 0]
        gap = logits.max(1).values - chosen
        assert gap.max() < error
        close += int((gap > 0).sum())
    total = sum(len(output) for output in produced)
    print(json.dumps({"compile": mode, "tokens": total, "differ_within_error": close}))
    assert close < 0.1 * total


@contextmanager
def synchronising_calls_raise() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_no_call_on_the_step_path_synchronises(checkpoint: Path, depth: int) -> None:
    every = BackendConfig(variants=tuple(SamplerVariant))
    with open_engine(checkpoint, every, overlap_depth=depth) as engine:
        tokens(engine, requests(3))
        with synchronising_calls_raise():
            tokens(engine, requests(12))


def test_the_compiled_model_is_compiled_twice(checkpoint: Path) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    with open_engine(checkpoint, BackendConfig(), "bfloat16", "model") as engine:
        tokens(engine, requests(12))
    assert counters["stats"]["unique_graphs"] == 2


def test_a_cache_sized_by_the_free_memory_leaves_room_to_run(checkpoint: Path) -> None:
    config = EngineConfig(
        model=str(checkpoint), device="cuda", dtype="bfloat16", compile="off", max_num_seqs=16, max_model_len=512,
        kv_memory_fraction=0.5,
    )  # fmt: skip
    with Engine(config) as engine:
        free, total = torch.cuda.mem_get_info()
        assert 0.2 * total < free < 0.7 * total
        assert len(tokens(engine, requests(30))) == 30


def test_the_manifest_describes_real_graphs(checkpoint: Path) -> None:
    with open_engine(checkpoint, BackendConfig(), compile="off") as engine:
        graphs = engine.manifest.graphs
    decode = [graph for graph in graphs if graph.key.phase == "decode"]
    assert [graph.key.bucket for graph in decode] == [size for size in (8, 4, 2, 1) for _ in range(2)]
    assert {graph.key.variant for graph in decode} == {SamplerVariant.GREEDY, SamplerVariant.SAMPLED}
    assert all(graph.verified for graph in decode)
    assert {graph.key.phase for graph in graphs if graph.verified} == {"decode", "mixed", "prefill"}
    assert all(graph.kernels > 30 for graph in graphs)
    assert len({graph.fingerprint for graph in decode}) == len(decode)


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_the_state_machine_runs_on_the_gpu(depth: int) -> None:
    assert run_collatz(range(1, 60), device="cuda", depth=depth) == run_collatz(range(1, 60), device="cpu", depth=0)


@pytest.mark.parametrize(("name", "depth"), [("eager", 1), ("cudagraph", 3)])
def test_a_script_that_ends_with_steps_in_flight_ends_cleanly(name: str, depth: int) -> None:
    done = run_script(device="cuda", name=name, depth=depth)
    assert done.returncode == 0, done.stderr
    assert f"steps in flight: {depth}" in done.stdout


def test_an_engine_that_is_dropped_in_the_middle_of_its_requests_gives_its_memory_back(checkpoint: Path) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    engine = open_engine(checkpoint, BackendConfig(), overlap_depth=2)
    engine.add_request([5], SamplingParams(max_tokens=100, temperature=0, ignore_eos=True))
    for _ in range(4):
        engine.step()
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    assert free - torch.cuda.mem_get_info()[0] < 64 * 2**20
