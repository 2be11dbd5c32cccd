"""Captured graphs on CUDA, whole or in pieces, and the recorder that makes them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch.utils._pytree import tree_map_only

from graphexec.errors import DeviceError
from graphexec.runtime import cudart, graph_nodes
from graphexec.runtime.arguments import NodeArguments
from graphexec.runtime.base import Graph, GraphInfo
from graphexec.runtime.breaks import BreakCall
from graphexec.runtime.cuda_memory import unowned

__all__ = ["CudaGraph", "CudaPieces", "Recorder"]


class CudaGraph(Graph):
    """An instantiated graph and the graph that it was made from."""

    def __init__(self, graph: object, executable: object) -> None:
        self._graph = graph
        self.executable = executable

    def describe(self) -> GraphInfo:
        nodes, fingerprint, launches = graph_nodes.describe_graph(self._graph)
        return GraphInfo(nodes, sum(launches.values()), fingerprint, launches)

    def arguments(self) -> list[NodeArguments]:
        return graph_nodes.read_arguments(self._graph)

    @property
    def has_breaks(self) -> bool:
        return False

    @property
    def breaks(self) -> int:
        return 0

    def close(self) -> None:
        cudart.destroy_executable(self.executable)
        cudart.destroy_graph(self._graph)


class CudaPieces(Graph):
    """Graphs, with the calls of eager breaks between them."""

    def __init__(self, pieces: Sequence[CudaGraph | BreakCall], stream: cudart.Handle) -> None:
        self._graphs = [piece for piece in pieces if isinstance(piece, CudaGraph)]
        self._breaks = [piece for piece in pieces if isinstance(piece, BreakCall)]
        self._calls = [_call_of(piece, stream) for piece in pieces]

    @property
    def has_breaks(self) -> bool:
        return True

    @property
    def breaks(self) -> int:
        return len(self._breaks)

    def replay(self) -> None:
        """Enqueues graphs and breaks in their order, the latter on the current stream."""
        for call in self._calls:
            call()

    def describe(self) -> GraphInfo:
        infos = [graph.describe() for graph in self._graphs]
        launches = sum((Counter(info.launches) for info in infos), Counter[str]())
        words = [*(info.fingerprint for info in infos), *(call.function.__qualname__ for call in self._breaks)]
        return GraphInfo(
            nodes=sum(info.nodes for info in infos),
            kernels=sum(info.kernels for info in infos),
            fingerprint=hashlib.sha256(" ".join(words).encode()).hexdigest()[:16],
            launches=dict(launches),
        )

    def arguments(self) -> list[NodeArguments]:
        return [node for graph in self._graphs for node in graph.arguments()]

    def close(self) -> None:
        self._calls.clear()
        for graph in self._graphs:
            graph.close()


def _call_of(piece: CudaGraph | BreakCall, stream: cudart.Handle) -> Callable[[], None]:
    if isinstance(piece, CudaGraph):
        return partial(cudart.launch_graph, piece.executable, stream)
    return piece.prepared()


class Recorder:
    """The pieces of one capture. Whatever goes wrong, `abandon` ends the capture and frees what there is."""

    def __init__(self, stream: cudart.Handle) -> None:
        self._stream = stream
        self._pieces: list[cudart.Handle | BreakCall] = []
        self._made: list[CudaGraph] = []
        self._capturing = False

    def begin(self) -> None:
        cudart.begin_capture(self._stream)
        self._capturing = True

    def end(self) -> None:
        """Ends a piece."""
        self._capturing = False
        self._pieces.append(cudart.end_capture(self._stream))

    def cut(self, call: BreakCall) -> None:
        """Ends a piece at a break, and begins the next one. Tensors of the call become views that own nothing."""
        self.end()
        if cudart.is_empty(self._pieces[-1]):  # nothing lies between two breaks
            cudart.destroy_graph(self._pieces.pop())
        arguments = tree_map_only(torch.Tensor, unowned, call.arguments)
        self._pieces.append(replace(call, arguments=arguments))
        self.begin()

    def instantiate(self) -> CudaGraph | CudaPieces:
        pieces: list[CudaGraph | BreakCall] = []
        while self._pieces:
            piece = self._pieces[0]
            if not isinstance(piece, BreakCall):
                piece = CudaGraph(piece, cudart.instantiate(piece, self._stream))
                self._made.append(piece)
            pieces.append(piece)
            del self._pieces[0]
        first = pieces[0]
        if len(pieces) == 1 and isinstance(first, CudaGraph):
            return first
        return CudaPieces(pieces, self._stream)

    def abandon(self) -> None:
        if self._capturing:
            with suppress(DeviceError):  # the capture may have been invalidated, and has ended all the same
                cudart.destroy_graph(cudart.end_capture(self._stream))
        for graph in self._made:
            graph.close()
        for piece in self._pieces:
            if not isinstance(piece, BreakCall):
                cudart.destroy_graph(piece)
