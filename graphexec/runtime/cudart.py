"""Every call into cuda.bindings but those that walk a graph, with its return code turned into a named error.

The arity of some calls changed with cuda.bindings 13; the project depends on it nowhere but here and in graph_nodes.
"""

from __future__ import annotations

from typing import Any, NoReturn

from cuda.bindings import driver, runtime
from torch import OutOfMemoryError

from graphexec.errors import DeviceError

__all__ = [
    "Handle",
    "begin_capture",
    "copy_async",
    "create_event",
    "destroy_event",
    "destroy_executable",
    "destroy_graph",
    "end_capture",
    "fail",
    "instantiate",
    "is_empty",
    "launch_graph",
    "query_event",
    "query_stream",
    "record_event",
    "stream_handle",
    "stream_wait_event",
]

Handle = Any  # a cuda.bindings handle object; the bindings are untyped

_SUCCESS = runtime.cudaError_t.cudaSuccess
_NOT_READY = runtime.cudaError_t.cudaErrorNotReady


def fail(call: str, code: Handle) -> NoReturn:
    """Raises the error that `code`, of the runtime or of the driver, stands for; it names the call."""
    if isinstance(code, driver.CUresult):
        name, text = driver.cuGetErrorName(code)[1], driver.cuGetErrorString(code)[1]
    else:
        name, text = runtime.cudaGetErrorName(code)[1], runtime.cudaGetErrorString(code)[1]
    shown = f"{call} failed with {_decode(name)}: {_decode(text)}."
    if code == runtime.cudaError_t.cudaErrorMemoryAllocation:
        raise OutOfMemoryError(shown)  # as torch says it, since callers need not know who ran out
    raise DeviceError(shown)


def _decode(text: object) -> str:
    return text.decode() if isinstance(text, bytes) else str(text)


def stream_handle(address: int) -> Handle:
    """Wraps the integer handle of a torch stream once, so that the hot path does not."""
    return runtime.cudaStream_t(address)


def create_event() -> Handle:
    """An event without timing, which makes recording and waiting cheaper."""
    code, event = runtime.cudaEventCreateWithFlags(runtime.cudaEventDisableTiming)
    if code != _SUCCESS:
        fail("cudaEventCreateWithFlags", code)
    return event


def record_event(event: Handle, stream: Handle) -> None:
    (code,) = runtime.cudaEventRecord(event, stream)
    if code != _SUCCESS:
        fail("cudaEventRecord", code)


def query_event(event: Handle) -> bool:
    (code,) = runtime.cudaEventQuery(event)
    if code == _SUCCESS:
        return True
    if code != _NOT_READY:
        fail("cudaEventQuery", code)
    return False


def destroy_event(event: Handle) -> None:
    (code,) = runtime.cudaEventDestroy(event)
    if code != _SUCCESS:
        fail("cudaEventDestroy", code)


def stream_wait_event(stream: Handle, event: Handle) -> None:
    (code,) = runtime.cudaStreamWaitEvent(stream, event, 0)
    if code != _SUCCESS:
        fail("cudaStreamWaitEvent", code)


def query_stream(stream: Handle) -> bool:
    (code,) = runtime.cudaStreamQuery(stream)
    if code == _SUCCESS:
        return True
    if code != _NOT_READY:
        fail("cudaStreamQuery", code)
    return False


def copy_async(target: int, source: int, num_bytes: int, stream: Handle) -> None:
    """Enqueues a copy between two addresses, each on the host (pinned) or on the device."""
    (code,) = runtime.cudaMemcpyAsync(target, source, num_bytes, runtime.cudaMemcpyKind.cudaMemcpyDefault, stream)
    if code != _SUCCESS:
        fail("cudaMemcpyAsync", code)


def begin_capture(stream: Handle) -> None:
    """Begins a capture that other threads' CUDA calls cannot break, while unsafe calls of this thread do."""
    (code,) = runtime.cudaStreamBeginCapture(stream, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
    if code != _SUCCESS:
        fail("cudaStreamBeginCapture", code)


def end_capture(stream: Handle) -> Handle:
    """Ends the capture and returns the graph. A failed capture ends as well: the stream is usable afterwards."""
    code, graph = runtime.cudaStreamEndCapture(stream)
    if code != _SUCCESS:
        fail("cudaStreamEndCapture", code)
    return graph


def is_empty(graph: Handle) -> bool:
    """Whether a graph has no nodes."""
    code, _, count = runtime.cudaGraphGetNodes(graph, 0)
    if code != _SUCCESS:
        fail("cudaGraphGetNodes", code)
    return int(count) == 0


def instantiate(graph: Handle, stream: Handle) -> Handle:
    """Makes a graph executable and moves it to the device, so that its first replay costs no more than a later one."""
    code, executable = runtime.cudaGraphInstantiate(graph, 0)
    if code != _SUCCESS:
        fail("cudaGraphInstantiate", code)
    (code,) = runtime.cudaGraphUpload(executable, stream)
    if code != _SUCCESS:
        destroy_executable(executable)
        fail("cudaGraphUpload", code)
    return executable


def launch_graph(executable: Handle, stream: Handle) -> None:
    (code,) = runtime.cudaGraphLaunch(executable, stream)
    if code != _SUCCESS:
        fail("cudaGraphLaunch", code)


def destroy_executable(executable: Handle) -> None:
    (code,) = runtime.cudaGraphExecDestroy(executable)
    if code != _SUCCESS:
        fail("cudaGraphExecDestroy", code)


def destroy_graph(graph: Handle) -> None:
    (code,) = runtime.cudaGraphDestroy(graph)
    if code != _SUCCESS:
        fail("cudaGraphDestroy", code)
