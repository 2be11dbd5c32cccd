"""Verification: a graph must compute what the eager step computes, on random inputs, over poisoned outputs."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from graphexec.errors import CaptureError
from graphexec.plan import GraphKey, RecordLayout

__all__ = [
    "check_record",
    "check_written",
    "compare",
    "host_generators",
    "poison",
    "raise_if_drawn",
    "snapshot",
]

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


def check_record(
    key: GraphKey, before: torch.Tensor, ring: torch.Tensor, after: torch.Tensor, layout: RecordLayout
) -> None:
    """Checks that the eager step kept the contract of records.

    Args:
        key: the step.
        before, after: the counter, `[1]` int32, before and after the step.
        ring: `[R, words]` int32, poisoned before the step.
        layout: of a record.

    Raises:
        CaptureError: says which part of the contract was broken.
    """
    step, next_step = int(before), int(after)
    record = ring[step % len(ring)].tolist()
    ran = sum(count >= 0 for count in record[layout.HEADER : layout.HEADER + layout.max_slots])
    broken = {
        f"it must add one to the counter, which went from {step} to {next_step}": next_step != step + 1,
        "it must write its record into ring[counter % R]": _POISON_INT in record[: layout.base_words],
        f"word 0 of its record must be the counter, {step}, and is {record[0]}": record[0] != step,
        f"word 1 of its record, real_bsz, is {record[1]}, and {ran} slots ran by their num_tokens": record[1] != ran,
    }
    for what, is_broken in broken.items():
        if is_broken:
            raise CaptureError(f"The {key} breaks the contract of a step: {what}.")


def host_generators() -> dict[str, bytes]:
    """The states of the generators that everybody on the host draws from, by name."""
    numpy_state = np.random.get_state(legacy=False)
    return {
        "random": repr(random.getstate()).encode(),
        "numpy.random": repr(numpy_state).encode() + np.asarray(numpy_state["state"]["key"]).tobytes(),
        "torch's generator of the CPU": torch.get_rng_state().numpy().tobytes(),
    }


def raise_if_drawn(key: GraphKey, before: Mapping[str, bytes], after: Mapping[str, bytes]) -> None:
    """Explains a difference between a step and its graph, if generators of the host have changed meanwhile.

    Raises:
        CaptureError: names the key and the generators.
    """
    drawn = [name for name, state in before.items() if after[name] != state]
    if drawn:
        raise CaptureError(
            f"The {key} draws from {' and '.join(drawn)}, on the host. Its graph repeats for ever what its capture "
            "drew, so it cannot be verified by comparison with an eager step. Draw on the device, from a counter that "
            "the step keeps there; or, if the numbers are an eager break's, set verify=False."
        )


def compare(
    key: GraphKey, names: Sequence[str], eager: Sequence[torch.Tensor], replayed: Sequence[torch.Tensor]
) -> None:
    """Checks that a replay left the same values as the eager step: the kernels are the same, so are the bits.

    Raises:
        CaptureError: names the key and the tensor that differs.
    """
    for name, expected, actual in zip(names, eager, replayed, strict=True):
        same = torch.eq(expected, actual) | (torch.ne(expected, expected) & torch.ne(actual, actual))
        wrong = int(same.logical_not().sum())
        if wrong:
            raise CaptureError(
                f"The graph of the {key} computes something else than the eager step: {wrong} of {expected.numel()} "
                f"elements of {name} ({expected.dtype}, {tuple(expected.shape)}) differ. A host number that changes "
                "between steps was probably frozen into the graph; or state() leaves out a tensor that the step "
                "changes, or the step rebinds one instead of writing into it."
            )
