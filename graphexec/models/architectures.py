"""Which decoders the engine serves, and what it refuses by name."""

from __future__ import annotations

from typing import Any

import torch

from graphexec.errors import ConfigError

__all__ = ["SUPPORTED", "check_supported", "head_dim"]

# To add one: its layers must have self_attn.{q,k,v,o}_proj, mlp.{gate,up,down}_proj, input_layernorm and
# post_attention_layernorm, or `swap_modules` must learn its names; and they must compute what `DecoderLayer` does in
# their place: no factor at a residual, no further norm. tests/engine/test_transformers_agree.py holds it.
SUPPORTED = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Architectures whose layers are attention with rotary embedding followed by a gated MLP; their transformers types."""

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_HEAD_SIZES = (64, 80, 96, 128, 256)


def check_supported(config: Any, device: torch.device) -> None:
    """Refuses by name what would be computed wrongly.

    Args:
        config: a transformers configuration.
        device: where it shall run.

    Raises:
        ConfigError: names the feature.
    """
    named = list(getattr(config, "architectures", None) or [])
    if not any(name in SUPPORTED for name in named):
        raise ConfigError(f"Architecture {named or '(none)'} is not supported. Supported: {', '.join(SUPPORTED)}.")
    if config.model_type not in SUPPORTED.values():  # which decides what transformers makes, whatever it is called
        types = ", ".join(SUPPORTED.values())
        raise ConfigError(f"The model has type {config.model_type!r} in its configuration. Supported: {types}.")
    refused = {
        "sliding window attention": _slides(config),
        "attention soft-capping": getattr(config, "attn_logit_softcapping", None) is not None,
        "logit soft-capping": getattr(config, "final_logit_softcapping", None) is not None,
        "quantized weights": getattr(config, "quantization_config", None) is not None,
    }
    for feature, present in refused.items():
        if present:
            raise ConfigError(f"The model uses {feature}, which graphexec does not support.")
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise ConfigError(f"The model uses rope scaling {rope_type!r}. Supported: {', '.join(_ROPE_TYPES)}.")
    head_size = head_dim(config)
    if device.type == "cuda" and head_size not in _HEAD_SIZES:
        raise ConfigError(f"The model has heads of size {head_size}. Supported on CUDA: {_HEAD_SIZES}.")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"num_attention_heads={config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={config.num_key_value_heads}."
        )


def head_dim(config: Any) -> int:
    """Size of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _slides(config: Any) -> bool:
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return "sliding_attention" in layer_types
    return getattr(config, "sliding_window", None) is not None
