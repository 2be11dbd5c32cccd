"""Every error graphexec raises on purpose: each says what happened, why, and what to change."""

from __future__ import annotations

__all__ = [
    "BucketOverflowError",
    "CaptureError",
    "ConfigError",
    "DeviceError",
    "GraphexecError",
    "PipelineFull",
    "RequestError",
    "StepTimeout",
]


class GraphexecError(Exception):
    """Base of all errors of this package."""


class ConfigError(GraphexecError):
    """A configuration value, a checkpoint or the machine does not allow what was asked for."""


class CaptureError(GraphexecError):
    """A step could not be captured as a graph. The process stays usable; what was captured before still works."""


class BucketOverflowError(GraphexecError):
    """A step had more rows than the graph it was launched with: the controller's upper bound was broken."""


class PipelineFull(GraphexecError):
    """`submit` was called while every slot of a ring holds a step that was not collected."""


class DeviceError(GraphexecError):
    """A CUDA call failed, or device code raised. A CUDA error is sticky: the process must be restarted."""


class RequestError(GraphexecError):
    """A request was refused or failed. Its neighbours are not affected."""


class StepTimeout(GraphexecError):
    """A step did not finish within its time limit. Nothing it uses is freed, since the device may still write."""
