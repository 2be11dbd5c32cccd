"""What backends share: the pipeline for a program, eager launches, and warm-up that leaves no trace in the slots."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from graphexec.capture.buckets import BucketTable, default_ladder, row_ladder
from graphexec.config import BackendConfig
from graphexec.pipeline import Pipeline
from graphexec.plan import GraphKey, StepProgram
from graphexec.rings import StagingRing
from graphexec.runtime import Runtime

__all__ = [
    "EagerLauncher",
    "Uploads",
    "bucket_sizes",
    "open_pipeline",
    "preserved_state",
    "run_once",
    "warmup_chunk_keys",
    "warmup_keys",
]

_log = logging.getLogger(__name__)

_WARMUP_SEED = 20


def bucket_sizes(config: BackendConfig, max_slots: int) -> BucketTable:
    """The configured capture sizes, or the default ladder."""
    sizes = default_ladder(max_slots) if config.capture_sizes is None else config.capture_sizes
    table = BucketTable.of(sizes, max_slots)
    if table.sizes[-1] < max_slots:
        _log.warning("capture_sizes ends at %d: larger batches, up to %d, run eagerly.", table.sizes[-1], max_slots)
    return table


def open_pipeline(config: BackendConfig, runtime: Runtime, program: StepProgram) -> Pipeline:
    """A pipeline with the ladders of `config` for `program`.

    Raises:
        ConfigError: a size does not fit the program.
    """
    sizes = row_ladder(program.max_rows) if config.prefill_sizes is None else config.prefill_sizes
    rows = BucketTable.of(sizes, program.max_rows, "prefill_sizes")
    return Pipeline(runtime, program, bucket_sizes(config, program.max_slots), rows, config.step_timeout_s)


class Uploads:
    """What brings a staging slot to the device and applies it.

    Refers to nothing of the host's: work in the queue of a stream must not be the last to hold a pipeline.
    """

    def __init__(self, program: StepProgram, staging: StagingRing) -> None:
        self._program = program
        self._staging = staging

    def apply(self, staging_slot: int) -> None:
        """Runs on the compute stream."""
        staging = self._staging
        staging.device.copy_(staging.pinned(staging_slot), non_blocking=True)
        self._program.apply(staging.device)


class EagerLauncher:
    """Enqueues steps and uploads as ordinary calls on the compute stream."""

    def __init__(self, program: StepProgram, pipeline: Pipeline) -> None:
        self.program = program
        self.pipeline = pipeline
        self.uploads = Uploads(program, pipeline.staging)

    def upload(self, staging_slot: int) -> Callable[[], None]:
        return partial(self.pipeline.compute.run, partial(self.uploads.apply, staging_slot))

    def step(self, key: GraphKey) -> Callable[[], None]:
        return partial(self.pipeline.compute.run, partial(self.program.step, key))


def warmup_keys(program: StepProgram, pipeline: Pipeline) -> list[GraphKey]:
    """Keys of the decode steps that a configuration can reach, the largest first so that the pool fits them all."""
    return [
        GraphKey("decode", size * program.rows_per_slot, size, variant)
        for size in reversed(pipeline.buckets.sizes)
        for variant in program.variants
    ]


def warmup_chunk_keys(program: StepProgram, pipeline: Pipeline) -> list[GraphKey]:
    """Keys of steps with prompt chunks, from the largest to the smallest, that between them compile what such need."""
    if program.max_rows <= program.max_slots * program.rows_per_slot:
        return []  # the program takes no chunks
    sizes = pipeline.rows.sizes
    chosen = sorted({sizes[-1], sizes[len(sizes) // 2], sizes[0]}, reverse=True)
    return [GraphKey("mixed", size, min(pipeline.buckets.sizes[-1], size), program.variants[0]) for size in chosen]


def run_once(program: StepProgram, pipeline: Pipeline, key: GraphKey) -> None:
    """Runs one eager step of this shape over random valid inputs and waits for it."""
    generator = torch.Generator().manual_seed(_WARMUP_SEED + key.rows)
    pipeline.compute.run(lambda: program.exercise(key, generator))
    pipeline.compute.run(lambda: program.step(key))
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
