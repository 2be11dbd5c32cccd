"""The CUDA-graph backend: which graphs to capture, and which one serves a step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import torch

from graphexec.backends.base import BackendStats, ExecutionBackend, Progress
from graphexec.backends.stepping import (
    EagerLauncher,
    open_pipeline,
    preserved_state,
    run_once,
    warmup_chunk_keys,
    warmup_keys,
)
from graphexec.capture.graph_set import GraphSet, frozen_garbage_collection
from graphexec.capture.manifest import CapturedGraph, Manifest
from graphexec.capture.verify import check_record, check_written, compare, poison, snapshot
from graphexec.config import BackendConfig
from graphexec.errors import CaptureError, GraphexecError
from graphexec.pipeline import Pipeline
from graphexec.plan import GraphKey, StepHandle, StepPlan, StepProgram
from graphexec.rings import RING_SLOTS
from graphexec.runtime import Graph, Runtime

__all__ = ["CudaGraphBackend"]

_log = logging.getLogger(__name__)


class CudaGraphBackend(ExecutionBackend):
    """Replays one graph for a decode step; idle steps and steps with prompt chunks run eagerly, and are counted."""

    def __init__(self, config: BackendConfig, runtime: Runtime) -> None:
        self._config = config
        self._runtime = runtime
        self._verifies = config.verify if config.verify is not None else runtime.device.type == "cuda"
        self._pipeline: Pipeline | None = None
        self._graphs: GraphSet | None = None

    def prepare(self, program: StepProgram) -> None:
        self.close()  # what an earlier program had
        self._program = program
        self._pipeline = open_pipeline(self._config, self._runtime, program)
        self._graphs = GraphSet(self._runtime, self._pipeline.compute)
        self._pipeline.device_side.own(self._graphs)
        self._launcher = _GraphLauncher(program, self._pipeline, self._graphs, self._config)

    def warmup(self, progress: Progress | None = None) -> Manifest:
        pipeline, graphs = self._prepared()
        keys = warmup_keys(self._program, pipeline)
        captured: list[CapturedGraph] = []
        missing: dict[GraphKey, str] = {}
        with self._runtime.activated(), preserved_state(self._program, pipeline), frozen_garbage_collection():
            for key in warmup_chunk_keys(self._program, pipeline):
                run_once(self._program, pipeline, key)
            for index, key in enumerate(keys):
                try:
                    captured.append(self._capture(key, pipeline, graphs))
                except CaptureError as failure:
                    if not isinstance(failure.__cause__, torch.OutOfMemoryError):
                        raise
                    missing[key] = "out of memory"
                    _log.warning("No graph for the %s: out of memory. It will run eagerly.", key)
                if progress is not None:
                    progress(index + 1, len(keys), key)
            self._launcher.capture_uploads()
        if missing and self._config.strict:
            raise CaptureError(f"strict=true, and there is no memory for the {next(iter(missing))}.")
        if not self._config.lazy_capture:
            graphs.seal()
        return Manifest.of(self._runtime.device, captured, missing)

    def submit(self, plan: StepPlan) -> StepHandle:
        pipeline, _ = self._prepared()
        return pipeline.submit(plan, self._launcher)

    @property
    def wait_us(self) -> float:
        return 0.0 if self._pipeline is None else self._pipeline.wait_s * 1e6

    def stats(self) -> BackendStats:
        pipeline, _ = self._prepared()
        return BackendStats(pipeline.controller.stats(), self._launcher.replays)

    def close(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()

    def _prepared(self) -> tuple[Pipeline, GraphSet]:
        assert self._pipeline is not None, "prepare() comes first"
        assert self._graphs is not None
        return self._pipeline, self._graphs

    def _capture(self, key: GraphKey, pipeline: Pipeline, graphs: GraphSet) -> CapturedGraph:
        try:
            return self._capture_and_verify(key, pipeline, graphs)
        except BaseException as failure:
            graphs.discard(key)  # a graph that was not verified serves nobody
            if isinstance(failure, GraphexecError) or not isinstance(failure, Exception):
                raise
            raise CaptureError(
                f"Warming up or verifying the {key} failed: {type(failure).__name__}: {failure}"
            ) from failure

    def _capture_and_verify(self, key: GraphKey, pipeline: Pipeline, graphs: GraphSet) -> CapturedGraph:
        started = time.perf_counter()
        run_once(self._program, pipeline, key)  # compiles kernels and allocates workspaces outside of the capture
        if graphs.empty:
            self._runtime.trim()  # the first capture makes the pool grow, and cannot use what torch merely caches
        used_before = self._runtime.used()
        warm = time.perf_counter()
        graph = graphs.capture(key, partial(self._program.step, key))  # which holds nothing of the pipeline
        captured = time.perf_counter()
        pool_bytes = self._runtime.used() - used_before
        if self._verifies:
            self._verify(key, pipeline, graphs)
        info = graph.describe()
        return CapturedGraph(
            key=key,
            nodes=info.nodes,
            kernels=info.kernels,
            pool_bytes=pool_bytes,
            warmup_s=warm - started,
            capture_s=captured - warm,
            fingerprint=info.fingerprint,
            verified=self._verifies,
        )

    def _verify(self, key: GraphKey, pipeline: Pipeline, graphs: GraphSet) -> None:
        graph = graphs.get(key)
        assert graph is not None
        program, compute = self._program, pipeline.compute
        generator = torch.Generator().manual_seed(key.rows)
        state = [*program.state(), pipeline.io.ring, pipeline.io.counter]
        observed = list(program.observed(key))
        inputs: list[torch.Tensor] = []
        eager: list[torch.Tensor] = []
        replayed: list[torch.Tensor] = []

        def run_eagerly() -> None:
            program.exercise(key, generator)
            poison([pipeline.io.ring, *observed])
            inputs.extend(snapshot(state))
            program.step(key)
            eager.extend(snapshot([*state, *observed]))
            for tensor, value in zip(state, inputs, strict=True):
                tensor.copy_(value)
            poison(observed)
            program.spoil(key)

        compute.run(run_eagerly)
        compute.launch(graph)
        compute.run(lambda: replayed.extend(snapshot([*state, *observed])))
        pipeline.synchronize()
        check_written(key, eager[len(state) :])
        check_record(key, inputs[-1], eager[len(state) - 2], eager[len(state) - 1], program.record)
        names = [f"state()[{index}]" for index in range(len(state) - 2)] + ["the records", "the counter"]
        compare(key, [*names, *(f"observed()[{index}]" for index in range(len(observed)))], eager, replayed)


class _GraphLauncher(EagerLauncher):
    """Launches the graph of a key, or says why there is none and runs the step eagerly."""

    def __init__(self, program: StepProgram, pipeline: Pipeline, graphs: GraphSet, config: BackendConfig) -> None:
        super().__init__(program, pipeline)
        self._graphs = graphs
        self._upload_graphs: list[Graph] = []
        self._refused: set[GraphKey] = set()
        self._config = config
        self.replays = 0

    def capture_uploads(self) -> None:
        """One small graph for each staging slot: a copy and the apply kernel then cost a single launch."""
        apply = self.uploads.apply
        self.pipeline.compute.run(partial(apply, 0))  # an empty batch, which compiles what the capture needs
        self.pipeline.synchronize()
        try:
            self._upload_graphs = [self._graphs.capture_unkeyed(partial(apply, slot)) for slot in range(RING_SLOTS)]
        except torch.OutOfMemoryError:
            _log.warning("No graphs for uploads: out of memory. Deltas will be applied eagerly.")

    def upload(self, staging_slot: int) -> Callable[[], None]:
        if not self._upload_graphs:
            return super().upload(staging_slot)
        return partial(self.pipeline.compute.launch, self._upload_graphs[staging_slot])

    def step(self, key: GraphKey) -> Callable[[], None]:
        if key.phase == "idle":
            return self._eagerly(key, "idle")
        if key.phase == "mixed":
            return self._eagerly(key, "prompt chunks")
        graph = self._graphs.get(key)
        if graph is None and self._config.lazy_capture and key not in self._refused:
            graph = self._capture_now(key)
        if graph is None:
            if self._config.strict:
                raise CaptureError(
                    f"There is no graph for the {key}, and strict=true refuses to run it eagerly. "
                    "Add its size to capture_sizes, or set strict=false."
                )
            return self._eagerly(key, "no graph")
        self.replays += 1
        return partial(self.pipeline.compute.launch, graph)

    def _eagerly(self, key: GraphKey, reason: str) -> Callable[[], None]:
        self.pipeline.controller.count_eager(reason)
        return super().step(key)

    def _capture_now(self, key: GraphKey) -> Graph | None:
        """Captures in the middle of serving: requests hold their KV blocks, so there is nothing to exercise it with.

        The warm-up runs the coming step itself and takes its effect on the slots back; the KV that it writes, the real
        step will write again.
        """
        work = partial(self.program.step, key)
        try:
            with preserved_state(self.program, self.pipeline), frozen_garbage_collection():
                self.pipeline.compute.run(work)
                self.pipeline.synchronize()
                return self._graphs.capture(key, work)
        except (CaptureError, torch.OutOfMemoryError) as failure:
            _log.warning("No graph for the %s: %s", key, failure)
            self._refused.add(key)  # or every step of this shape would drain the pipeline and try again
            return None
