"""The trunk of a decoder: what a step runs between the rows' token ids and their hidden states.

It is cut where the residual stream meets a norm: each part ends with the norm in front of the next one. Where parts are
compiled by themselves, a part's last sum and that norm are one kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graphexec.models.layers import PagedAttention

__all__ = ["Decoder"]


class RotaryTable(nn.Module):
    """Cosines and sines of every position, computed once by the model's own module: a step looks them up.

    Attributes:
        cos_sin: `[2, max_tokens, D]` in the model's dtype. inductor would look up a row of two in two kernels.
    """

    def __init__(self, rotary: Any, max_tokens: int, weight: torch.Tensor) -> None:
        super().__init__()
        positions = torch.arange(max_tokens, device=weight.device)
        with torch.no_grad():
            cos, sin = rotary(weight, positions[None])
        self.cos_sin = nn.Buffer(torch.cat([cos, sin]), persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[T]` positions to two `[T, D]`."""
        cos, sin = self.cos_sin.index_select(1, positions)
        return cos, sin


class Entry(nn.Module):
    """What the first layer needs: embedded tokens, the same behind its norm, and the rows' rotary embeddings."""

    def __init__(self, embed_tokens: nn.Module, rotary: RotaryTable, next_norm: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.rotary = rotary
        self.next_norm = next_norm

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """`[T]` token ids and positions to the arguments of the first layer."""
        residual = self.embed_tokens(input_ids[None])  # no view of it: a compiled layer would tell that from an output
        return self.next_norm(residual), residual, self.rotary(positions)


class DecoderLayer(nn.Module):
    """A layer of transformers' with the norm behind it in place of the one in front: the next layer's, or the last."""

    def __init__(self, source: Any, next_norm: nn.Module) -> None:
        super().__init__()
        self.self_attn: PagedAttention = source.self_attn
        self.post_attention_layernorm = source.post_attention_layernorm
        self.mlp = source.mlp
        self.next_norm = next_norm

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed hidden states and residual stream, both `[1, T, hidden]`, to those of the next layer.

        Args:
            hidden: what `residual` is behind this layer's norm.
            residual: sum of the embedded tokens and of all that was added to them.
            position_embeddings: cosines and sines of the rows, `[T, D]`.
        """
        residual = residual + self.self_attn(hidden, position_embeddings)
        residual = residual + self.mlp(self.post_attention_layernorm(residual))
        return self.next_norm(residual), residual


class Decoder(nn.Module):
    """The trunk of a transformers decoder for sequences of at most `max_tokens` tokens.

    Leaves out what only transformers' own caches and masks need. Its modules are the model's own: no weight is copied.
    """

    def __init__(self, model: Any, max_tokens: int) -> None:
        super().__init__()
        trunk = model.model
        first_norm, *next_norms = [*(layer.input_layernorm for layer in trunk.layers), trunk.norm]
        rotary = RotaryTable(trunk.rotary_emb, max_tokens, trunk.embed_tokens.weight)
        self.embedding: torch.Tensor = trunk.embed_tokens.weight
        self.entry = Entry(trunk.embed_tokens, rotary, first_norm)
        self.layers = nn.ModuleList(map(DecoderLayer, trunk.layers, next_norms))
        self.attentions: list[PagedAttention] = [layer.self_attn for layer in trunk.layers]

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`[T]` int32 token ids and positions to `[T, hidden]` hidden states, behind the last norm."""
        hidden: torch.Tensor
        hidden, residual, position_embeddings = self.entry(input_ids, positions)
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, position_embeddings)
        return hidden[0]
