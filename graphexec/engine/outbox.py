"""Outputs that nobody has asked for yet: one for each request, however many steps pass until somebody does."""

from __future__ import annotations

from collections.abc import Iterable

from graphexec.engine.request import RequestOutput

__all__ = ["Outbox"]


class Outbox:
    """Keeps outputs by request, in the order in which requests came."""

    def __init__(self) -> None:
        self._outputs: dict[tuple[str, int], RequestOutput] = {}

    def __bool__(self) -> bool:
        return bool(self._outputs)

    def put(self, outputs: Iterable[RequestOutput]) -> None:
        """Keeps outputs; what is here of the same request and they become one."""
        for output in outputs:
            held = self._outputs.get(output.key)
            self._outputs[output.key] = output if held is None else held.joined(output)

    def take(self, request_id: str) -> list[RequestOutput]:
        """Takes out what belongs to one request id."""
        return [self._outputs.pop(key) for key in [*self._outputs] if key[0] == request_id]

    def take_all(self) -> list[RequestOutput]:
        """Takes out everything."""
        outputs, self._outputs = self._outputs, {}
        return list(outputs.values())
