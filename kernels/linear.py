"""A linear layer for few rows: a product that takes about as long as its weights take to arrive.

A decode step of a small batch is a chain of such products, each of which waits for the one before it. So these kernels
fetch their first weights before they wait: nothing writes those, and they arrive while the predecessor still computes.
One or two rows are multiplied without tensor cores, which would mostly multiply padding. Many rows are torch's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from graphexec.kernels.lang import launches_early, tl, triton, use_triton, wait_for_predecessor

__all__ = ["LinearTile", "choose_linear_tile", "linear", "linear_op", "linear_reference", "linear_triton", "serves"]

_MOST_ROWS = 8
_MOST_VECTORS = 2
_MOST_OUTPUTS = 16384  # with more, weights arrive for so long that torch's product wins from 3 rows on


class LinearTile(NamedTuple):
    """How a kernel is launched: a thread holds `tile_n * warp_k / 32` weights, and as many more are on their way.

    Attributes:
        tile_n: outputs of a program.
        warp_k: inputs that each warp takes at a time.
        num_warps: warps of a program.
    """

    tile_n: int
    warp_k: int
    num_warps: int


def choose_linear_tile(rows: int, out_features: int, in_features: int) -> LinearTile:
    """About the fastest for the products of 0.6b and 8b on an H200; bench/linear_sweep.py measures them.

    The fewer programs there are for its 132 multiprocessors, the more a program fetches before it waits.
    """
    if rows <= _MOST_VECTORS:
        half = triton.next_power_of_2(in_features) // 2
        return LinearTile(4, 256, min(max(half // 256, 1), 8 if out_features <= 2048 else 4))
    if out_features > 5120:
        return LinearTile(16, 128, 4)
    return LinearTile(16, 256, 4 if out_features > 2048 else 8)


def serves(rows: int, weight: torch.Tensor) -> bool:
    """Whether the kernels, rather than torch, multiply so many rows with a weight `[N, K]` of this kind."""
    few = 0 < rows <= (_MOST_ROWS if weight.shape[0] <= _MOST_OUTPUTS else _MOST_VECTORS)
    return few and use_triton(weight) and weight.element_size() == 2


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`inputs @ weight.T + bias`; where the kernels serve, summed in float32 and rounded once.

    Args:
        inputs: `[..., K]`, contiguous.
        weight: `[N, K]`, contiguous, of the inputs' dtype. No launch of a step may write it: it is read before the
            predecessor of the launch has ended.
        bias: `[N]` of the inputs' dtype, contiguous, or None.

    Returns:
        `[..., N]` in the dtype and on the device of `inputs`.

    Raises:
        ValueError: a tensor is not contiguous; on the CPU too, although torch would take it.
    """
    _check_contiguous(inputs, weight, bias)
    rows = inputs.numel() // inputs.shape[-1]
    serve = linear_triton if serves(rows, weight) else linear_reference
    return serve(inputs, weight, bias)


def linear_reference(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear` by torch, for any float dtype and device."""
    return functional.linear(inputs, weight, bias)


def linear_triton(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, tile: LinearTile | None = None
) -> torch.Tensor:
    """`linear` as a Triton kernel, for 1 to 8 rows in bfloat16 or float16.

    Raises:
        ValueError: there are other numbers of rows, a tensor is not contiguous, or sizes or types do not fit.
    """
    out_features, in_features = weight.shape
    rows = inputs.numel() // inputs.shape[-1]
    if not 0 < rows <= _MOST_ROWS:
        raise ValueError(f"There are {rows} rows; the kernel takes 1 to {_MOST_ROWS}.")
    if inputs.shape[-1] != in_features:
        raise ValueError(f"The inputs have {inputs.shape[-1]} columns, the weight {in_features}.")
    if bias is not None and (bias.shape != (out_features,) or bias.dtype != inputs.dtype):
        raise ValueError(f"The bias must be {out_features} numbers of {inputs.dtype}.")
    _check_contiguous(inputs, weight, bias)
    if inputs.element_size() != 2 or weight.dtype != inputs.dtype:
        raise ValueError(f"The kernel multiplies 16-bit numbers of one type, not {inputs.dtype} with {weight.dtype}.")
    tile = tile or choose_linear_tile(rows, out_features, in_features)
    out = torch.empty((*inputs.shape[:-1], out_features), dtype=inputs.dtype, device=inputs.device)
    early = launches_early(inputs)
    kernel = _vectors_kernel if rows <= _MOST_VECTORS else _rows_kernel
    kernel[(triton.cdiv(out_features, tile.tile_n),)](
        inputs,
        weight,
        bias,
        out,
        rows,
        out_features,
        in_features,
        ROWS_PADDED=rows if rows <= _MOST_VECTORS else _MOST_ROWS,
        TILE_N=tile.tile_n,
        WARP_K=tile.warp_k,
        WARPS=tile.num_warps,
        HAS_BIAS=bias is not None,
        EARLY=early,
        num_warps=tile.num_warps,
        num_stages=1,  # they fetch ahead by themselves
        launch_pdl=early,
    )
    return out


def _check_contiguous(*tensors: torch.Tensor | None) -> None:
    if not all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        raise ValueError("Inputs, weight and bias must be contiguous: kernels derive their strides from their shapes.")


@triton.jit
def _vectors_kernel(
    inputs,  # [rows, K]
    weight,  # [N, K]
    bias,  # [N], or None without HAS_BIAS
    out,  # [rows, N]
    rows,
    N,
    K,
    ROWS_PADDED: tl.constexpr,  # 1 or 2
    TILE_N: tl.constexpr,
    WARP_K: tl.constexpr,
    WARPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: TILE_N outputs of every row. Weights come a tile ahead, the first ones before the wait."""
    STEP: tl.constexpr = WARPS * WARP_K
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, STEP)
    weights_at = weight + n[:, None].to(tl.int64) * K + k[None, :]
    is_output = (n < N)[:, None]
    coming = tl.load(weights_at, mask=is_output & (k < K)[None, :], other=0.0)
    if EARLY:
        wait_for_predecessor()

    sums = tl.zeros([TILE_N, STEP // 8, ROWS_PADDED], tl.float32)  # one for each 8 neighbouring inputs
    for first in range(0, K, STEP):
        weights = coming.to(tl.float32)
        beyond = first + STEP + k
        coming = tl.load(weights_at + (first + STEP), mask=is_output & (beyond < K)[None, :], other=0.0)
        is_input = first + k < K
        added = _add_neighbours(weights, tl.load(inputs + first + k, mask=is_input, other=0.0))
        if ROWS_PADDED == 2:
            second = _add_neighbours(weights, tl.load(inputs + K + first + k, mask=is_input, other=0.0))
            sums += tl.join(added, second)
        else:
            sums += added[:, :, None]

    total = tl.sum(sums, axis=1)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    row = tl.arange(0, ROWS_PADDED)[None, :]
    tl.store(out + row * N + n[:, None], total.to(out.dtype.element_ty), mask=is_output & (row < rows))


@triton.jit
def _add_neighbours(weights, values):
    """`[TILE_N, STEP]` times `[STEP]`, summed over each 8 inputs; one thread loads them if K is a multiple of 8."""
    products = weights * values.to(tl.float32)[None, :]
    return tl.sum(tl.reshape(products, [weights.shape[0], weights.shape[1] // 8, 8]), axis=2)


@triton.jit
def _rows_kernel(
    inputs,  # [rows, K]
    weight,  # [N, K]
    bias,  # [N], or None without HAS_BIAS
    out,  # [rows, N]
    rows,
    N,
    K,
    ROWS_PADDED: tl.constexpr,
    TILE_N: tl.constexpr,
    WARP_K: tl.constexpr,
    WARPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: TILE_N outputs of every row, on tensor cores, each warp over inputs of its own."""
    STEP: tl.constexpr = WARPS * WARP_K
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    row = tl.arange(0, ROWS_PADDED)
    k = (tl.arange(0, WARPS) * WARP_K)[:, None] + tl.arange(0, WARP_K)[None, :]
    weights_at = weight + n[None, :, None].to(tl.int64) * K + k[:, None, :]  # [WARPS, TILE_N, WARP_K]
    inputs_at = inputs + row[None, None, :] * K + k[:, :, None]  # [WARPS, WARP_K, ROWS_PADDED]
    is_output = (n < N)[None, :, None]
    is_row = (row < rows)[None, None, :]
    coming = tl.load(weights_at, mask=is_output & (k < K)[:, None, :], other=0.0)
    if EARLY:
        wait_for_predecessor()

    sums = tl.zeros([WARPS, TILE_N, ROWS_PADDED], tl.float32)
    for first in range(0, K, STEP):
        weights = coming
        values = tl.load(inputs_at + first, mask=is_row & (first + k < K)[:, :, None], other=0.0)
        beyond = first + STEP + k
        coming = tl.load(weights_at + (first + STEP), mask=is_output & (beyond < K)[:, None, :], other=0.0)
        sums = tl.dot(weights, values, sums)

    total = tl.sum(sums, axis=0)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    out_at = out + row[None, :] * N + n[:, None]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=(n < N)[:, None] & (row < rows)[None, :])


def _linear_shape(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return inputs.new_empty(*inputs.shape[:-1], weight.shape[0])


_LIBRARY = torch.library.Library("graphexec", "FRAGMENT")
_LIBRARY.define("linear(Tensor inputs, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.impl("linear", linear, "CompositeExplicitAutograd")
torch.library.register_fake("graphexec::linear", _linear_shape, lib=_LIBRARY)

linear_op = torch.ops.graphexec.linear.default
"""`linear` as an operator that torch.compile does not look into: how many rows there are must cost no compilation."""
