"""Measures what sizes cost: captures a few of each ladder, and times their steps with graphs and without.

It leaves nothing behind: the engine that serves the choice is another one.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from graphexec.backends import Progress, create_backend, ladders_of
from graphexec.backends.stepping import open_pipeline, preserved_state, rehearse, takes_chunks
from graphexec.capture.buckets import BucketTable, Ladders
from graphexec.capture.manifest import Manifest
from graphexec.config import BackendConfig, EngineConfig
from graphexec.engine.assemble import assemble
from graphexec.engine.program import DecoderProgram
from graphexec.engine.resolve import resolve
from graphexec.errors import ConfigError
from graphexec.models.layers import EXERCISED_BLOCKS
from graphexec.models.loader import load_config, model_folder
from graphexec.plan import GraphKey
from graphexec.runtime import Runtime, create_runtime

__all__ = ["Probe", "probe"]

_TIMED_STEPS = 5


@dataclass(frozen=True)
class Probe:
    """What was measured.

    Attributes:
        ladders: every size that may be chosen.
        max_rows: most rows of a step.
        manifest: of the graphs of some sizes: of each ladder the smallest, the one in the middle and the largest.
        eager_us: microseconds of the same steps without a graph.
        decode_alone: the graphs of the largest decode step where no prompt chunks have graphs; empty if nobody asked.
    """

    ladders: Ladders
    max_rows: int
    manifest: Manifest
    eager_us: dict[GraphKey, float]
    decode_alone: Manifest


def probe(config: EngineConfig, progress: Progress | None = None) -> Probe:
    """Loads the model of `config`, measures, and frees everything.

    Raises:
        ConfigError: the configuration captures nothing, or there is no memory for its largest steps.
    """
    parts = assemble(_without_graphs(config), None)
    parts.backend.close()
    runtime = create_runtime(parts.resolved.device)
    try:
        found = _measure(config.backend, parts.program, runtime, progress)
    finally:
        del parts
        gc.collect()  # the model and its cache are in circles
        runtime.trim()
    return found


def _without_graphs(config: EngineConfig) -> EngineConfig:
    """The same model and program, with as small a cache as its largest step needs."""
    resolved = resolve(config, load_config(model_folder(config.model)))
    rows = resolved.max_num_batched_tokens + config.max_num_seqs
    blocks = max(EXERCISED_BLOCKS, 1 + rows // config.kv_block_size + 2 * config.max_num_seqs)
    backend = config.backend.model_copy(update={"name": "eager"})
    return config.model_copy(update={"backend": backend, "num_kv_blocks": blocks, "expected_manifest": None})


def _measure(config: BackendConfig, program: DecoderProgram, runtime: Runtime, progress: Progress | None) -> Probe:
    ladders = ladders_of(config, program)
    some = {
        "capture_sizes": _typical(ladders.slots),
        "prefill_sizes": _typical(ladders.rows),
        "verify": False,
        "strict": False,
        "measure": True,
    }
    trial = config.model_copy(update=some)
    manifest = _capture(trial, program, runtime, progress)
    if not manifest.graphs:
        raise ConfigError(
            f"There is nothing to choose: backend.name={config.name!r} captures nothing with decode={config.decode!r} "
            f"and prefill={config.prefill!r}."
        )
    alone = Manifest.of(runtime.device, [], {})
    if takes_chunks(program) and config.prefill != "off" and config.decode != "off":
        largest = {"prefill": "off", "capture_sizes": ladders.slots.sizes[-1:], "measure": False}
        alone = _capture(trial.model_copy(update=largest), program, runtime, None)
    eager_us = _time_eagerly(trial, program, runtime, [graph.key for graph in manifest.graphs])
    return Probe(ladders, program.max_rows, manifest, eager_us, alone)


def _typical(table: BucketTable) -> tuple[int, ...]:
    sizes = table.sizes
    return tuple(dict.fromkeys((sizes[0], sizes[len(sizes) // 2], sizes[-1])))


def _capture(config: BackendConfig, program: DecoderProgram, runtime: Runtime, progress: Progress | None) -> Manifest:
    backend = create_backend(config, runtime)
    with runtime.activated():
        try:
            backend.prepare(program)
            manifest = backend.warmup(progress)
        finally:
            backend.close()
        runtime.trim()
    if manifest.missing:
        raise ConfigError(
            f"There is no memory to capture the {next(iter(manifest.missing))}. Lower max_num_batched_tokens or "
            "max_num_seqs."
        )
    return manifest


def _time_eagerly(
    config: BackendConfig, program: DecoderProgram, runtime: Runtime, keys: Sequence[GraphKey]
) -> dict[GraphKey, float]:
    """Microseconds from the first call of a step until the device has done it; medians."""
    pipeline = open_pipeline(config, runtime, program)
    found = {}
    try:
        with runtime.activated(), preserved_state(program, pipeline):
            for key in keys:
                times = []
                for _ in range(1 + _TIMED_STEPS):
                    generator = torch.Generator().manual_seed(key.rows)
                    pipeline.compute.run(partial(program.exercise, key, generator))
                    pipeline.synchronize()
                    started = time.perf_counter()
                    pipeline.compute.run(partial(rehearse, program, key))
                    pipeline.synchronize()
                    times.append(time.perf_counter() - started)
                found[key] = median(times[1:]) * 1e6  # the first one may compile
    finally:
        pipeline.close()
    return found
