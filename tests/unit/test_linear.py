"""The linear layer of few rows under Triton's interpreter, and who serves which rows, on the CPU."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import example, given, settings

from graphexec.kernels import linear as module
from graphexec.kernels.linear import LinearTile, choose_linear_tile, linear, linear_op, linear_triton, serves
from tests.support.linear_cases import LinearCase, check_linear, linear_cases

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="runs kernels on the CPU, under TRITON_INTERPRET=1; tests/gpu has the same checks for the device",
)
DTYPES = (torch.float16,)  # the interpreter truncates where the hardware rounds to bfloat16
TILES = (LinearTile(4, 256, 1), LinearTile(16, 64, 2))


@interpreted
@settings(max_examples=60, deadline=None)
@given(linear_cases(DTYPES, most_outputs=40, most_inputs=600, tiles=TILES))
@example(LinearCase(rows=1, out_features=1, in_features=1, dtype=torch.float16, has_bias=True))
@example(LinearCase(rows=2, out_features=9, in_features=256, dtype=torch.float16, tile=TILES[0]))
@example(LinearCase(rows=2, out_features=16, in_features=513, dtype=torch.float16, has_bias=True, tile=TILES[0]))
@example(LinearCase(rows=8, out_features=33, in_features=129, dtype=torch.float16, has_bias=True, tile=TILES[1]))
def test_the_kernel_agrees_with_the_reference(case: LinearCase) -> None:
    check_linear(case, "cpu")


@pytest.mark.parametrize(
    ("rows", "out_features", "in_features", "tile"),
    [
        (1, 4096, 1024, (4, 256, 2)),
        (1, 1024, 2048, (4, 256, 4)),
        (2, 1024, 3072, (4, 256, 8)),
        (2, 4096, 12288, (4, 256, 4)),
        (1, 151_936, 1024, (4, 256, 2)),
        (1, 5, 7, (4, 256, 1)),
        (8, 4096, 1024, (16, 256, 4)),
        (3, 1024, 2048, (16, 256, 8)),
        (8, 5120, 1024, (16, 256, 4)),
        (8, 6144, 1024, (16, 128, 4)),
    ],
)
def test_tiles_of_the_measured_products(
    rows: int, out_features: int, in_features: int, tile: tuple[int, int, int]
) -> None:
    assert choose_linear_tile(rows, out_features, in_features) == tile


@pytest.mark.parametrize(
    ("rows", "out_features", "served"),
    [
        (0, 4096, False),
        (1, 4096, True),
        (8, 4096, True),
        (9, 4096, False),
        (1, 151_936, True),
        (3, 16384, True),
        (3, 16385, False),
    ],
)
def test_the_kernels_serve_few_rows(
    monkeypatch: pytest.MonkeyPatch, rows: int, out_features: int, served: bool
) -> None:
    monkeypatch.setattr(module, "use_triton", lambda tensor: True)
    weight = torch.empty(out_features, 4, dtype=torch.bfloat16)
    assert serves(rows, weight) == served
    assert not serves(rows, weight.float())
    monkeypatch.setattr(module, "linear_triton", lambda *_: "kernel")
    monkeypatch.setattr(module, "linear_reference", lambda *_: "torch")
    for shape in ((rows, 4), (1, rows, 4)):
        assert linear(torch.zeros(shape, dtype=torch.bfloat16), weight) == ("kernel" if served else "torch")


def test_on_the_cpu_and_in_float64_torch_serves() -> None:
    inputs, weight, bias = torch.randn(2, 4).double(), torch.randn(3, 4).double(), torch.randn(3).double()
    assert torch.equal(linear_op(inputs, weight, bias), torch.nn.functional.linear(inputs, weight, bias))


@pytest.mark.parametrize(
    ("inputs", "weight", "message"),
    [
        (torch.zeros(9, 4), torch.zeros(2, 4), "9 rows"),
        (torch.zeros(0, 4), torch.zeros(2, 4), "0 rows"),
        (torch.zeros(1, 5), torch.zeros(2, 4), "5 columns"),
        (torch.zeros(4, 2).T, torch.zeros(2, 4), "contiguous"),
        (torch.zeros(2, 4), torch.zeros(4, 2).T, "contiguous"),
        (torch.zeros(2, 4), torch.zeros(2, 4), "float32"),
        (torch.zeros(2, 4).half(), torch.zeros(2, 4).bfloat16(), "bfloat16"),
    ],
)
def test_what_the_kernel_cannot_read_is_refused(inputs: torch.Tensor, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_triton(inputs, weight)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(3).half(), "2 numbers"),
        (torch.zeros(2), "float16"),
        (torch.zeros(4).half()[::2], "contiguous"),
    ],
)
def test_a_bias_that_does_not_fit_is_refused(bias: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_triton(torch.zeros(2, 4).half(), torch.zeros(2, 4).half(), bias)


def test_the_operator_takes_on_the_cpu_what_it_would_take_on_a_gpu() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        linear_op(torch.zeros(4, 2).T, torch.zeros(2, 4), None)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_a_kernel_waits_exactly_if_it_is_launched_early(
    monkeypatch: pytest.MonkeyPatch, rows: int, early: bool
) -> None:
    launches: list[dict[str, object]] = []

    class Recorder:
        def __getitem__(self, grid: object) -> object:
            return lambda *_, **options: launches.append(options)

    monkeypatch.setattr(module, "launches_early", lambda tensor: early)
    for name in ("_vectors_kernel", "_rows_kernel"):
        monkeypatch.setattr(module, name, Recorder())
    linear_triton(torch.zeros(rows, 64).half(), torch.zeros(8, 64).half())
    assert [(options["EARLY"], options["launch_pdl"]) for options in launches] == [(early, early)]


def test_the_operator_has_the_shape_that_torch_compile_believes() -> None:
    inputs, weight = torch.randn(1, 3, 4), torch.randn(5, 4)
    torch.library.opcheck(linear_op, (inputs, weight, torch.randn(5)))
    torch.library.opcheck(linear_op, (inputs, weight, None))
