"""A mailbox: outputs that wait for their reader, one for each request however many steps pass until it comes."""

from __future__ import annotations

from graphexec.engine.outputs.output import RequestOutput

__all__ = ["Mailbox"]


class Mailbox:
    """Keeps outputs by request and sample, in the order in which their first ones came.

    The engine's lock protects it, but for `close`, which may be called from anywhere.

    Attributes:
        expected: last outputs of requests that are still to come.
    """

    def __init__(self, expected: int = 0) -> None:
        self.expected = expected
        self._outputs: dict[tuple[str, int], RequestOutput] = {}
        self._open = True

    def __bool__(self) -> bool:
        return bool(self._outputs)

    def put(self, output: RequestOutput) -> None:
        """Keeps an output; what is here of the same request and it become one."""
        self.expected -= output.finished
        if self._open:
            key = output.key
            held = self._outputs.get(key)
            self._outputs[key] = output if held is None else held.joined(output)

    def take(self) -> list[RequestOutput]:
        """Takes out everything."""
        if not self._outputs:
            return []
        outputs, self._outputs = self._outputs, {}
        return list(outputs.values())

    def close(self) -> None:
        """Its reader has gone: from now on what is put in is dropped."""
        self._open = False
