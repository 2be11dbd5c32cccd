"""Greedy tokens equal those of transformers' own generate, for every supported architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from graphexec import Engine, EngineConfig, SamplingParams
from tests.support.checkpoints import make_checkpoint

ARCHITECTURES = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "mistral": {"sliding_window": None, "tie_word_embeddings": False},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 4},
}


def check_greedy(folder: Path, prompts: list[list[int]], tokens: int, slots: int = 1) -> None:
    """Fails unless the engine continues `prompts` as transformers does, each by itself."""
    with Engine(EngineConfig(model=str(folder), dtype="float64", device="cpu", max_num_seqs=slots)) as engine:
        outputs = engine.generate(prompts, SamplingParams(max_tokens=tokens, temperature=0))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=tokens, do_sample=False
        )
        assert output.token_ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_greedy_tokens_are_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", model_type, shard_size="100KB", **ARCHITECTURES[model_type])
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 2, 5, 16, 17, 40]
    prompts = [torch.randint(2, 96, (length,), generator=generator).tolist() for length in lengths]
    check_greedy(folder, prompts, 24, slots=4)


@pytest.mark.parametrize("head_dim", [80, 96, 256])
def test_heads_of_other_sizes_give_the_tokens_of_transformers(head_dim: int, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama", head_dim=head_dim)
    check_greedy(folder, [list(range(2, 40))], 20)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_scaled_rotary_embeddings_are_those_of_transformers(scaling: dict[str, object], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama", rope_parameters=scaling)
    check_greedy(folder, [list(range(2, 90))], 20)
