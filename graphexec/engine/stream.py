"""The outputs of one request as an iterator."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from graphexec.engine.request import RequestOutput

if TYPE_CHECKING:
    from graphexec.engine.engine import Engine

__all__ = ["RequestStream"]


class RequestStream(Iterator[RequestOutput]):
    """The outputs of one request. Closing it, or losing the last reference to it, aborts the request."""

    def __init__(self, engine: Engine, request_id: str, num_samples: int) -> None:
        self.request_id = request_id
        self._engine = engine
        self._ready: deque[RequestOutput] = deque()
        self._running = num_samples

    def __next__(self) -> RequestOutput:
        while not self._ready and self._running:
            outputs = self._engine.advance_for(self.request_id)
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
            self._engine.abandon(self.request_id)

    def __del__(self) -> None:
        self.close()
