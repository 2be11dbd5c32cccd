"""The outputs of one request as an iterator."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from graphexec.engine.outputs.output import RequestOutput

__all__ = ["RequestStream"]


class RequestStream(Iterator[RequestOutput]):
    """The outputs of one request. Closing it, or losing the last reference to it, aborts the request.

    Args:
        request_id: of the request.
        num_samples: outputs that will be finished.
        read: waits for outputs of the request; None when there will be none any more.
        abandon: aborts the request, whose outputs nobody takes any more; may be called by the garbage collector.
    """

    def __init__(
        self,
        request_id: str,
        num_samples: int,
        read: Callable[[], list[RequestOutput] | None],
        abandon: Callable[[], None],
    ) -> None:
        self.request_id = request_id
        self._running = num_samples
        self._read = read
        self._abandon = abandon
        self._ready: deque[RequestOutput] = deque()

    def __next__(self) -> RequestOutput:
        while not self._ready and self._running:
            outputs = self._read()
            if outputs is None:
                self._running = 0
            self._ready.extend(outputs or ())
        if not self._ready:
            raise StopIteration
        output = self._ready.popleft()
        self._running -= output.finished
        return output

    def close(self) -> None:
        """Aborts the request if it has not finished."""
        if self._running:
            self._running = 0
            self._abandon()

    def __del__(self) -> None:
        self.close()
