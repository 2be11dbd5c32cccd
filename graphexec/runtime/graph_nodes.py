"""Walks a captured graph through the driver's interface in cuda.bindings: its nodes, its edges, what they were given.

Handles of the runtime's interface are taken as well: both name the same graph.
"""

from __future__ import annotations

import ctypes
import hashlib
from bisect import bisect_right
from collections import Counter
from pathlib import Path

from cuda.bindings import __version__ as bindings_version
from cuda.bindings import driver

from graphexec.errors import DeviceError
from graphexec.runtime.arguments import POINTER_BYTES, Argument, NodeArguments
from graphexec.runtime.cudart import Handle, fail

__all__ = ["describe_graph", "read_arguments"]

_SUCCESS = driver.CUresult.CUDA_SUCCESS
_INVALID_VALUE = driver.CUresult.CUDA_ERROR_INVALID_VALUE
_MEMORY_TYPE = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
_Kind = driver.CUgraphNodeType
_KIND_PREFIX = "CU_GRAPH_NODE_TYPE_"
_MAPS = Path("/proc/self/maps")
_WITHOUT_PARAMETERS = ("empty", "wait_event", "event_record")
_EDGE_DATA_LIVES = tuple(int(part) for part in bindings_version.split(".")[:2]) >= (13, 3)
"""Before, what came back for an edge was memory that the call had freed (NVIDIA/cuda-python issue 1804)."""


def describe_graph(graph: Handle) -> tuple[int, str, dict[str, int]]:
    """Number of nodes, a hash over nodes and edges (see GraphInfo), and launches by kernel name.

    Raises:
        DeviceError: the driver does not answer.
    """
    nodes = _nodes(graph)
    digest, launches = hashlib.sha256(), Counter[str]()
    for node in nodes:
        kind = _kind(node)
        digest.update(kind.encode())
        if kind == "kernel":
            launch = _launch(node)
            name = _name(launch)
            launches[name] += 1
            digest.update(f"{name}{_grid_and_block(launch)}".encode())
    digest.update(str(_edges(graph, nodes)).encode())
    return len(nodes), digest.hexdigest()[:16], dict(launches)


def read_arguments(graph: Handle) -> list[NodeArguments]:
    """What each node was given, in the order of capture. The memory that the graph uses must still be there.

    Raises:
        DeviceError: the driver does not say what nodes there are. A node alone that cannot be read says so itself.
    """
    addresses = _Addresses()
    return [_read(node, addresses) for node in _nodes(graph)]


class _Addresses:
    """Tells addresses from numbers, by asking the driver once for each value, and the system for what it mapped."""

    def __init__(self) -> None:
        self._known = {0: False}
        ranges = sorted(_mapped())
        self._begins, self._ends = [begin for begin, _ in ranges], [end for _, end in ranges]

    def __contains__(self, value: int) -> bool:
        if value not in self._known:
            # Managed and pinned memory has a type, too; other memory of the host has none.
            code, memory_type = driver.cuPointerGetAttribute(_MEMORY_TYPE, driver.CUdeviceptr(value))[:2]
            self._known[value] = code == _SUCCESS and int(memory_type) != 0
        return self._known[value]

    def of_host(self, value: int) -> bool:
        """Whether this is an address of the process that the driver does not know."""
        index = bisect_right(self._begins, value) - 1
        return index >= 0 and value < self._ends[index] and value not in self


def _mapped() -> list[tuple[int, int]]:
    """Ranges of addresses that the process itself can read; none where the system does not say.

    CUDA reserves others, low ones too, in which two small numbers side by side would seem to lie.
    """
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:
        return []
    readable = (line.split() for line in lines if line.split()[1].startswith("r") and "/dev/nvidia" not in line)
    ranges = (fields[0].split("-") for fields in readable)
    return [(int(begin, 16), int(end, 16)) for begin, end in ranges]


def _nodes(graph: Handle) -> list[Handle]:
    graph = driver.CUgraph(int(graph))
    count = _checked("cuGraphGetNodes", driver.cuGraphGetNodes(graph, 0))[-1]
    if not count:
        return []
    nodes: list[Handle] = _checked("cuGraphGetNodes", driver.cuGraphGetNodes(graph, count))[0]
    return nodes


def _edges(graph: Handle, nodes: list[Handle]) -> list[tuple[int, ...]]:
    """Both ends of each edge, by place among the nodes, and its kind: a programmatic launch has edges of its own."""
    graph = driver.CUgraph(int(graph))
    count = _checked("cuGraphGetEdges", driver.cuGraphGetEdges(graph, 0))[-1]
    if not count:
        return []
    sources, targets, data, _ = _checked("cuGraphGetEdges", driver.cuGraphGetEdges(graph, count))
    place = {int(node): index for index, node in enumerate(nodes)}
    kinds: list[tuple[int, ...]] = [()] * len(sources)
    if _EDGE_DATA_LIVES:
        kinds = [(int(each.type), int(each.from_port), int(each.to_port)) for each in data]
    ends = [(place[int(source)], place[int(target)]) for source, target in zip(sources, targets, strict=True)]
    return sorted((*end, *kind) for end, kind in zip(ends, kinds, strict=True))


def _read(node: Handle, addresses: _Addresses) -> NodeArguments:
    kind = _kind(node)
    try:
        if kind == "kernel":
            return _read_kernel(node, addresses)
        if kind == "memset":
            (memset,) = _checked("cuGraphMemsetNodeGetParams", driver.cuGraphMemsetNodeGetParams(node))
            value = Argument(int(memset.value).to_bytes(4, "little"))
            return NodeArguments(kind, kind, (memset.width, memset.height, memset.elementSize), (value,))
        if kind == "memcpy":
            (memcpy,) = _checked("cuGraphMemcpyNodeGetParams", driver.cuGraphMemcpyNodeGetParams(node))
            return NodeArguments(kind, kind, (memcpy.WidthInBytes, memcpy.Height, memcpy.Depth), ())
    except DeviceError as failure:
        return NodeArguments(kind, kind, (), None, str(failure))
    if kind in _WITHOUT_PARAMETERS:
        return NodeArguments(kind, kind, (), ())
    return NodeArguments(kind, kind, (), None, "nodes of this kind are not compared")


def _read_kernel(node: Handle, addresses: _Addresses) -> NodeArguments:
    launch = _launch(node)
    name, sizes = _name(launch), (*_grid_and_block(launch), launch.sharedMemBytes)
    try:
        values = _values(launch)
    except DeviceError as failure:
        return NodeArguments(name, "kernel", sizes, None, str(failure))
    return NodeArguments(name, "kernel", sizes, tuple(_masked(value, addresses) for value in values))


def _values(launch: Handle) -> list[bytes]:
    """Copies of the arguments, which belong to the node."""
    if int(launch.extra or 0):
        raise DeviceError("It was launched with its arguments packed in `extra`.")
    sizes, table = _parameter_sizes(launch), int(launch.kernelParams or 0)
    if not table and not sizes:
        return []
    if not table or not sizes:
        raise DeviceError("The driver names its parameters without their sizes, or their sizes alone.")
    places = (ctypes.c_void_p * len(sizes)).from_address(table)
    if not all(places):
        raise DeviceError("The driver says of a parameter not where it is.")
    return [ctypes.string_at(place, size) for place, size in zip(places, sizes, strict=True) if place]


def _parameter_sizes(launch: Handle) -> list[int]:
    sizes: list[int] = []
    while True:
        if int(launch.func):
            call, result = "cuFuncGetParamInfo", driver.cuFuncGetParamInfo(launch.func, len(sizes))
        else:
            call, result = "cuKernelGetParamInfo", driver.cuKernelGetParamInfo(launch.kern, len(sizes))
        if result[0] == _INVALID_VALUE:  # the index is behind the last one
            return sizes
        sizes.append(int(_checked(call, result)[1]))


def _masked(value: bytes, addresses: _Addresses) -> Argument:
    starts = range(0, len(value) - POINTER_BYTES + 1, POINTER_BYTES // 2)  # padding need not be aligned as pointers are
    words = {at: int.from_bytes(value[at : at + POINTER_BYTES], "little") for at in starts}
    pointers = tuple(at for at, word in words.items() if at % POINTER_BYTES == 0 and word in addresses)
    leftovers = tuple(at for at, word in words.items() if addresses.of_host(word))
    data = bytearray(value)
    for at in (*pointers, *leftovers):
        data[at : at + POINTER_BYTES] = bytes(POINTER_BYTES)
    return Argument(bytes(data), pointers, leftovers)


def _kind(node: Handle) -> str:
    (kind,) = _checked("cuGraphNodeGetType", driver.cuGraphNodeGetType(node))
    return str(getattr(kind, "name", kind)).removeprefix(_KIND_PREFIX).lower()


def _launch(node: Handle) -> Handle:
    return _checked("cuGraphKernelNodeGetParams", driver.cuGraphKernelNodeGetParams(node))[0]


def _name(launch: Handle) -> str:
    code, name = driver.cuFuncGetName(launch.func) if int(launch.func) else driver.cuKernelGetName(launch.kern)
    return name.decode(errors="replace") if code == _SUCCESS else "?"


def _grid_and_block(launch: Handle) -> tuple[int, ...]:
    grid = launch.gridDimX, launch.gridDimY, launch.gridDimZ
    return *grid, launch.blockDimX, launch.blockDimY, launch.blockDimZ


def _checked(call: str, result: tuple[Handle, ...]) -> tuple[Handle, ...]:
    if result[0] != _SUCCESS:
        fail(call, result[0])
    return result[1:]
