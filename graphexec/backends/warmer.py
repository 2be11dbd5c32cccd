"""Captures one graph after another in a warm-up: runs the step before, compares and times the graph afterwards."""

from __future__ import annotations

import time
from functools import partial
from statistics import median

import torch

from graphexec.backends.stepping import captured_step, cuts_of, rehearsal, run_once, run_step
from graphexec.capture.graph_set import GraphSet
from graphexec.capture.manifest import CapturedGraph
from graphexec.capture.verify import (
    check_record,
    check_written,
    compare,
    host_generators,
    poison,
    raise_if_drawn,
    snapshot,
)
from graphexec.config import BackendConfig
from graphexec.errors import CaptureError, GraphexecError
from graphexec.pipeline import Pipeline
from graphexec.plan import GraphKey, StepProgram
from graphexec.runtime import Graph, running

__all__ = ["Warmer", "capture_graph"]

_TIMED_REPLAYS = 5


def capture_graph(program: StepProgram, graphs: GraphSet, config: BackendConfig, key: GraphKey) -> Graph:
    """Captures the graph of a key, in the pieces that the configuration asks for.

    Raises:
        CaptureError: names the step and the cause.
    """
    with running(captured_step(program, key)):  # for breaks that the graph goes through
        # The work holds nothing of the pipeline: a graph must not be what keeps one.
        return graphs.capture(key, partial(program.step, key), cuts_of(config, key))


class Warmer:
    """The graphs of one program; the slots must be preserved around it."""

    def __init__(self, program: StepProgram, pipeline: Pipeline, graphs: GraphSet, config: BackendConfig) -> None:
        self._program = program
        self._pipeline = pipeline
        self._graphs = graphs
        self._config = config

    def capture(self, key: GraphKey, runs: bool, verifies: bool) -> CapturedGraph:
        """Captures one graph, after an eager step if it `runs`, and compares the two if it `verifies`.

        Raises:
            CaptureError: names the step and the cause; there is no graph for it then.
        """
        try:
            return self._capture_and_verify(key, runs, verifies)
        except BaseException as failure:
            self._graphs.discard(key)  # a graph that was not verified serves nobody
            if isinstance(failure, GraphexecError) or not isinstance(failure, Exception):
                raise
            raise CaptureError(
                f"Warming up or verifying the {key} failed: {type(failure).__name__}: {failure}"
            ) from failure

    def _capture_and_verify(self, key: GraphKey, runs: bool, verifies: bool) -> CapturedGraph:
        runtime = self._pipeline.runtime
        started = time.perf_counter()
        if runs:  # compiles kernels and allocates workspaces outside of the capture
            run_once(self._program, self._pipeline, key)
        if self._graphs.empty:
            runtime.trim()  # the first capture makes the pool grow, and cannot use what torch merely caches
        used_before = runtime.used()
        warm = time.perf_counter()
        graph = capture_graph(self._program, self._graphs, self._config, key)
        captured = time.perf_counter()
        pool_bytes = runtime.used() - used_before
        if verifies:
            self._verify(key, graph)
        replay_us, launch_us = self._time(key, graph) if self._config.measure else (None, None)
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
            pieces=1 + graph.breaks,
            launches=info.launches,
            replay_us=replay_us,
            launch_us=launch_us,
        )

    def _time(self, key: GraphKey, graph: Graph) -> tuple[float, float]:
        """Microseconds from a launch until the device has done it, and of the launch alone; medians."""
        program, pipeline, step = self._program, self._pipeline, rehearsal(self._program, key)
        compute = pipeline.compute
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

    def _verify(self, key: GraphKey, graph: Graph) -> None:
        program, pipeline, compute = self._program, self._pipeline, self._pipeline.compute
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
        check_written(key, eager[len(state) :])
        check_record(key, inputs[-1], eager[len(state) - 2], eager[len(state) - 1], program.record)
        names = [f"state()[{index}]" for index in range(len(state) - 2)] + ["the records", "the counter"]
        try:
            compare(key, [*names, *(f"observed()[{index}]" for index in range(len(observed)))], eager, replayed)
        except CaptureError:
            raise_if_drawn(key, *generators)
            raise
