"""Which decoders the engine serves, what it refuses, and the modules that it swaps into transformers' model code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from graphexec.errors import ConfigError
from graphexec.kernels.attention import paged_attention_op
from graphexec.kernels.linear import linear_op

__all__ = ["EXERCISED_BLOCKS", "SUPPORTED", "Decoder", "PagedAttention", "check_supported", "swap_modules"]

# To add one: its layers must have self_attn.{q,k,v,o}_proj, mlp.{gate,up,down}_proj, input_layernorm and
# post_attention_layernorm, or `swap_modules` must learn its names. tests/engine/test_transformers_agree.py holds it.
SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures whose layers are attention with rotary embedding followed by a gated MLP."""

EXERCISED_BLOCKS = 512
"""KV blocks, the reserved one included, that warm-up and verification use."""

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


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32; in float64 for float64 inputs, which transformers' own would round."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden.dtype)


class Projection(nn.Module):
    """A linear layer, or several of the same inputs side by side.

    Attributes:
        weight: `[N, K]`, the layers' outputs one after the other.
        bias: `[N]`, or None if the layers have none.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        assert len({layer.bias is None for layer in layers}) == 1, "either all layers have a bias, or none"
        self.weight = _merged(*(layer.weight for layer in layers))
        self.bias = None if layers[0].bias is None else _merged(*(layer.bias for layer in layers))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[..., K]` to `[..., N]`."""
        out: torch.Tensor = linear_op(inputs, self.weight, self.bias)
        return out


def _merged(first: torch.Tensor, *others: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(torch.cat([first, *others]) if others else first, requires_grad=False)


class PagedAttention(nn.Module):
    """Attention over the paged KV cache, with one projection for q, k and v.

    Attributes:
        k_cache, v_cache: `[blocks, KH, block_size, D]`; set by `allocate_cache`.
    """

    def __init__(self, source: Any, config: Any) -> None:
        super().__init__()
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim = head_dim(config)
        self.scale = float(source.scaling)
        self.qkv_proj = Projection(source.q_proj, source.k_proj, source.v_proj)
        self.o_proj = Projection(source.o_proj)
        self.q_norm = source.q_norm.weight if hasattr(source, "q_norm") else None
        self.k_norm = source.k_norm.weight if hasattr(source, "k_norm") else None
        self.norm_eps = float(config.rms_norm_eps)

    def allocate_cache(self, num_blocks: int, block_size: int) -> None:
        """Gives this layer a cache; steps that were captured with another one must not be replayed.

        Its first blocks hold random numbers, since warm-up and verification attend to them; the others hold zeros.
        """
        weight = self.qkv_proj.weight
        shape = (num_blocks, self.num_kv_heads, block_size, self.head_dim)
        self.k_cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.v_cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        generator = torch.Generator(weight.device).manual_seed(0)
        for cache in (self.k_cache, self.v_cache):
            cache[:EXERCISED_BLOCKS].normal_(generator=generator)

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: object
    ) -> tuple[torch.Tensor, None]:
        """`[1, T, hidden]` to the same, with cosines and sines `[T, D]`; the rows' slots come from the running step."""
        cos, sin = position_embeddings
        attended = paged_attention_op(
            self.qkv_proj(hidden_states)[0],
            cos,
            sin,
            self.q_norm,
            self.k_norm,
            self.norm_eps,
            self.k_cache,
            self.v_cache,
            self.num_heads,
            self.scale,
        )
        return self.o_proj(attended[None]), None


class GatedMLP(nn.Module):
    """The gated MLP with one projection for gate and up."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.gate_up_proj = Projection(source.gate_proj, source.up_proj)
        self.down_proj = Projection(source.down_proj)
        self.activation: Callable[[torch.Tensor], torch.Tensor] = source.act_fn

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        out: torch.Tensor = self.down_proj(self.activation(gate) * up)
        return out


def swap_modules(model: Any) -> None:
    """Puts our attention, MLP, norms and projections into a transformers model, in place, freeing theirs."""
    config = model.config
    for layer in model.model.layers:
        layer.self_attn = PagedAttention(layer.self_attn, config)
        layer.mlp = GatedMLP(layer.mlp)
        layer.input_layernorm = RMSNorm(layer.input_layernorm.weight, config.rms_norm_eps)
        layer.post_attention_layernorm = RMSNorm(layer.post_attention_layernorm.weight, config.rms_norm_eps)
    model.model.norm = RMSNorm(model.model.norm.weight, config.rms_norm_eps)
    model.lm_head = Projection(model.lm_head)


class RotaryTable(nn.Module):
    """Cosines and sines of every position, computed once by the model's own module: a step looks them up.

    Attributes:
        cos, sin: `[max_tokens, D]` in the model's dtype.
    """

    def __init__(self, rotary: Any, max_tokens: int, weight: torch.Tensor) -> None:
        super().__init__()
        positions = torch.arange(max_tokens, device=weight.device)
        with torch.no_grad():
            cos, sin = rotary(weight, positions[None])
        self.cos = nn.Buffer(cos[0].contiguous(), persistent=False)
        self.sin = nn.Buffer(sin[0].contiguous(), persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[T]` positions to two `[T, D]`."""
        return self.cos.index_select(0, positions), self.sin.index_select(0, positions)


class Decoder(nn.Module):
    """The trunk of a transformers decoder for sequences of at most `max_tokens` tokens.

    Leaves out what only transformers' own caches and masks need.
    """

    def __init__(self, model: Any, max_tokens: int) -> None:
        super().__init__()
        self.embed_tokens = model.model.embed_tokens
        self.rotary = RotaryTable(model.model.rotary_emb, max_tokens, self.embed_tokens.weight)
        self.layers = model.model.layers
        self.norm = model.model.norm

    @property
    def attentions(self) -> list[PagedAttention]:
        return [layer.self_attn for layer in self.layers]

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`[T]` int32 token ids and positions to `[T, hidden]` hidden states."""
        hidden = self.embed_tokens(input_ids[None])  # not a view: a compiled layer would tell it from a layer's output
        position_embeddings = self.rotary(positions)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=position_embeddings)
        normed: torch.Tensor = self.norm(hidden)[0]
        return normed
