"""The eager backend: every step runs as ordinary calls, padded exactly as the graphs would be."""

from __future__ import annotations

from collections.abc import Callable

from graphexec.backends.base import BackendStats, ExecutionBackend, Progress
from graphexec.backends.stepping import EagerLauncher, open_pipeline, preserved_state, run_once, warmup_keys
from graphexec.capture.manifest import Manifest
from graphexec.config import BackendConfig
from graphexec.pipeline import Pipeline
from graphexec.plan import GraphKey, StepHandle, StepPlan, StepProgram
from graphexec.runtime import Runtime

__all__ = ["EagerBackend"]


class EagerBackend(ExecutionBackend):
    """Runs steps without graphs: the reference that graphs are compared with, and the choice for debugging."""

    def __init__(self, config: BackendConfig, runtime: Runtime) -> None:
        self._config = config
        self._runtime = runtime
        self._pipeline: Pipeline | None = None

    def prepare(self, program: StepProgram) -> None:
        self._program = program
        self._pipeline = open_pipeline(self._config, self._runtime, program)
        self._launcher = _CountingLauncher(program, self._pipeline)

    def warmup(self, progress: Progress | None = None) -> Manifest:
        assert self._pipeline is not None, "prepare() comes first"
        keys = warmup_keys(self._program, self._pipeline)
        with self._runtime.activated(), preserved_state(self._program, self._pipeline):
            for key in (keys[0], keys[-1]):  # the largest and the smallest compile all that there is to compile
                run_once(self._program, self._pipeline, key)
        return Manifest.of(self._runtime.device, [], {})

    def submit(self, plan: StepPlan) -> StepHandle:
        assert self._pipeline is not None, "prepare() comes first"
        return self._pipeline.submit(plan, self._launcher)

    def stats(self) -> BackendStats:
        assert self._pipeline is not None, "prepare() comes first"
        return BackendStats(self._pipeline.controller.stats(), 0, self._pipeline.wait_s * 1e6)

    def close(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()


class _CountingLauncher(EagerLauncher):
    def step(self, key: GraphKey) -> Callable[[], None]:
        self.pipeline.controller.count_eager("idle" if key.phase == "idle" else "eager backend")
        return super().step(key)
