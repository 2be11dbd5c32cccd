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

    def __init__(self, engine: Engine, request_id: str) -> None:
        self.request_id = request_id
        self._engine = engine
        self._ready: deque[RequestOutput] = deque()
        self._finished = False

    def __next__(self) -> RequestOutput:
        while not self._ready and not self._finished:
            outputs = self._engine.advance_for(self.request_id)
            self._finished = outputs is None
            self._ready.extend(outputs or ())
        if not self._ready:
            raise StopIteration
        output = self._ready.popleft()
        self._finished = output.finished
        return output

    def close(self) -> None:
        """Aborts the request if it has not finished."""
        if not self._finished:
            self._finished = True
            self._engine.abandon(self.request_id)

    def __del__(self) -> None:
        self.close()
