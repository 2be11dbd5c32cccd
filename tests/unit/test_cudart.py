"""Every call into cuda.bindings: its return code becomes a named error. Needs no device: the codes are made up."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda.bindings import runtime

from graphexec import DeviceError
from graphexec.runtime import cudart

CODE = runtime.cudaError_t
CALLS: dict[str, Callable[[], object]] = {
    "cudaEventCreateWithFlags": cudart.create_event,
    "cudaEventRecord": lambda: cudart.record_event(0, 0),
    "cudaEventQuery": lambda: cudart.query_event(0),
    "cudaEventDestroy": lambda: cudart.destroy_event(0),
    "cudaStreamWaitEvent": lambda: cudart.stream_wait_event(0, 0),
    "cudaStreamQuery": lambda: cudart.query_stream(0),
    "cudaMemcpyAsync": lambda: cudart.copy_async(0, 0, 4, 0),
    "cudaStreamBeginCapture": lambda: cudart.begin_capture(0),
    "cudaStreamEndCapture": lambda: cudart.end_capture(0),
    "cudaGraphInstantiate": lambda: cudart.instantiate(0, 0),
    "cudaGraphLaunch": lambda: cudart.launch_graph(0, 0),
    "cudaGraphExecDestroy": lambda: cudart.destroy_executable(0),
    "cudaGraphDestroy": lambda: cudart.destroy_graph(0),
}


class Bindings(SimpleNamespace):
    """cuda.bindings.runtime with calls that answer what `codes` says, and succeed otherwise; lists them in `called`."""

    def __init__(self, **codes: object) -> None:
        super().__init__(codes=codes, called=[])

    def __getattr__(self, name: str) -> object:
        real = getattr(runtime, name)
        if (
            not name.startswith("cuda")
            or not callable(real)
            or isinstance(real, type)
            or name.startswith("cudaGetError")
        ):
            return real

        def answer(*_: object) -> tuple[object, ...]:
            self.called.append(name)
            return self.codes.get(name, CODE.cudaSuccess), *(["handle"] if name in _RETURNS_A_HANDLE else [])

        return answer


_RETURNS_A_HANDLE = ("cudaEventCreateWithFlags", "cudaStreamEndCapture", "cudaGraphInstantiate")


@pytest.mark.parametrize("call", CALLS)
def test_a_return_code_becomes_an_error_that_names_the_call_and_the_code(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cudart, "runtime", Bindings(**{call: CODE.cudaErrorInvalidValue}))
    with pytest.raises(DeviceError, match=f"^{call} failed with cudaErrorInvalidValue: invalid argument"):
        CALLS[call]()


@pytest.mark.parametrize("call", CALLS)
def test_success_raises_nothing(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = Bindings()
    monkeypatch.setattr(cudart, "runtime", bindings)
    assert CALLS[call]() in (None, True, "handle")
    assert call in bindings.called


@pytest.mark.parametrize("call", ["cudaEventQuery", "cudaStreamQuery"])
def test_work_that_is_not_ready_is_no_error(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudart, "runtime", Bindings(**{call: CODE.cudaErrorNotReady}))
    assert CALLS[call]() is False


def test_memory_that_runs_out_is_torchs_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudart, "runtime", Bindings(cudaGraphInstantiate=CODE.cudaErrorMemoryAllocation))
    with pytest.raises(torch.OutOfMemoryError, match="cudaGraphInstantiate"):
        cudart.instantiate(0, 0)


def test_a_graph_that_cannot_be_uploaded_is_not_leaked(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = Bindings(cudaGraphUpload=CODE.cudaErrorMemoryAllocation)
    monkeypatch.setattr(cudart, "runtime", bindings)
    with pytest.raises(torch.OutOfMemoryError, match="cudaGraphUpload"):
        cudart.instantiate(0, 0)
    assert bindings.called[-1] == "cudaGraphExecDestroy"


def test_two_modules_alone_call_the_bindings() -> None:
    root = Path(__file__).parents[2]
    files = [path for folder in ("graphexec", "capture", "kernels") for path in (root / folder).rglob("*.py")]
    users = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.split(".")[0] == "cuda" for name in names):
                users.append(path.name)
    assert set(users) == {"cudart.py", "graph_nodes.py"}
