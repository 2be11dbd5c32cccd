"""Every call into cuda.bindings, with its return code checked and turned into a named error.

The arity of some calls changed with cuda.bindings 13; nowhere else does the project depend on it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

from cuda.bindings import driver, runtime
from torch import OutOfMemoryError

from graphexec.errors import DeviceError

__all__ = [
    "begin_capture",
    "copy_async",
    "create_event",
    "describe_graph",
    "destroy_event",
    "destroy_executable",
    "destroy_graph",
    "end_capture",
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


def _fail(call: str, code: Handle) -> None:
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
        _fail("cudaEventCreateWithFlags", code)
    return event


def record_event(event: Handle, stream: Handle) -> None:
    (code,) = runtime.cudaEventRecord(event, stream)
    if code != _SUCCESS:
        _fail("cudaEventRecord", code)


def query_event(event: Handle) -> bool:
    (code,) = runtime.cudaEventQuery(event)
    if code == _SUCCESS:
        return True
    if code != _NOT_READY:
        _fail("cudaEventQuery", code)
    return False


def destroy_event(event: Handle) -> None:
    (code,) = runtime.cudaEventDestroy(event)
    if code != _SUCCESS:
        _fail("cudaEventDestroy", code)


def stream_wait_event(stream: Handle, event: Handle) -> None:
    (code,) = runtime.cudaStreamWaitEvent(stream, event, 0)
    if code != _SUCCESS:
        _fail("cudaStreamWaitEvent", code)


def query_stream(stream: Handle) -> bool:
    (code,) = runtime.cudaStreamQuery(stream)
    if code == _SUCCESS:
        return True
    if code != _NOT_READY:
        _fail("cudaStreamQuery", code)
    return False


def copy_async(target: int, source: int, num_bytes: int, stream: Handle) -> None:
    """Enqueues a copy between two addresses, each on the host (pinned) or on the device."""
    (code,) = runtime.cudaMemcpyAsync(target, source, num_bytes, runtime.cudaMemcpyKind.cudaMemcpyDefault, stream)
    if code != _SUCCESS:
        _fail("cudaMemcpyAsync", code)


def begin_capture(stream: Handle) -> None:
    """Begins a capture that other threads' CUDA calls cannot break, while unsafe calls of this thread do."""
    (code,) = runtime.cudaStreamBeginCapture(stream, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
    if code != _SUCCESS:
        _fail("cudaStreamBeginCapture", code)


def end_capture(stream: Handle) -> Handle:
    """Ends the capture and returns the graph. A failed capture ends as well: the stream is usable afterwards."""
    code, graph = runtime.cudaStreamEndCapture(stream)
    if code != _SUCCESS:
        _fail("cudaStreamEndCapture", code)
    return graph


def is_empty(graph: Handle) -> bool:
    """Whether a graph has no nodes."""
    code, _, count = runtime.cudaGraphGetNodes(graph, 0)
    if code != _SUCCESS:
        _fail("cudaGraphGetNodes", code)
    return int(count) == 0


def instantiate(graph: Handle, stream: Handle) -> Handle:
    """Makes a graph executable and moves it to the device, so that its first replay costs no more than a later one."""
    code, executable = runtime.cudaGraphInstantiate(graph, 0)
    if code != _SUCCESS:
        _fail("cudaGraphInstantiate", code)
    (code,) = runtime.cudaGraphUpload(executable, stream)
    if code != _SUCCESS:
        destroy_executable(executable)
        _fail("cudaGraphUpload", code)
    return executable


def launch_graph(executable: Handle, stream: Handle) -> None:
    (code,) = runtime.cudaGraphLaunch(executable, stream)
    if code != _SUCCESS:
        _fail("cudaGraphLaunch", code)


def destroy_executable(executable: Handle) -> None:
    (code,) = runtime.cudaGraphExecDestroy(executable)
    if code != _SUCCESS:
        _fail("cudaGraphExecDestroy", code)


def destroy_graph(graph: Handle) -> None:
    (code,) = runtime.cudaGraphDestroy(graph)
    if code != _SUCCESS:
        _fail("cudaGraphDestroy", code)


def describe_graph(graph: Handle) -> tuple[int, str, dict[str, int]]:
    """Number of nodes, a hash over kinds, kernel names and launch sizes, and launches by kernel name."""
    graph = driver.CUgraph(int(graph))
    nodes = _driver("cuGraphGetNodes", driver.cuGraphGetNodes(graph, 0))[1]
    handles = _driver("cuGraphGetNodes", driver.cuGraphGetNodes(graph, nodes))[0] if nodes else []
    digest, launches = hashlib.sha256(), Counter[str]()
    for node in handles:
        (kind,) = _driver("cuGraphNodeGetType", driver.cuGraphNodeGetType(node))
        digest.update(str(int(kind)).encode())
        if kind == driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL:
            name, sizes = _kernel(node)
            launches[name] += 1
            digest.update(f"{name}{sizes}".encode())
    return int(nodes), digest.hexdigest()[:16], dict(launches)


def _kernel(node: Handle) -> tuple[str, tuple[int, ...]]:
    """Name, grid and block of a kernel node."""
    (launch,) = _driver("cuGraphKernelNodeGetParams", driver.cuGraphKernelNodeGetParams(node))
    sizes = (launch.gridDimX, launch.gridDimY, launch.gridDimZ, launch.blockDimX, launch.blockDimY, launch.blockDimZ)
    code, name = driver.cuFuncGetName(launch.func) if int(launch.func) else driver.cuKernelGetName(launch.kern)
    return _decode(name) if code == driver.CUresult.CUDA_SUCCESS else "?", sizes


def _driver(call: str, result: tuple[Handle, ...]) -> tuple[Handle, ...]:
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        _fail(call, result[0])
    return result[1:]
