"""The captured graphs of one program: one pool, one graph for a key, no capture once sealed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from graphexec.config import CaptureMode
from graphexec.errors import CaptureError
from graphexec.plan import GraphKey
from graphexec.runtime import Cuts, Graph, Runtime, Stream

__all__ = ["GraphSet", "frozen_garbage_collection"]


@contextmanager
def frozen_garbage_collection() -> Iterator[None]:
    """Keeps the collector from freeing device memory, modules or streams in the middle of a capture.

    A heap that its owner has frozen already stays frozen.
    """
    was_enabled, was_frozen = gc.isenabled(), gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if not was_frozen:
            gc.unfreeze()
        if was_enabled:
            gc.enable()


class GraphSet:
    """Graphs whose replays never overlap (one stream), and which therefore share a memory pool."""

    def __init__(self, runtime: Runtime, stream: Stream) -> None:
        self._runtime = runtime
        self._stream = stream
        self._pool = runtime.pool()
        self._graphs: dict[GraphKey, Graph] = {}
        self._unkeyed: list[Graph] = []
        self._sealed = False

    @property
    def empty(self) -> bool:
        """Whether nothing has been captured."""
        return not self._graphs

    def get(self, key: GraphKey) -> Graph | None:
        """The graph of a key, or None if there is none."""
        return self._graphs.get(key)

    def mode(self, has_chunks: bool) -> CaptureMode:
        """Whether steps with prompt chunks, or those without, have graphs in pieces."""
        in_pieces = any(graph.breaks for key, graph in self._graphs.items() if key.has_chunks is has_chunks)
        return "piecewise" if in_pieces else "full"

    def capture(self, key: GraphKey, work: Callable[[], None], cuts: Cuts = Cuts.NONE) -> Graph:
        """Captures `work` as the graph for `key`, in pieces where it meets eager breaks that `cuts` honours.

        Raises:
            CaptureError: the set is sealed, or the capture failed; the cause is chained, and other graphs still work.
        """
        if self._sealed:
            raise CaptureError(f"The graph set is sealed, and has no graph for the {key}.")
        try:
            graph = self._runtime.capture(work, self._stream, self._pool, cuts)
        except Exception as failure:
            raise CaptureError(
                f"Capturing the {key} failed: {type(failure).__name__}: {failure} "
                "A captured step must not wait for the device, read values on the host, or allocate outside torch; "
                "what must can be an eager break (graphexec.eager_break)."
            ) from failure
        self._graphs[key] = graph
        return graph

    def capture_unkeyed(self, work: Callable[[], None]) -> Graph:
        """Captures work that belongs to no step into the same pool."""
        graph = self._runtime.capture(work, self._stream, self._pool)
        self._unkeyed.append(graph)
        return graph

    def discard(self, key: GraphKey) -> None:
        """Frees the graph of a key, if there is one; its replays must all have finished."""
        graph = self._graphs.pop(key, None)
        if graph is not None:
            graph.close()

    def seal(self) -> None:
        """After this, a step without a graph runs eagerly and is counted; nothing is captured behind one's back."""
        self._sealed = True

    @property
    def sealed(self) -> bool:
        return self._sealed

    def close(self) -> None:
        """Frees all graphs, then the pool. The stream must have drained (F7)."""
        for graph in (*self._graphs.values(), *self._unkeyed):
            graph.close()
        self._graphs.clear()
        self._unkeyed.clear()
        self._pool = None
