"""The frozen-number check: captures a step under other metadata, and compares what its kernels were given."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from graphexec.backends.base import Progress
from graphexec.backends.stepping import captured_step, cuts_of, keys_of, open_pipeline, preserved_state, rehearse
from graphexec.capture.frozen import Captures, FrozenCheck, compare_captures, confirmed
from graphexec.capture.graph_set import GraphSet, frozen_garbage_collection
from graphexec.config import BackendConfig
from graphexec.errors import ConfigError
from graphexec.pipeline import Pipeline
from graphexec.plan import GraphKey, StepProgram
from graphexec.runtime import Cuts, Runtime, running
from graphexec.runtime.arguments import NodeArguments

__all__ = ["capture_twice", "check_frozen"]

_FIRST, _SECOND = 101, 202
"""Seeds of the metadata."""


def check_frozen(
    program: StepProgram,
    config: BackendConfig,
    runtime: Runtime,
    keys: Sequence[GraphKey] | None = None,
    progress: Progress | None = None,
) -> list[FrozenCheck]:
    """Looks for numbers of the host that a graph would repeat for ever though they change between steps.

    Each step is captured four times, under two sets of metadata that `exercise` makes, each graph freed before the next
    is captured. Names, sizes and arguments of the nodes must then be the same, addresses and padding apart; what seems
    to be a leak must show again in four more captures. It takes
    several times as long as the warm-up; the slots are left as they were.

    Args:
        program: in no backend's hands: a backend that had it must be closed.
        config: for the sizes of the steps.
        runtime: of a CUDA device.
        keys: the steps to check; None for all that `config` asks for.
        progress: called after each step.

    Returns:
        A result for each step. A leak raises nothing here: see FrozenCheck.raise_for_leaks.

    Raises:
        ConfigError: the runtime's device has no graphs whose nodes could be read.
        CaptureError: a step cannot be captured at all.
    """
    if runtime.device.type == "cpu":
        raise ConfigError(
            "The frozen-number check reads captured graphs, and needs CUDA. On the CPU, check_capturable finds what a "
            "capture would refuse."
        )
    pipeline = open_pipeline(config, runtime, program)
    try:
        keys = keys_of(config, program, pipeline.ladders) if keys is None else keys
        checks = []
        with runtime.activated(), preserved_state(program, pipeline), frozen_garbage_collection():
            for index, key in enumerate(keys):
                cuts = cuts_of(config, key)
                found = compare_captures(key, *capture_twice(program, pipeline, key, cuts))
                if found.leaks:
                    found = confirmed(found, compare_captures(key, *capture_twice(program, pipeline, key, cuts)))
                checks.append(found)
                if progress is not None:
                    progress(index + 1, len(keys), key)
        return checks
    finally:
        pipeline.close()


def capture_twice(
    program: StepProgram, pipeline: Pipeline, key: GraphKey, cuts: Cuts = Cuts.NONE
) -> tuple[Captures, Captures]:
    """Captures a step twice under each of two sets of metadata, which its slots then hold.

    Raises:
        CaptureError: the step cannot be captured.
    """
    for seed in (_FIRST, _SECOND):  # compiles and loads what either launches, outside of the capture
        _exercise(program, pipeline, key, seed)
        pipeline.compute.run(partial(rehearse, program, key))
        pipeline.synchronize()
    # In this order what changes with time, or with every other capture, differs between two captures of one seed.
    first = _capture(program, pipeline, key, cuts, _FIRST)
    second = _capture(program, pipeline, key, cuts, _SECOND)
    second_again = _capture(program, pipeline, key, cuts, _SECOND)
    first_again = _capture(program, pipeline, key, cuts, _FIRST)
    return (first, first_again), (second, second_again)


def _exercise(program: StepProgram, pipeline: Pipeline, key: GraphKey, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed + key.rows)
    pipeline.compute.run(lambda: program.exercise(key, generator))
    pipeline.synchronize()


def _capture(program: StepProgram, pipeline: Pipeline, key: GraphKey, cuts: Cuts, seed: int) -> list[NodeArguments]:
    """What the nodes of one capture were given; its graph and its pool are gone afterwards."""
    _exercise(program, pipeline, key, seed)
    pipeline.runtime.trim()  # the pool begins where the last one began: not every address may be known as one
    graphs = GraphSet(pipeline.runtime, pipeline.compute)
    try:
        with running(captured_step(program, key)):
            return graphs.capture(key, partial(program.step, key), cuts).arguments()
    finally:
        pipeline.synchronize()  # the graph goes to the device in stream order, though nothing launches it
        graphs.close()
