"""Small checkpoints that transformers itself writes, so that the loader reads what it will meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

__all__ = ["SMALL", "make_checkpoint"]

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}


def make_checkpoint(folder: Path, model_type: str = "qwen3", *, shard_size: str = "1GB", **settings: Any) -> Path:
    """Writes a checkpoint with seeded random weights in float32 and returns its folder."""
    config = AutoConfig.for_model(model_type, **(SMALL | settings))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers sets them to zero: nobody would miss one
                torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder
