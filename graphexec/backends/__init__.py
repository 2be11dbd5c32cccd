"""Execution backends, chosen by name: `eager`, `cudagraph`, and whatever registers as `graphexec.backends`."""

from __future__ import annotations

from importlib.metadata import entry_points

from graphexec.backends.base import BackendStats, ExecutionBackend, Progress
from graphexec.backends.cudagraph import CudaGraphBackend
from graphexec.backends.eager import EagerBackend
from graphexec.backends.stepping import keys_of, ladders_of
from graphexec.config import BACKEND_GROUP, BackendConfig
from graphexec.errors import ConfigError
from graphexec.runtime import Runtime

__all__ = [
    "BackendStats",
    "CudaGraphBackend",
    "EagerBackend",
    "ExecutionBackend",
    "Progress",
    "create_backend",
    "keys_of",
    "ladders_of",
]


def create_backend(config: BackendConfig, runtime: Runtime) -> ExecutionBackend:
    """Makes the backend that `config.name` names, on the device of `runtime`.

    A package adds a backend by an entry point in the group `graphexec.backends`, whose value is a callable
    `(config, runtime) -> ExecutionBackend`.

    Raises:
        ConfigError: no backend has this name, or what is registered under it makes something else.
    """
    if config.name == "cudagraph":
        return CudaGraphBackend(config, runtime)
    if config.name == "eager":
        return EagerBackend(config, runtime)
    for point in entry_points(group=BACKEND_GROUP, name=config.name):
        try:
            factory = point.load()
        except (ImportError, AttributeError) as failure:
            raise ConfigError(f"Cannot load backend {config.name!r} from {point.value!r}: {failure}.") from failure
        backend = factory(config, runtime)
        if not isinstance(backend, ExecutionBackend):
            raise ConfigError(f"Entry point {point.value!r} made {type(backend).__name__}, not an ExecutionBackend.")
        return backend
    raise ConfigError(f"No package on this machine registers a backend {config.name!r}.")
