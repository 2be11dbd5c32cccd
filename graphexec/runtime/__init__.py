"""Streams, events, pinned memory and graphs of a device behind one interface."""

from __future__ import annotations

import torch

from graphexec.errors import ConfigError
from graphexec.runtime.base import Event, Graph, GraphInfo, Runtime, Stream
from graphexec.runtime.breaks import Cuts, RunningStep, eager_break, running, running_step
from graphexec.runtime.cpu import CpuRuntime

__all__ = [
    "CpuRuntime",
    "Cuts",
    "Event",
    "Graph",
    "GraphInfo",
    "RunningStep",
    "Runtime",
    "Stream",
    "create_runtime",
    "eager_break",
    "running",
    "running_step",
]


def create_runtime(device: torch.device | str) -> Runtime:
    """The runtime of `device` ("cpu", "cuda" or "cuda:N").

    Raises:
        ConfigError: `device` is a CUDA device and there is none, or it is of another kind.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return CpuRuntime()
    if device.type != "cuda":
        raise ConfigError(f'There is no runtime for device "{device}". Use "cpu" or "cuda".')
    if not torch.cuda.is_available():
        raise ConfigError('device="cuda" was asked for, but torch finds no CUDA device. Use device="cpu" or "auto".')
    from graphexec.runtime.cuda import CudaRuntime

    return CudaRuntime(device)
