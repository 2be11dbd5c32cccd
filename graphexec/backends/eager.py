"""The eager backend: every step runs as ordinary calls, padded exactly as the graphs would be."""

from __future__ import annotations

from collections.abc import Callable

from graphexec.backends.base import BackendStats, ExecutionBackend, Progress
from graphexec.backends.stepping import (
    EagerLauncher,
    keys_of,
    open_pipeline,
    preserved_state,
    run_once,
    typical_keys,
)
from graphexec.capture.manifest import Manifest
from graphexec.config import BackendConfig, CaptureMode
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
        self.close()  # what an earlier program had
        self._program = program
        self._pipeline = open_pipeline(self._config, self._runtime, program)
        self._launcher = _CountingLauncher(program, self._pipeline)

    def warmup(self, progress: Progress | None = None) -> Manifest:
        assert self._pipeline is not None, "prepare() comes first"
        program, pipeline = self._program, self._pipeline
        keys = keys_of(self._config, program, pipeline.ladders)
        with self._runtime.activated(), preserved_state(program, pipeline):
            for key in typical_keys(keys):  # what lies between compiles when it is first met
                run_once(program, pipeline, key)
        return Manifest.of(self._runtime.device, [], {})

    def submit(self, plan: StepPlan) -> StepHandle:
        assert self._pipeline is not None, "prepare() comes first"
        return self._pipeline.submit(plan, self._launcher)

    @property
    def wait_us(self) -> float:
        return 0.0 if self._pipeline is None else self._pipeline.wait_s * 1e6

    def stats(self) -> BackendStats:
        assert self._pipeline is not None, "prepare() comes first"
        modes: dict[str, CaptureMode] = {"decode": "off", "prefill": "off"}
        return BackendStats.of(self._pipeline, 0, modes)

    def enqueue(self, work: Callable[[], None]) -> None:
        assert self._pipeline is not None, "prepare() comes first"
        self._pipeline.enqueue(work)

    def close(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()


class _CountingLauncher(EagerLauncher):
    def step(self, key: GraphKey, plan: StepPlan) -> Callable[[], None]:
        self.pipeline.controller.count_eager("idle" if key.phase == "idle" else "eager backend")
        return super().step(key, plan)
