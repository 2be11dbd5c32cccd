"""Which graph serves a step, and what happens where there is none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch

from graphexec.backends.stepping import EagerLauncher, preserved_state, run_step
from graphexec.backends.warmer import capture_graph
from graphexec.capture.graph_set import GraphSet, frozen_garbage_collection
from graphexec.config import BackendConfig
from graphexec.errors import CaptureError
from graphexec.pipeline import Pipeline
from graphexec.plan import GraphKey, StepPlan, StepProgram
from graphexec.rings import RING_SLOTS
from graphexec.runtime import Graph, RunningStep

__all__ = ["GraphLauncher"]

_log = logging.getLogger(__name__)


class GraphLauncher(EagerLauncher):
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
        self._staged: int | None = None  # the slot of the delta in front of the coming step
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
        self._staged = staging_slot
        if not self._applications:
            return super().apply(staging_slot)
        return partial(self.pipeline.compute.launch, self._applications[staging_slot])

    def step(self, key: GraphKey, plan: StepPlan) -> Callable[[], None]:
        staged, self._staged = self._staged, None
        graph = self._graphs.get(key)
        if graph is None:
            by_design = self._eager_by_design(key)
            if by_design is None and (self._config.lazy_capture or key in self._later) and key not in self._refused:
                graph = self._capture_now(RunningStep(key, plan, self.program.host), staged)
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

    def _capture_now(self, step: RunningStep, staged: int | None) -> Graph | None:
        """Captures in the middle of serving: requests hold their KV blocks, so there is nothing to exercise it with.

        The warm-up runs the coming step itself, behind the delta in the staging slot, and takes the effect of both on
        the slots back; the KV that it writes, the real step will write again.
        """
        compute, key = self.pipeline.compute, step.key
        try:
            with preserved_state(self.program, self.pipeline), frozen_garbage_collection():
                if staged is not None:
                    compute.run(self.application(staged))
                compute.run(partial(self.program.before_launch, key, step.plan))
                compute.run(partial(run_step, self.program, step))
                self.pipeline.synchronize()
                return capture_graph(self.program, self._graphs, self._config, key)
        except (CaptureError, torch.OutOfMemoryError) as failure:
            _log.warning("No graph for the %s: %s", key, failure)
            self._refused.add(key)  # or every step of this shape would drain the pipeline and try again
            return None
