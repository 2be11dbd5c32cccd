"""The modules that stand in the place of transformers' own: paged attention, merged projections, norms.

`swap_modules` puts them into a model that transformers has made; `Decoder` then takes them from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from graphexec.kernels.attention import paged_attention_op
from graphexec.kernels.linear import linear_op
from graphexec.models.architectures import head_dim

__all__ = ["EXERCISED_BLOCKS", "PagedAttention", "swap_modules"]

EXERCISED_BLOCKS = 512
"""KV blocks, the reserved one included, that hold random numbers for warm-up and verification to attend to."""


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
        self.k_cache, self.v_cache = (_zeros(shape, weight.dtype, weight.device) for _ in range(2))
        generator = torch.Generator(weight.device).manual_seed(0)
        for cache in (self.k_cache, self.v_cache):
            cache[:EXERCISED_BLOCKS].normal_(generator=generator)

    def forward(self, hidden: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """`[1, T, hidden]` to the same, with cosines and sines `[T, D]`; the rows' slots come from the running step."""
        cos, sin = position_embeddings
        attended = paged_attention_op(
            self.qkv_proj(hidden)[0],
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
        out: torch.Tensor = self.o_proj(attended[None])
        return out


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`torch.zeros`, but on the CPU with pages that the system clears when they are first met: a cache may have GiB."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    cleared = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(cleared).view(dtype).view(shape)


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
