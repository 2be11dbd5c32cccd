"""graphexec: a CUDA-graph execution backend for LLM decode loops. The device drives, the host follows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphexec.backends import ExecutionBackend, create_backend
from graphexec.backends.check import check_capturable
from graphexec.backends.frozen import check_frozen
from graphexec.config import BackendConfig, EngineConfig
from graphexec.errors import (
    BucketOverflowError,
    CaptureError,
    ConfigError,
    DeviceError,
    GraphexecError,
    PipelineFull,
    RequestError,
    StepTimeout,
)
from graphexec.plan import (
    Delta,
    DeviceIO,
    FinishCode,
    GraphKey,
    RecordLayout,
    StepHandle,
    StepPlan,
    StepProgram,
    StepResult,
)
from graphexec.runtime import RunningStep, create_runtime, eager_break, running_step

if TYPE_CHECKING:
    from graphexec.engine import Engine, RequestOutput, SamplingParams

__all__ = [
    "BackendConfig",
    "BucketOverflowError",
    "CaptureError",
    "ConfigError",
    "Delta",
    "DeviceError",
    "DeviceIO",
    "Engine",
    "EngineConfig",
    "ExecutionBackend",
    "FinishCode",
    "GraphKey",
    "GraphexecError",
    "PipelineFull",
    "RecordLayout",
    "RequestError",
    "RequestOutput",
    "RunningStep",
    "SamplingParams",
    "StepHandle",
    "StepPlan",
    "StepProgram",
    "StepResult",
    "StepTimeout",
    "check_capturable",
    "check_frozen",
    "create_backend",
    "create_runtime",
    "eager_break",
    "running_step",
]

_OF_ENGINE = ("Engine", "RequestOutput", "SamplingParams")


def __getattr__(name: str) -> object:
    if name in _OF_ENGINE:  # loaded when first used: other engines need no transformers
        from graphexec import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'graphexec' has no attribute {name!r}")
