"""Bad input is refused with a message that says what to change, and costs nobody else anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from graphexec import ConfigError, Engine, EngineConfig, RequestError, SamplingParams
from tests.support.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    config = EngineConfig(
        model=str(checkpoint), device="cpu", max_num_seqs=2, max_model_len=64, num_kv_blocks=4, max_stop_token_ids=3,
        max_stop_sequences=2, max_stop_sequence_tokens=3, max_biased_token_ids=2,
    )  # fmt: skip
    with Engine(config) as engine:
        yield engine


def open_engine(folder: Path, **settings: object) -> None:
    settings = {"device": "cpu", "max_num_seqs": 1, "max_model_len": 32} | settings
    Engine(EngineConfig(model=str(folder), **settings)).close()


def edit_config(folder: Path, **values: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([5] * 64, "64 tokens.*one less"),
        ([5, 96], "Token id 96 is outside the vocabulary of 96"),
        ([-1], "Token id -1"),
        ("text", "no tokenizer"),
        (["text", "text"], "list of token ids"),
        (None, "list of token ids"),
    ],
)
def test_a_bad_prompt_is_refused_and_its_neighbours_run(engine: Engine, prompt: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.add_request(prompt)
    good, bad = engine.generate([[5], prompt], SamplingParams(max_tokens=3, ignore_eos=True))
    assert (bad.finish_reason, bad.token_ids) == ("error", [])
    assert bad.error is not None
    assert len(good.token_ids) == 3


def test_a_text_that_the_tokenizer_refuses_fails_alone() -> None:
    with Engine(EngineConfig(device="cpu", max_num_seqs=2, max_model_len=64)) as engine:
        good, bad = engine.generate(["x", "\ud800"], SamplingParams(max_tokens=3, ignore_eos=True))
        assert bad.error is not None
        assert "tokenizer refuses" in bad.error
        assert len(good.token_ids) == 3


def test_a_huge_min_tokens_is_cut_to_what_fits(engine: Engine) -> None:
    params = SamplingParams(max_tokens=2**31 - 1, min_tokens=2**31 - 1, temperature=0)
    config = EngineConfig(model=engine.config.model, device="cpu", max_num_seqs=1, max_model_len=32)
    with Engine(config) as roomy:
        (output,) = roomy.generate([5], params)
    assert len(output.token_ids) == 31


def test_too_many_stop_tokens_are_refused_by_number(engine: Engine) -> None:
    with pytest.raises(RequestError, match=r"4 stop tokens.*max_stop_token_ids"):
        engine.add_request([5], SamplingParams(stop_token_ids=[7, 8, 9]))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(stop_sequences=[[5]] * 3), r"3 stop_sequences.*Raise max_stop_sequences"),
        (SamplingParams(stop_sequences=[[5] * 4]), r"4 tokens.*Raise max_stop_sequence_tokens"),
        (SamplingParams(logit_bias={5: 1, 6: 1}, bad_token_ids=[7]), r"3 tokens.*Raise max_biased_token_ids"),
        (SamplingParams(logit_bias={96: 1}), "logit_bias has the token id 96, outside the vocabulary of 96"),
        (SamplingParams(bad_token_ids=[96]), "bad_token_ids has the token id 96"),
        (SamplingParams(stop="a"), "no tokenizer"),
    ],
)
def test_what_the_engine_or_the_model_does_not_hold_is_refused_by_name(
    engine: Engine, params: SamplingParams, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        engine.add_request([5], params)


def test_none_stands_for_no_stops_and_no_biases() -> None:
    nothing = dict.fromkeys(("stop", "stop_token_ids", "stop_sequences", "logit_bias", "bad_token_ids"))
    assert SamplingParams(**nothing) == SamplingParams()


def test_several_greedy_samples_are_refused() -> None:
    with pytest.raises(RequestError, match="n=2 is not possible"):
        SamplingParams(n=2, temperature=0)


def test_parameters_for_another_number_of_prompts_are_refused(engine: Engine) -> None:
    with pytest.raises(RequestError, match="2 prompts and 1"):
        engine.generate([[5], [6]], [SamplingParams()])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("max_tokens", 0),
        ("min_tokens", 17),
        ("seed", -1),
        ("stop_token_ids", [-5]),
        ("logprobs", 21),
        ("logprobs", 1.5),
        ("max_tokens", 2.5),
        ("top_k", 2**31),
        ("seed", "one"),
        ("seed", 1.5),
        ("temperature", "hot"),
        ("temperature", 10**400),
        ("stop_token_ids", (1.5,)),
        ("stop_token_ids", 7),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        # Finite here, and 0 or infinite in the float32 of the device: 0 times infinity is no number to choose by.
        ("repetition_penalty", 1e39),
        ("repetition_penalty", 1e-50),
        ("temperature", 1e39),
        ("temperature", 1e-50),
        ("presence_penalty", 2.1),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", -2.5),
        ("logit_bias", {5: 101}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {5: float("nan")}),
        ("logit_bias", [5]),
        ("bad_token_ids", [-2]),
        ("bad_token_ids", "a"),
        ("prompt_logprobs", 21),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [5]),
        ("stop", 5),
        ("stop_sequences", [[]]),
        ("stop_sequences", [5]),
        ("stop_sequences", [[1, -1]]),
        ("n", 0),
        ("n", 1025),
    ],
)
def test_an_impossible_sampling_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


def test_a_missing_checkpoint_says_what_the_package_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no folder .*tiny"):
        open_engine(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        open_engine(tmp_path / "empty")


def test_a_checkpoint_without_weights_points_to_random_ones(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match='load_format="random"'):
        open_engine(folder)
    open_engine(folder, load_format="random")


def test_a_half_written_weight_file_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ConfigError, match="Cannot read the weights"):
        open_engine(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", shard_size="50KB")
    victim = sorted(folder.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(ConfigError, match=victim.name):
        open_engine(folder)


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"missing_keys.*up_proj"):
        open_engine(folder)


def test_an_unsupported_architecture_lists_the_supported_ones(tmp_path: Path) -> None:
    folder = edit_config(make_checkpoint(tmp_path / "model"), model_type="gpt2", architectures=["GPT2LMHeadModel"])
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel.*LlamaForCausalLM.*Qwen3ForCausalLM"):
        open_engine(folder)


def test_layers_of_another_type_are_refused_whatever_the_architecture_is_called(tmp_path: Path) -> None:
    """Granite has Llama's modules, and factors at its residuals."""
    folder = make_checkpoint(tmp_path / "model", "granite")
    with pytest.raises(ConfigError, match=r"type 'granite'.*Supported: llama, mistral"):
        open_engine(edit_config(folder, architectures=["LlamaForCausalLM"]))


def test_a_real_checkpoint_of_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel.*is not supported. Supported: LlamaForCausalLM"):
        open_engine(tmp_path)


@pytest.mark.parametrize(
    ("values", "feature"),
    [
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding window"),
        ({"attn_logit_softcapping": 30.0}, "attention soft-capping"),
        ({"final_logit_softcapping": 30.0}, "logit soft-capping"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "rope scaling 'dynamic'"),
    ],
)
def test_a_feature_that_would_be_computed_wrongly_is_refused_by_name(
    tmp_path: Path, values: dict[str, object], feature: str
) -> None:
    folder = edit_config(make_checkpoint(tmp_path / "model"), **values)
    with pytest.raises(ConfigError, match=feature):
        open_engine(folder)


def test_a_mistral_with_a_sliding_window_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "mistral", sliding_window=128)
    with pytest.raises(ConfigError, match="sliding window"):
        open_engine(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_cuda_without_a_device_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        open_engine(checkpoint, device="cuda")


def test_a_length_beyond_the_model_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="512 positions"):
        open_engine(checkpoint, max_model_len=513)


def test_a_cache_that_holds_no_full_sequence_refuses_only_what_does_not_fit(checkpoint: Path) -> None:
    config = EngineConfig(model=str(checkpoint), device="cpu", max_num_seqs=2, max_model_len=64, num_kv_blocks=2)
    with Engine(config) as engine:
        with pytest.raises(RequestError, match="may need 3 KV blocks, and the cache has 2"):
            engine.add_request([5] * 20, SamplingParams(max_tokens=20))
        (output,) = engine.generate([[5] * 20], SamplingParams(max_tokens=5, ignore_eos=True))
        assert len(output.token_ids) == 5
