"""Verification: a graph must compute what the eager step computes, on random inputs, over poisoned outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphexec.errors import CaptureError
from graphexec.plan import GraphKey

__all__ = ["check_written", "compare", "poison", "snapshot"]

_POISON_INT = -0x5EED


def snapshot(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of `tensors`, in stream order."""
    return [tensor.clone() for tensor in tensors]


def poison(tensors: Sequence[torch.Tensor]) -> None:
    """Overwrites outputs, so that one which the graph does not write cannot look right by chance."""
    for tensor in tensors:
        tensor.fill_(float("nan") if tensor.is_floating_point() else _POISON_INT)


def check_written(key: GraphKey, outputs: Sequence[torch.Tensor]) -> None:
    """Checks that the eager step has written its outputs: otherwise poison would be compared with poison.

    Raises:
        CaptureError: names the key and the output.
    """
    for index, output in enumerate(outputs):
        poisoned = output.isnan() if output.is_floating_point() else output == _POISON_INT
        if output.numel() and bool(poisoned.all()):
            raise CaptureError(f"The {key} leaves output {index} of those it names as observed unwritten.")


def compare(key: GraphKey, eager: Sequence[torch.Tensor], replayed: Sequence[torch.Tensor]) -> None:
    """Checks that a replay left the same values as the eager step: the kernels are the same, so are the bits.

    Raises:
        CaptureError: names the key and the tensor that differs most.
    """
    for index, (expected, actual) in enumerate(zip(eager, replayed, strict=True)):
        same = torch.eq(expected, actual) | (torch.ne(expected, expected) & torch.ne(actual, actual))
        wrong = int(same.logical_not().sum())
        if wrong:
            raise CaptureError(
                f"The graph of the {key} computes something else than the eager step: {wrong} of {expected.numel()} "
                f"elements of output {index} ({expected.dtype}, {tuple(expected.shape)}) differ. "
                "A host number that changes between steps was probably frozen into the graph."
            )
