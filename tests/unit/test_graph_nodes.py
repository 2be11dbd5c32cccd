"""Walking a graph: what is read of its nodes, and that nothing unread passes for read. The driver is made up."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from cuda.bindings import driver

from graphexec import DeviceError
from graphexec.runtime import cudart, graph_nodes
from graphexec.runtime.arguments import Argument

OK, INVALID = driver.CUresult.CUDA_SUCCESS, driver.CUresult.CUDA_ERROR_INVALID_VALUE
DENIED = driver.CUresult.CUDA_ERROR_NOT_PERMITTED
DEVICE_ADDRESS, PINNED_ADDRESS = 0x7F0000000200, 0x7E0000000400


@dataclass
class Launch:
    """A kernel node, whose arguments lie in memory as the driver keeps them."""

    name: str
    values: Sequence[bytes] = ()
    grid: tuple[int, int, int] = (1, 1, 1)
    of_library: bool = False
    packed: bool = False
    sizes: Sequence[int] | None = None
    kind: str = "KERNEL"
    keeps: list[object] = field(default_factory=list)

    def parameters(self, handle: int) -> SimpleNamespace:
        buffers = [ctypes.create_string_buffer(value, len(value)) for value in self.values]
        table = (ctypes.c_void_p * len(buffers))(*(ctypes.addressof(buffer) for buffer in buffers))
        self.keeps += [*buffers, table]
        return SimpleNamespace(
            func=0 if self.of_library else handle,
            kern=handle if self.of_library else 0,
            gridDimX=self.grid[0],
            gridDimY=self.grid[1],
            gridDimZ=self.grid[2],
            blockDimX=128,
            blockDimY=1,
            blockDimZ=1,
            sharedMemBytes=512,
            kernelParams=ctypes.addressof(table) if buffers and not self.packed else 0,
            extra=0x1000 if self.packed else 0,
        )

    def parameter(self, index: int) -> tuple[object, ...]:
        sizes = [len(value) for value in self.values] if self.sizes is None else self.sizes
        return (OK, 8 * index, sizes[index]) if index < len(sizes) else (INVALID, None, None)


@dataclass
class Other:
    """A node of another kind, with the answer to the question for its parameters."""

    kind: str
    parameters: SimpleNamespace | None = None


Node = Launch | Other
Edge = tuple[int, int, int]


class Driver(SimpleNamespace):
    """cuda.bindings.driver over a graph of these nodes; an edge is its two ends and its kind."""

    def __init__(self, nodes: Sequence[Node], edges: Iterable[Edge] = (), denied: Sequence[str] = ()) -> None:
        super().__init__(nodes=list(nodes), edges=list(edges), denied=denied, asked=[])

    def __getattribute__(self, name: str) -> object:
        if name.startswith("cu") and name in super().__getattribute__("denied"):
            return lambda *_: (DENIED, None, None)
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> object:
        return getattr(driver, name)

    def cuGetErrorName(self, code: driver.CUresult) -> tuple[object, bytes]:
        return OK, code.name.encode()

    def cuGetErrorString(self, code: driver.CUresult) -> tuple[object, bytes]:
        return OK, b"made up"

    def cuGraphGetNodes(self, graph: object, count: int) -> tuple[object, ...]:
        return OK, [driver.CUgraphNode(1 + index) for index in range(count)], len(self.nodes)

    def cuGraphGetEdges(self, graph: object, count: int) -> tuple[object, ...]:
        edges = self.edges[:count]
        ends = [[driver.CUgraphNode(1 + edge[end]) for edge in edges] for end in (0, 1)]
        data = [SimpleNamespace(type=edge[2], from_port=edge[2], to_port=0) for edge in edges]
        return OK, *ends, data, len(self.edges)

    def cuGraphNodeGetType(self, node: object) -> tuple[object, ...]:
        return OK, getattr(driver.CUgraphNodeType, f"CU_GRAPH_NODE_TYPE_{self._node(node).kind}")

    def cuGraphKernelNodeGetParams(self, node: object) -> tuple[object, ...]:
        return OK, self._node(node).parameters(int(node))

    def cuGraphMemsetNodeGetParams(self, node: object) -> tuple[object, ...]:
        return OK, self._node(node).parameters

    def cuGraphMemcpyNodeGetParams(self, node: object) -> tuple[object, ...]:
        return OK, self._node(node).parameters

    def cuFuncGetName(self, function: int) -> tuple[object, ...]:
        return OK, self._node(function).name.encode()

    cuKernelGetName = cuFuncGetName

    def cuFuncGetParamInfo(self, function: int, index: int) -> tuple[object, ...]:
        return self._node(function).parameter(index)

    cuKernelGetParamInfo = cuFuncGetParamInfo

    def cuPointerGetAttribute(self, attribute: object, address: object) -> tuple[object, ...]:
        self.asked.append(int(address))
        if int(address) in (DEVICE_ADDRESS, PINNED_ADDRESS):
            return OK, 2 if int(address) == DEVICE_ADDRESS else 1
        return INVALID, None

    def _node(self, handle: object) -> Node:
        return self.nodes[int(handle) - 1]


Install = Callable[..., Driver]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Install:
    def install(*nodes: Node, edges: Iterable[Edge] = (), denied: Sequence[str] = ()) -> Driver:
        made_up = Driver(nodes, edges, denied)
        monkeypatch.setattr(graph_nodes, "driver", made_up)
        monkeypatch.setattr(cudart, "driver", made_up)
        return made_up

    return install


def word(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "little")


@pytest.mark.parametrize("of_library", [False, True])
def test_a_kernel_gives_its_sizes_and_the_bytes_of_each_argument(answers: Install, of_library: bool) -> None:
    answers(Launch("scale", [word(7, 4), word(9)], grid=(3, 2, 1), of_library=of_library))
    (node,) = graph_nodes.read_arguments(0)
    assert (node.name, node.kind) == ("scale", "kernel")
    assert node.sizes == (3, 2, 1, 128, 1, 1, 512)
    assert node.arguments == (Argument(word(7, 4)), Argument(word(9)))


def test_addresses_of_device_and_pinned_memory_are_masked_also_within_a_struct(answers: Install) -> None:
    made_up = answers(Launch("gather", [word(DEVICE_ADDRESS), word(5) + word(PINNED_ADDRESS) + word(DEVICE_ADDRESS)]))
    (node,) = graph_nodes.read_arguments(0)
    assert node.arguments == (Argument(bytes(8), (0,)), Argument(word(5) + bytes(16), (8, 16)))
    assert made_up.asked.count(DEVICE_ADDRESS) == 1


def test_addresses_of_the_hosts_own_memory_are_leftovers_of_padding(answers: Install) -> None:
    own = ctypes.create_string_buffer(16)
    left = word(ctypes.addressof(own))
    answers(Launch("gather", [word(5) + left + word(DEVICE_ADDRESS), word(5)[:4] + left + bytes(4)]))
    (node,) = graph_nodes.read_arguments(0)
    assert node.arguments == (Argument(word(5) + bytes(16), (16,), (8,)), Argument(word(5)[:4] + bytes(12), (), (4,)))


def test_two_small_numbers_are_no_address_of_what_the_system_merely_reserves(
    answers: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "200000000-300200000 ---p 00000000 00:00 0\n"
        "300200000-400000000 rw-s 00000000 00:06 709  /dev/nvidia0\n"
        "7f0000000000-7f0000100000 r--p 00000000 00:00 0  /usr/lib/libc.so\n"
    )
    monkeypatch.setattr(graph_nodes, "_MAPS", maps)
    pairs = (
        (300).to_bytes(4, "little") + (2).to_bytes(4, "little") + (9).to_bytes(4, "little") + (3).to_bytes(4, "little")
    )
    answers(Launch("gather", [pairs, word(0x7F0000000010)]))
    (node,) = graph_nodes.read_arguments(0)
    assert node.arguments == (Argument(pairs), Argument(bytes(8), (), (0,)))


def test_words_that_are_not_aligned_or_not_whole_are_no_addresses(answers: Install) -> None:
    shifted = bytes(4) + word(DEVICE_ADDRESS)
    answers(Launch("gather", [shifted, shifted[4:10]]))
    (node,) = graph_nodes.read_arguments(0)
    assert node.arguments == (Argument(shifted), Argument(shifted[4:10]))


@pytest.mark.parametrize(
    ("launch", "denied", "reason"),
    [
        (Launch("packed", [word(1)], packed=True), (), "packed in `extra`"),
        (Launch("opaque", [word(1)], sizes=()), (), "without their sizes"),
        (Launch("opaque", [], sizes=(8,)), (), "their sizes alone"),
        (Launch("refused", [word(1)]), ("cuFuncGetParamInfo",), "cuFuncGetParamInfo failed with CUDA_ERROR_NOT_PERM"),
    ],
)
def test_a_kernel_whose_arguments_cannot_be_read_says_why(
    answers: Install, launch: Launch, denied: Sequence[str], reason: str
) -> None:
    answers(launch, denied=denied)
    (node,) = graph_nodes.read_arguments(0)
    assert node.arguments is None
    assert reason in node.why_unread
    assert node.name == launch.name


def test_a_kernel_without_parameters_has_been_read(answers: Install) -> None:
    answers(Launch("nothing"))
    assert graph_nodes.read_arguments(0)[0].arguments == ()


def test_fills_give_their_value_and_copies_their_extent_but_no_addresses(answers: Install) -> None:
    fill = SimpleNamespace(dst=DEVICE_ADDRESS, pitch=0, value=3, elementSize=4, width=64, height=1)
    copy = SimpleNamespace(srcDevice=DEVICE_ADDRESS, dstDevice=PINNED_ADDRESS, WidthInBytes=96, Height=1, Depth=1)
    answers(Other("MEMSET", fill), Other("MEMCPY", copy))
    filled, copied = graph_nodes.read_arguments(0)
    assert (filled.name, filled.sizes, filled.arguments) == ("memset", (64, 1, 4), (Argument(word(3, 4)),))
    assert (copied.name, copied.sizes, copied.arguments) == ("memcpy", (96, 1, 1), ())


@pytest.mark.parametrize(("kind", "read"), [("EMPTY", True), ("EVENT_RECORD", True), ("HOST", False), ("GRAPH", False)])
def test_of_other_nodes_only_those_without_parameters_pass_for_read(answers: Install, kind: str, read: bool) -> None:
    answers(Other(kind))
    (node,) = graph_nodes.read_arguments(0)
    assert (node.arguments is not None) == read
    assert bool(node.why_unread) != read


def test_a_node_that_the_driver_refuses_does_not_hide_the_others(answers: Install) -> None:
    answers(Other("MEMCPY"), Launch("scale", [word(7, 4)]), denied=["cuGraphMemcpyNodeGetParams"])
    refused, read = graph_nodes.read_arguments(0)
    assert "cuGraphMemcpyNodeGetParams failed" in refused.why_unread
    assert read.arguments == (Argument(word(7, 4)),)


def test_a_graph_that_cannot_be_walked_is_an_error_that_names_the_call(answers: Install) -> None:
    answers(Launch("scale"), denied=["cuGraphGetNodes"])
    with pytest.raises(DeviceError, match="^cuGraphGetNodes failed with CUDA_ERROR_NOT_PERMITTED: made up"):
        graph_nodes.describe_graph(0)


def test_a_description_counts_nodes_and_launches(answers: Install) -> None:
    answers(Launch("scale"), Other("EMPTY"), Launch("scale"), Launch("gather"))
    nodes, _, launches = graph_nodes.describe_graph(0)
    assert nodes == 4
    assert launches == {"scale": 2, "gather": 1}


def test_the_fingerprint_tells_names_grids_edges_and_kinds_of_edges_apart(answers: Install) -> None:
    def fingerprint(*nodes: Node, edges: Iterable[Edge] = ()) -> str:
        answers(*nodes, edges=edges)
        return graph_nodes.describe_graph(0)[1]

    three = [Launch("a"), Launch("b"), Launch("c")]
    chain = [(0, 1, 0), (1, 2, 0)]
    different = [
        fingerprint(*three, edges=chain),
        fingerprint(*three, edges=[(0, 1, 0), (0, 2, 0)]),
        fingerprint(*three, edges=[(0, 1, 0), (1, 2, 1)]),
        fingerprint(*three),
        fingerprint(Launch("a"), Launch("b"), Launch("d"), edges=chain),
        fingerprint(Launch("a"), Launch("b"), Launch("c", grid=(2, 1, 1)), edges=chain),
        fingerprint(),
    ]
    assert len(set(different)) == len(different)
    assert fingerprint(*three, edges=reversed(chain)) == different[0], "edges have no order"


def test_bindings_that_free_what_they_say_of_an_edge_are_not_asked(
    answers: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 13.3 they did (NVIDIA/cuda-python issue 1804): the same graph would have another fingerprint each time."""
    monkeypatch.setattr(graph_nodes, "_EDGE_DATA_LIVES", False)
    answers(Launch("a"), Launch("b"), edges=[(0, 1, 0)])
    ordinary = graph_nodes.describe_graph(0)[1]
    answers(Launch("a"), Launch("b"), edges=[(0, 1, 1)])
    assert graph_nodes.describe_graph(0)[1] == ordinary
