"""Cases and a check for the linear layer of few rows, for any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from graphexec.kernels.linear import LinearTile, linear_reference, linear_triton

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
SUMMING = 2**-21  # of a sum's error in float32, by the sum of what it adds without signs


@dataclass(frozen=True)
class LinearCase:
    """One product; None as tile for the chosen one."""

    rows: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    has_bias: bool = False
    tile: LinearTile | None = None
    seed: int = 0


def linear_cases(
    dtypes: tuple[torch.dtype, ...], most_outputs: int, most_inputs: int, tiles: tuple[LinearTile, ...]
) -> st.SearchStrategy[LinearCase]:
    return st.builds(
        LinearCase,
        rows=st.integers(1, 8),
        out_features=st.integers(1, most_outputs),
        in_features=st.integers(1, most_inputs),
        dtype=st.sampled_from(dtypes),
        has_bias=st.booleans(),
        tile=st.sampled_from([None, *tiles]),
        seed=st.integers(0, 3),
    )


def check_linear(case: LinearCase, device: str) -> None:
    """The kernel gives the product in float64, rounded; and what lies beyond its tensors' edges spoils nothing."""
    random = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> torch.Tensor:
        """In the middle of NaN: what a kernel reads beyond it spoils the product."""
        size = torch.Size(shape).numel()
        surrounded = torch.full((size + 4096,), float("nan"), dtype=case.dtype)
        surrounded[2048 : 2048 + size] = torch.randn(size, generator=random).to(case.dtype)
        return surrounded.to(device)[2048 : 2048 + size].view(shape)

    inputs, weight = normal(case.rows, case.in_features), normal(case.out_features, case.in_features)
    bias = normal(case.out_features) if case.has_bias else None
    given = linear_triton(inputs, weight, bias, case.tile)
    expected = linear_reference(inputs.double(), weight.double(), None if bias is None else bias.double())
    assert given.shape == (case.rows, case.out_features)
    assert given.dtype == case.dtype
    added = linear_reference(
        inputs.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs()
    )
    allowed = ROUNDING[case.dtype] * expected.abs() + SUMMING * added + torch.finfo(case.dtype).tiny
    assert ((given.double() - expected).abs() <= allowed).all()
