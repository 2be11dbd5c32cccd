"""The trunk of a decoder: what a step runs between the rows' token ids and their hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graphexec.models.layers import PagedAttention

__all__ = ["Decoder"]


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
