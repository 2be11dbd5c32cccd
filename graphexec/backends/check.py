"""Tells an author without a GPU whether a program's steps can be captured."""

from __future__ import annotations

import torch

from graphexec.backends.stepping import (
    captured_step,
    cuts_of,
    keys_of,
    open_pipeline,
    rehearsal,
    run_step,
    smallest_keys,
)
from graphexec.capture.lint import capture_lint
from graphexec.config import BackendConfig
from graphexec.errors import CaptureError
from graphexec.plan import GraphKey, StepProgram
from graphexec.runtime import Cuts, create_runtime

__all__ = ["check_capturable"]


def check_capturable(program: StepProgram, config: BackendConfig | None = None) -> list[GraphKey]:
    """Runs small steps of a program on the CPU, and refuses what a capture on CUDA would refuse.

    That is: reading values on the host (`.item()`, `.tolist()`, a condition on a tensor), results whose size depends on
    values (`nonzero`, indexing with a mask), random numbers of torch's generators, and a tensor of `state()` that the
    step replaces instead of writing into it. Two steps of every phase and variant run; the slots are left as they come.

    Args:
        program: on the CPU, in no backend's hands.
        config: for the sizes of the steps; None for the defaults.

    Returns:
        The steps that ran.

    Raises:
        CaptureError: names the step, the operation and the line.
    """
    config, runtime = config or BackendConfig(), create_runtime(torch.device("cpu"))
    pipeline = open_pipeline(config, runtime, program)
    try:
        keys = smallest_keys(keys_of(config, program, pipeline.ladders))
        with runtime.activated():
            for key in keys:
                program.exercise(key, torch.Generator().manual_seed(0))
                _check(program, key, cuts_of(config, key))
    finally:
        pipeline.close()
    return keys


def _check(program: StepProgram, key: GraphKey, cuts: Cuts) -> None:
    before = [(tensor.data_ptr(), tensor.shape) for tensor in program.state()]
    step = rehearsal(program, key)
    program.before_launch(key, step.plan)  # which no graph holds
    try:
        with capture_lint(cuts, step):
            run_step(program, captured_step(program, key))
    except CaptureError as refusal:
        raise CaptureError(f"The {key} cannot be captured: {refusal}") from None
    after = [(tensor.data_ptr(), tensor.shape) for tensor in program.state()]
    for index, (was, now) in enumerate(zip(before, after, strict=True)):
        if was != now:
            raise CaptureError(
                f"The {key} cannot be captured: it replaces state()[{index}] by another tensor. A replay writes where "
                "the capture wrote; use copy_ or another operation in place."
            )
