"""A lint for steps on the CPU: what a capture on CUDA would refuse, or repeat for ever, is an error here too.

The references in `graphexec.kernels` may do all that: on CUDA a kernel stands in their place.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from graphexec.errors import CaptureError
from graphexec.runtime.breaks import BreakCall, Cuts, RunningStep, cutting, running

__all__ = ["capture_lint"]

_ON_THE_HOST = "brings values to the host, which a captured step cannot wait for"
_SIZED_BY_VALUES = "has a result whose size depends on values, which the host would have to read"
_DRAWS = "draws random numbers of torch's generators, which a replay would draw again"

_OPERATORS = {
    "aten::_local_scalar_dense": _ON_THE_HOST,
    "aten::equal": _ON_THE_HOST,
    "aten::is_nonzero": _ON_THE_HOST,
    "aten::nonzero": _SIZED_BY_VALUES,
    "aten::masked_select": _SIZED_BY_VALUES,
    "aten::_unique2": _SIZED_BY_VALUES,
    "aten::unique_dim": _SIZED_BY_VALUES,
    "aten::unique_consecutive": _SIZED_BY_VALUES,
    "aten::bincount": _SIZED_BY_VALUES,
}
_METHODS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}
_OURS = "graphexec.kernels"
_in_break: ContextVar[bool] = ContextVar("graphexec_lint_in_break", default=False)
_NOT_THE_CAUSE = ("torch", __name__, "contextlib")


@contextmanager
def capture_lint(cuts: Cuts = Cuts.NONE, step: RunningStep | None = None) -> Iterator[None]:
    """Inside, operations that a capture would refuse raise, except in eager breaks that `cuts` honours.

    Those breaks are told `step`, if there is one.

    Raises:
        CaptureError: names the operation, why it is refused, and the line that asked for it.
    """

    def run(call: BreakCall) -> None:
        is_cut = _in_break.get() or cuts.honours(call.optional)
        token = _in_break.set(is_cut)
        try:
            with running(step) if is_cut and step is not None else nullcontext():
                call.run()
        finally:
            _in_break.reset(token)

    with _Methods(), _Operators(), cutting(run, Cuts.ALL):  # type: ignore[no-untyped-call]  # torch's class
        yield


class _Methods(TorchFunctionMode):
    """Sees what never reaches the dispatcher: methods that read memory at once."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _METHODS:
            _refuse(f"Tensor.{func.__name__}", _ON_THE_HOST)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's class
    """Sees every operator."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        reason = _OPERATORS.get(name)
        if reason is None and torch.Tag.nondeterministic_seeded in func.tags:
            reason = _DRAWS
        if reason is None and name in ("aten::index", "aten::index_put", "aten::index_put_"):
            masked = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
            reason = _SIZED_BY_VALUES if masked and (name == "aten::index" or args[2].numel() != 1) else None
        if reason is None and name == "aten::repeat_interleave" and not (kwargs or {}).get("output_size"):
            reason = _SIZED_BY_VALUES
        if reason is not None:
            _refuse(name, reason)
        return func(*args, **(kwargs or {}))


def _refuse(operation: str, reason: str) -> None:
    """Raises, unless an eager break or a reference of ours asked for the operation."""
    if _in_break.get():
        return
    frame: FrameType | None = sys._getframe(2)
    cause: FrameType | None = None
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(_OURS):
            return
        if cause is None and not module.startswith(_NOT_THE_CAUSE):
            cause = frame
        frame = frame.f_back
    where = "an unknown line"
    if cause is not None:
        where = f"line {cause.f_lineno} of {inspect.getsourcefile(cause) or '?'}, in {cause.f_code.co_name}"
    raise CaptureError(f"{operation} {reason}; {where}.")
