"""What backends share: the pipeline for a program, eager launches, and warm-up that leaves no trace in the slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from graphexec.capture.buckets import BucketTable, Ladders, chunk_slot_ladder, default_ladder, row_ladder
from graphexec.config import BackendConfig
from graphexec.errors import ConfigError
from graphexec.pipeline import Pipeline
from graphexec.plan import GraphKey, StepPlan, StepProgram
from graphexec.runtime import Cuts, RunningStep, Runtime, running
from graphexec.runtime.breaks import CapturedStep

__all__ = [
    "EagerLauncher",
    "captured_step",
    "cuts_of",
    "keys_of",
    "ladders_of",
    "open_pipeline",
    "preserved_state",
    "rehearsal",
    "rehearse",
    "run_once",
    "run_step",
    "smallest_keys",
    "takes_chunks",
    "typical_keys",
]

_WARMUP_SEED = 20
_REQUIRED = ("max_slots", "max_rows", "variants", "record", "staging_words")
"""Attributes of a program without defaults."""


def ladders_of(config: BackendConfig, program: StepProgram) -> Ladders:
    """The configured sizes, or the default ladders, for `program`.

    Raises:
        ConfigError: a size does not fit the program.
    """
    slots, rows = program.max_slots, program.max_rows

    def table(
        sizes: Sequence[int] | None, default: Callable[[int], tuple[int, ...]], limit: int, name: str
    ) -> BucketTable:
        return BucketTable.of(default(limit) if sizes is None else sizes, limit, name)

    return Ladders(
        table(config.capture_sizes, default_ladder, slots, "capture_sizes"),
        table(config.prefill_sizes, row_ladder, rows, "prefill_sizes"),
        table(config.prefill_slots, chunk_slot_ladder, slots, "prefill_slots"),
    )


def open_pipeline(config: BackendConfig, runtime: Runtime, program: StepProgram) -> Pipeline:
    """A pipeline with the ladders of `config` for `program`.

    Raises:
        ConfigError: a size does not fit the program, or the program lacks what it must have.
    """
    _check_program(program)
    return Pipeline(runtime, program, ladders_of(config, program), config.step_timeout_s)


def _check_program(program: StepProgram) -> None:
    missing = [name for name in _REQUIRED if not hasattr(program, name)]
    if missing:
        raise ConfigError(f"{type(program).__name__} has no {', '.join(missing)}; see StepProgram.")
    least = program.max_slots * program.rows_per_slot
    if program.max_rows < least:
        raise ConfigError(
            f"max_rows={program.max_rows} of the program is less than max_slots * rows_per_slot = {least}."
        )
    if program.record.max_slots != program.max_slots:
        raise ConfigError(
            f"The program's record is made for {program.record.max_slots} slots, and max_slots is {program.max_slots}."
        )


class EagerLauncher:
    """Enqueues steps and deltas as ordinary calls on the compute stream."""

    def __init__(self, program: StepProgram, pipeline: Pipeline) -> None:
        self.program = program
        self.pipeline = pipeline

    def apply(self, staging_slot: int) -> Callable[[], None]:
        return partial(self.pipeline.compute.run, self.application(staging_slot))

    def application(self, staging_slot: int) -> Callable[[], None]:
        """What applies the delta of a staging slot on the compute stream.

        Refers to nothing of the host's: work in the queue of a stream must not be the last to hold a pipeline.
        """
        return partial(self.program.apply, self.pipeline.staging.on_device(staging_slot))

    def step(self, key: GraphKey, plan: StepPlan) -> Callable[[], None]:
        step = RunningStep(key, plan, self.program.host)
        return partial(self.pipeline.compute.run, partial(run_step, self.program, step))


def keys_of(config: BackendConfig, program: StepProgram, ladders: Ladders) -> list[GraphKey]:
    """Keys of all steps on the ladders, the largest first so that the pool fits them all: chunks, then decode."""
    keys = []
    if config.prefill != "off" and takes_chunks(program):
        variants = dict.fromkeys(program.mixed_variants.get(each, each) for each in program.variants)
        keys += [GraphKey(*shape, variant) for shape in ladders.chunk_shapes() for variant in variants]
    if config.decode != "off":
        keys += [
            GraphKey("decode", size * program.rows_per_slot, size, variant)
            for size in reversed(ladders.slots.sizes)
            for variant in program.variants
        ]
    return keys


def cuts_of(config: BackendConfig, key: GraphKey) -> Cuts:
    """At which eager breaks the graph of a step ends a piece."""
    mode = config.prefill if key.has_chunks else config.decode
    return {None: Cuts.MARKED, "piecewise": Cuts.ALL}.get(mode, Cuts.NONE)


def takes_chunks(program: StepProgram) -> bool:
    """Whether steps of the program may hold prompt chunks."""
    return program.max_rows > program.max_slots * program.rows_per_slot


def typical_keys(keys: Sequence[GraphKey]) -> list[GraphKey]:
    """Of each phase and variant the largest, the middle and the smallest: between them they compile what all need."""
    return [
        key
        for group in _by_phase_and_variant(keys)
        for key in dict.fromkeys((group[0], group[len(group) // 2], group[-1]))
    ]


def smallest_keys(keys: Sequence[GraphKey]) -> list[GraphKey]:
    """Of each phase and variant the two smallest, one of which may have a single row."""
    return [key for group in _by_phase_and_variant(keys) for key in group[-2:]]


def _by_phase_and_variant(keys: Sequence[GraphKey]) -> list[list[GraphKey]]:
    groups: dict[tuple[str, str], list[GraphKey]] = {}
    for key in keys:
        groups.setdefault((key.phase, key.variant), []).append(key)
    return list(groups.values())


def rehearsal(program: StepProgram, key: GraphKey) -> RunningStep:
    """What eager breaks are told where no request is served."""
    return RunningStep(key, StepPlan(key.variant), program.host)


def captured_step(program: StepProgram, key: GraphKey) -> CapturedStep:
    """What a step is told that is being captured."""
    return CapturedStep(key, StepPlan(key.variant), program.host)


def rehearse(program: StepProgram, key: GraphKey) -> None:
    """Runs one step of this shape as ordinary calls, over the slots as they are."""
    step = rehearsal(program, key)
    program.before_launch(key, step.plan)
    run_step(program, step)


def run_step(program: StepProgram, step: RunningStep) -> None:
    """Runs a step as ordinary calls."""
    with running(step):
        program.step(step.key)


def run_once(program: StepProgram, pipeline: Pipeline, key: GraphKey) -> None:
    """Runs one eager step of this shape over random valid inputs and waits for it."""
    generator = torch.Generator().manual_seed(_WARMUP_SEED + key.rows)
    pipeline.compute.run(lambda: program.exercise(key, generator))
    pipeline.compute.run(lambda: rehearse(program, key))
    pipeline.synchronize()


@contextmanager
def preserved_state(program: StepProgram, pipeline: Pipeline) -> Iterator[None]:
    """Restores slots, step counter and records when the block ends, however it ends."""
    pipeline.synchronize()
    tensors = [*program.state(), pipeline.io.ring, pipeline.io.counter]
    saved: list[torch.Tensor] = []
    pipeline.compute.run(lambda: saved.extend(tensor.clone() for tensor in tensors))
    pipeline.synchronize()
    try:
        yield
    finally:
        pipeline.compute.run(lambda: _restore(tensors, saved))
        pipeline.synchronize()


def _restore(tensors: list[torch.Tensor], saved: list[torch.Tensor]) -> None:
    for tensor, value in zip(tensors, saved, strict=True):
        tensor.copy_(value)
