"""The CUDA-graph backend: which graphs to capture, and which one serves a step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from graphexec.backends.base import BackendStats, ExecutionBackend, Progress
from graphexec.backends.stepping import (
    EagerLauncher,
    cuts_of,
    keys_of,
    open_pipeline,
    preserved_state,
    rehearsal,
    rehearse,
    run_once,
    run_step,
    smallest_keys,
    takes_chunks,
    typical_keys,
)
from graphexec.capture.buckets import Ladders
from graphexec.capture.graph_set import GraphSet, frozen_garbage_collection
from graphexec.capture.manifest import CapturedGraph, Manifest
from graphexec.capture.verify import (
    check_drew_nothing,
    check_record,
    check_written,
    compare,
    host_generators,
    poison,
    snapshot,
)
from graphexec.config import BackendConfig, CaptureMode
from graphexec.errors import CaptureError, ConfigError, GraphexecError
from graphexec.pipeline import Pipeline
from graphexec.plan import GraphKey, StepHandle, StepPlan, StepProgram
from graphexec.rings import RING_SLOTS
from graphexec.runtime import Graph, RunningStep, Runtime, running

__all__ = ["CudaGraphBackend"]

_TIMED_REPLAYS = 5
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
        self._launcher = _GraphLauncher(program, self._pipeline, self._graphs, self._config, later)

    def warmup(self, progress: Progress | None = None) -> Manifest:
        pipeline, graphs = self._prepared()
        keys = self._keys
        runs, verified = self._keys_to_run(), self._keys_to_verify()
        captured: list[CapturedGraph] = []
        missing: dict[GraphKey, str] = {}
        with self._runtime.activated(), preserved_state(self._program, pipeline), frozen_garbage_collection():
            for index, key in enumerate(keys):
                try:
                    captured.append(self._capture(key, pipeline, graphs, key in runs, key in verified))
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

    def _capture(
        self, key: GraphKey, pipeline: Pipeline, graphs: GraphSet, runs: bool, verifies: bool
    ) -> CapturedGraph:
        try:
            return self._capture_and_verify(key, pipeline, graphs, runs, verifies)
        except BaseException as failure:
            graphs.discard(key)  # a graph that was not verified serves nobody
            if isinstance(failure, GraphexecError) or not isinstance(failure, Exception):
                raise
            raise CaptureError(
                f"Warming up or verifying the {key} failed: {type(failure).__name__}: {failure}"
            ) from failure

    def _capture_and_verify(
        self, key: GraphKey, pipeline: Pipeline, graphs: GraphSet, runs: bool, verifies: bool
    ) -> CapturedGraph:
        started = time.perf_counter()
        if runs:  # compiles kernels and allocates workspaces outside of the capture
            run_once(self._program, pipeline, key)
        if graphs.empty:
            self._runtime.trim()  # the first capture makes the pool grow, and cannot use what torch merely caches
        used_before = self._runtime.used()
        warm = time.perf_counter()
        graph = self._launcher.capture(key)
        captured = time.perf_counter()
        pool_bytes = self._runtime.used() - used_before
        if verifies:
            self._verify(key, pipeline, graphs)
        replay_us, launch_us = self._time(key, pipeline, graph) if self._config.measure else (None, None)
        info = graph.describe()
        return CapturedGraph(
            key=key,
            nodes=info.nodes,
            kernels=info.kernels,
            pool_bytes=pool_bytes,
            warmup_s=warm - started,
            capture_s=captured - warm,
            fingerprint=info.fingerprint,
            verified=verifies,
            pieces=graph.pieces,
            launches=info.launches,
            replay_us=replay_us,
            launch_us=launch_us,
        )

    def _time(self, key: GraphKey, pipeline: Pipeline, graph: Graph) -> tuple[float, float]:
        """Microseconds from a launch until the device has done it, and of the launch alone; medians."""
        program, compute, step = self._program, pipeline.compute, rehearsal(self._program, key)
        replays, launches = [], []
        for _ in range(_TIMED_REPLAYS):
            generator = torch.Generator().manual_seed(key.rows)
            compute.run(partial(program.exercise, key, generator))
            compute.run(partial(program.before_launch, key, step.plan))
            pipeline.synchronize()
            started = time.perf_counter()
            compute.launch(graph, step)
            launched = time.perf_counter()
            pipeline.synchronize()
            replays.append(time.perf_counter() - started)
            launches.append(launched - started)
        return median(replays) * 1e6, median(launches) * 1e6

    def _verify(self, key: GraphKey, pipeline: Pipeline, graphs: GraphSet) -> None:
        graph = graphs.get(key)
        assert graph is not None
        program, compute = self._program, pipeline.compute
        step = rehearsal(program, key)
        generator = torch.Generator().manual_seed(key.rows)
        state = [*program.state(), pipeline.io.ring, pipeline.io.counter]
        observed = list(program.observed(key))
        inputs: list[torch.Tensor] = []
        eager: list[torch.Tensor] = []
        replayed: list[torch.Tensor] = []
        generators: list[dict[str, bytes]] = []

        def run_eagerly() -> None:
            program.exercise(key, generator)
            program.before_launch(key, step.plan)
            poison([pipeline.io.ring, *observed])
            inputs.extend(snapshot(state))
            generators.append(host_generators())
            run_step(program, step)
            generators.append(host_generators())
            eager.extend(snapshot([*state, *observed]))
            for tensor, value in zip(state, inputs, strict=True):
                tensor.copy_(value)
            poison(observed)
            program.spoil(key)

        compute.run(run_eagerly)
        compute.launch(graph, step)
        compute.run(lambda: replayed.extend(snapshot([*state, *observed])))
        pipeline.synchronize()
        check_drew_nothing(key, *generators)
        check_written(key, eager[len(state) :])
        check_record(key, inputs[-1], eager[len(state) - 2], eager[len(state) - 1], program.record)
        names = [f"state()[{index}]" for index in range(len(state) - 2)] + ["the records", "the counter"]
        compare(key, [*names, *(f"observed()[{index}]" for index in range(len(observed)))], eager, replayed)


class _GraphLauncher(EagerLauncher):
    """Launches the graph of a key, or says why there is none and runs the step eagerly.

    `later` are the keys whose graphs the warm-up leaves to their first use.
    """

    def __init__(
        self,
        program: StepProgram,
        pipeline: Pipeline,
        graphs: GraphSet,
        config: BackendConfig,
        later: frozenset[GraphKey],
    ) -> None:
        super().__init__(program, pipeline)
        self._graphs = graphs
        self._applications: list[Graph] = []
        self._refused: set[GraphKey] = set()
        self._config = config
        self._later = later
        self.replays = 0

    @property
    def may_capture(self) -> bool:
        """Whether there may be captures after the warm-up."""
        return self._config.lazy_capture or bool(self._later)

    def capture_applications(self) -> None:
        """Graphs that apply deltas, one for each staging slot: a launch costs the host a third of the kernel's own."""
        for slot in range(RING_SLOTS):
            super().apply(slot)()  # an empty delta, which compiles what the captures need
        self.pipeline.synchronize()
        try:
            self._applications = [self._graphs.capture_unkeyed(self.application(slot)) for slot in range(RING_SLOTS)]
        except torch.OutOfMemoryError:
            _log.warning("No graphs for deltas: out of memory. They will be applied eagerly.")

    def apply(self, staging_slot: int) -> Callable[[], None]:
        if not self._applications:
            return super().apply(staging_slot)
        return partial(self.pipeline.compute.launch, self._applications[staging_slot])

    def capture(self, key: GraphKey) -> Graph:
        """Captures the graph of a key, in the pieces that the configuration asks for.

        Raises:
            CaptureError: names the step and the cause.
        """
        with running(rehearsal(self.program, key)):  # for breaks that the graph goes through
            # The work holds nothing of the pipeline: a graph must not be what keeps one.
            return self._graphs.capture(key, partial(self.program.step, key), cuts_of(self._config, key))

    def step(self, key: GraphKey, plan: StepPlan) -> Callable[[], None]:
        graph = self._graphs.get(key)
        if graph is None:
            by_design = self._eager_by_design(key)
            if by_design is None and (self._config.lazy_capture or key in self._later) and key not in self._refused:
                graph = self._capture_now(key)
            if graph is None:
                if by_design is None and self._config.strict:
                    raise CaptureError(
                        f"There is no graph for the {key}, and strict=true refuses to run it eagerly. Add its size to "
                        f"{'prefill_sizes' if key.has_chunks else 'capture_sizes'}, or set strict=false."
                    )
                self.pipeline.controller.count_eager(by_design or "no graph")
                return super().step(key, plan)
        self.replays += 1
        if graph.has_breaks:
            return partial(self.pipeline.compute.launch, graph, RunningStep(key, plan, self.program.host))
        return partial(self.pipeline.compute.launch, graph)

    def _eager_by_design(self, key: GraphKey) -> str | None:
        """Why a step like this never has a graph, or None if it should have one."""
        if key.phase == "idle":
            return "idle"
        if key.variant in self.program.chunk_variants:
            return key.variant
        setting = "prefill" if key.has_chunks else "decode"
        return f"{setting} off" if getattr(self._config, setting) == "off" else None

    def _capture_now(self, key: GraphKey) -> Graph | None:
        """Captures in the middle of serving: requests hold their KV blocks, so there is nothing to exercise it with.

        The warm-up runs the coming step itself and takes its effect on the slots back; the KV that it writes, the real
        step will write again.
        """
        try:
            with preserved_state(self.program, self.pipeline), frozen_garbage_collection():
                self.pipeline.compute.run(partial(rehearse, self.program, key))
                self.pipeline.synchronize()
                return self.capture(key)
        except (CaptureError, torch.OutOfMemoryError) as failure:
            _log.warning("No graph for the %s: %s", key, failure)
            self._refused.add(key)  # or every step of this shape would drain the pipeline and try again
            return None
