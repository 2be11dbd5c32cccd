"""The CUDA-graph backend: which graphs to capture, with which checks."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from graphexec.backends.base import BackendStats, ExecutionBackend, Progress
from graphexec.backends.graph_launcher import GraphLauncher
from graphexec.backends.stepping import (
    keys_of,
    open_pipeline,
    preserved_state,
    smallest_keys,
    takes_chunks,
    typical_keys,
)
from graphexec.backends.warmer import Warmer
from graphexec.capture.buckets import Ladders
from graphexec.capture.graph_set import GraphSet, frozen_garbage_collection
from graphexec.capture.manifest import CapturedGraph, Manifest
from graphexec.config import BackendConfig, CaptureMode
from graphexec.errors import CaptureError, ConfigError
from graphexec.pipeline import Pipeline
from graphexec.plan import GraphKey, StepHandle, StepPlan, StepProgram
from graphexec.runtime import Runtime

__all__ = ["CudaGraphBackend"]

_log = logging.getLogger(__name__)


class CudaGraphBackend(ExecutionBackend):
    """Replays one graph for a step, with prompt chunks or without; what runs eagerly is counted with its reason."""

    def __init__(self, config: BackendConfig, runtime: Runtime) -> None:
        self._config = config
        self._runtime = runtime
        self._is_cuda = runtime.device.type == "cuda"
        self._pipeline: Pipeline | None = None
        self._graphs: GraphSet | None = None

    def prepare(self, program: StepProgram) -> None:
        self.close()  # what an earlier program had
        self._program = program
        self._pipeline = open_pipeline(self._config, self._runtime, program)
        self._graphs = GraphSet(self._runtime, self._pipeline.compute)
        self._pipeline.device_side.own(self._graphs)
        self._report_gaps(program, self._pipeline.ladders)
        every = keys_of(self._config, program, self._pipeline.ladders)
        common = self._config.variants or program.common_variants or program.variants
        unknown = set(common) - set(program.variants)
        if unknown:
            raise ConfigError(f"variants has {sorted(unknown)}; the program has {', '.join(program.variants)}.")
        served = {*common, *(program.mixed_variants.get(each, each) for each in common)}
        self._keys = [key for key in every if key.variant in served and (key.has_chunks or key.variant in common)]
        later = frozenset(every).difference(self._keys)
        self._launcher = GraphLauncher(program, self._pipeline, self._graphs, self._config, later)

    def warmup(self, progress: Progress | None = None) -> Manifest:
        pipeline, graphs = self._prepared()
        keys = self._keys
        runs, verified = self._keys_to_run(), self._keys_to_verify()
        warmer = Warmer(self._program, pipeline, graphs, self._config)
        captured: list[CapturedGraph] = []
        missing: dict[GraphKey, str] = {}
        with self._runtime.activated(), preserved_state(self._program, pipeline), frozen_garbage_collection():
            for index, key in enumerate(keys):
                try:
                    captured.append(warmer.capture(key, key in runs, key in verified))
                except CaptureError as failure:
                    if not isinstance(failure.__cause__, torch.OutOfMemoryError):
                        raise
                    missing[key] = "out of memory"
                    _log.warning("No graph for the %s: out of memory. It will run eagerly.", key)
                if progress is not None:
                    progress(index + 1, len(keys), key)
            self._launcher.capture_applications()
        if missing and self._config.strict:
            raise CaptureError(f"strict=true, and there is no memory for the {next(iter(missing))}.")
        if not self._launcher.may_capture:
            graphs.seal()
        return Manifest.of(self._runtime.device, captured, missing)

    def submit(self, plan: StepPlan) -> StepHandle:
        pipeline, _ = self._prepared()
        return pipeline.submit(plan, self._launcher)

    @property
    def wait_us(self) -> float:
        return 0.0 if self._pipeline is None else self._pipeline.wait_s * 1e6

    def stats(self) -> BackendStats:
        pipeline, graphs = self._prepared()
        modes: dict[str, CaptureMode] = {
            "decode": self._config.decode or graphs.mode(has_chunks=False),
            "prefill": self._config.prefill or graphs.mode(has_chunks=True),
        }
        return BackendStats.of(pipeline, self._launcher.replays, modes)

    def enqueue(self, work: Callable[[], None]) -> None:
        pipeline, _ = self._prepared()
        pipeline.enqueue(work)

    def close(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()

    def _report_gaps(self, program: StepProgram, ladders: Ladders) -> None:
        """Warns of ladders that do not reach the largest step.

        Raises:
            ConfigError: strict=true, which refuses them.
        """
        config = self._config
        reach = []
        if config.decode != "off":
            reach.append(("capture_sizes", ladders.slots, program.max_slots))
        if config.prefill != "off" and takes_chunks(program):
            reach.append(("prefill_sizes", ladders.rows, program.max_rows))
            reach.append(("prefill_slots", ladders.chunk_slots, program.max_slots))
        for name, table, needed in reach:
            if table.sizes[-1] >= needed:
                continue
            gap = f"{name} ends at {table.sizes[-1]}: larger steps, up to {needed}, "
            if config.strict and not config.lazy_capture:
                raise ConfigError(
                    gap + "have no graph, and strict=true refuses that. Add the size, or set strict=false."
                )
            _log.warning(gap + ("are captured on first use." if config.lazy_capture else "run eagerly."))

    def _prepared(self) -> tuple[Pipeline, GraphSet]:
        assert self._pipeline is not None, "prepare() comes first"
        assert self._graphs is not None
        return self._pipeline, self._graphs

    def _keys_to_run(self) -> set[GraphKey]:
        """Which steps the warm-up runs once: on CUDA, before their capture, those that may launch kernels of their own.

        What is launched follows from a phase's rows, and from its slots and variant. On the CPU the smallest ones are
        enough for torch.compile.
        """
        if not self._is_cuda:
            return set(smallest_keys(self._keys))
        chosen: set[GraphKey] = set()
        met: set[tuple[object, ...]] = set()
        for key in self._keys:
            launches = {(key.phase, key.rows), (key.phase, key.bucket, key.variant)}
            if not launches <= met:
                chosen.add(key)
                met |= launches
        return chosen

    def _keys_to_verify(self) -> set[GraphKey]:
        asked = self._config.verify
        if asked is False or (asked is None and not self._is_cuda):
            return set()
        if asked:
            return set(self._keys)
        return {key for key in self._keys if not key.has_chunks} | set(typical_keys(self._keys))
