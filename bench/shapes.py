"""The model shapes that speed is measured on, and engine configurations for them with random weights.

Importing it imports nothing of graphexec: the peers are measured on the same shapes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphexec import BackendConfig, EngineConfig
    from graphexec.config import CompileMode, Device

__all__ = ["SHAPES", "Shape", "engine_config", "write_config"]

ConfigValue = int | float | str | bool | list[str] | None

_QWEN3: dict[str, ConfigValue] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "attention_bias": False,
    "max_position_embeddings": 40960,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class Shape:
    """A model configuration and the load it is measured under.

    Attributes:
        config: content of a transformers config.json.
        prompt_tokens: length of the prompts.
        max_num_seqs: slots; more if a larger batch is asked for.
        max_model_len: longest prompt plus output, tokens.
        max_num_batched_tokens: most rows of a step with prompt chunks.
    """

    name: str
    config: dict[str, ConfigValue] = field(repr=False)
    prompt_tokens: int = 128
    max_num_seqs: int = 256
    max_model_len: int = 1024
    max_num_batched_tokens: int = 2048

    @property
    def vocab_size(self) -> int:
        return self._integer("vocab_size")

    @property
    def most_positions(self) -> int:
        """The longest sequence that the model has positions for, tokens."""
        return self._integer("max_position_embeddings")

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of one token, over all layers."""
        element = 4 if self.config["dtype"] == "float32" else 2
        heads = self._integer("num_key_value_heads") * self._integer("head_dim")
        return 2 * self._integer("num_hidden_layers") * heads * element

    def _integer(self, name: str) -> int:
        value = self.config[name]
        assert isinstance(value, int)
        return value


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(
            "qwen3-0.6b",
            _QWEN3
            | {
                "hidden_size": 1024,
                "intermediate_size": 3072,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "tie_word_embeddings": True,
            },
        ),
        Shape(
            "qwen3-8b",
            _QWEN3
            | {
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "tie_word_embeddings": False,
            },
        ),
        Shape(  # for a smoke run on the CPU: its speed says nothing
            "tiny",
            _QWEN3
            | {
                "vocab_size": 256,
                "head_dim": 64,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "tie_word_embeddings": True,
                "initializer_range": 0.3,
                "max_position_embeddings": 512,
                "bos_token_id": None,
                "eos_token_id": 1,
                "dtype": "float32",
            },
            prompt_tokens=12,
            max_num_seqs=2,
            max_model_len=64,
            max_num_batched_tokens=16,
        ),
    )
}
"""The two shapes of the measurements, and a tiny one; by name."""


def write_config(shape: Shape, folder: Path) -> Path:
    """Makes `folder` a checkpoint without weights, for `load_format="random"`, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config, indent=1))
    return folder


def engine_config(
    shape: Shape,
    folder: Path,
    backend: BackendConfig,
    *,
    largest_batch: int = 1,
    device: Device = "auto",
    compile: CompileMode | None = None,
    max_model_len: int | None = None,
    kv_tokens: int | None = None,
) -> EngineConfig:
    """An engine for `shape`, whose `write_config` folder is `folder`.

    Args:
        max_model_len: longest prompt plus output, tokens; None for the shape's.
        kv_tokens: tokens that the KV cache must hold; None for every slot at full length.
    """
    from graphexec import EngineConfig  # here: what peers import must not need it

    block_size = 16
    slots = max(shape.max_num_seqs, largest_batch)
    longest = max_model_len or shape.max_model_len
    rows = max(shape.max_num_batched_tokens, slots)
    blocks = slots * -(-longest // block_size)
    if kv_tokens is not None:  # a partial block for each slot, and as many as the largest step of a warm-up touches
        blocks = max(kv_tokens // block_size, rows // block_size) + 2 * slots
    return EngineConfig(
        model=str(folder),
        load_format="random",
        device=device,
        max_num_seqs=slots,
        max_model_len=longest,
        max_num_batched_tokens=rows,
        kv_block_size=block_size,
        num_kv_blocks=blocks,
        prefix_caching=False,  # or the second run of the same prompts would compute next to nothing of them
        compile=compile,
        backend=backend,
    )
