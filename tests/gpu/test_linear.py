"""The linear layer of few rows on the device, in every dtype it serves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings

from graphexec.kernels.linear import LinearTile, linear, linear_reference
from tests.support.linear_cases import LinearCase, check_linear, linear_cases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.bfloat16, torch.float16)
TILES = (LinearTile(16, 256, 1), LinearTile(32, 64, 4))


@settings(max_examples=80, deadline=None)
@given(linear_cases(DTYPES, most_outputs=300, most_inputs=5000, tiles=TILES))
@example(LinearCase(rows=1, out_features=151_936, in_features=1024, dtype=torch.bfloat16))
@example(LinearCase(rows=8, out_features=4096, in_features=12288, dtype=torch.bfloat16, has_bias=True))
def test_the_kernel_agrees_with_the_reference(case: LinearCase) -> None:
    check_linear(case, "cuda")


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_a_chain_of_early_launches_gives_what_launches_one_at_a_time_give(rows: int) -> None:
    """Each product reads at once what the launch in front of it has just written, over and over in one buffer."""
    random = torch.Generator("cuda").manual_seed(rows)
    width, layers = 2048, 40
    weights = [
        torch.randn(width, width, generator=random, device="cuda", dtype=torch.bfloat16) / width**0.5
        for _ in range(layers)
    ]
    start = torch.randn(rows, width, generator=random, device="cuda", dtype=torch.bfloat16)
    hidden, one_at_a_time = start.clone(), start.clone()

    def chain() -> None:
        for weight in weights:
            hidden.copy_(linear(linear(hidden, weight), weight))

    for weight in weights:
        between = linear(one_at_a_time, weight)
        torch.cuda.synchronize()
        one_at_a_time = linear(between, weight)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    for _ in range(20):
        hidden.copy_(start)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(hidden, one_at_a_time)


@pytest.mark.parametrize("rows", [2, 3, 8, 9])
def test_rows_on_both_sides_of_the_limit_agree(rows: int) -> None:
    random = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(3001, 1001, generator=random, device="cuda", dtype=torch.bfloat16)
    inputs = torch.randn(rows, 1001, generator=random, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()  # no launch of a step may write a weight
    torch.testing.assert_close(linear(inputs, weight), linear_reference(inputs, weight), rtol=2e-2, atol=0.2)
