"""Eager breaks: operations that a captured step leaves out, and that run as ordinary calls between its pieces.

A program marks them; who captures says with `cutting` what becomes of them; who launches says with `running` for which
step. A captured break keeps no tensor among its arguments, in lists and dicts neither, but its address.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from functools import update_wrapper
from typing import overload

import torch

from graphexec.errors import CaptureError
from graphexec.plan import GraphKey, StepPlan

__all__ = [
    "BreakCall",
    "CapturedStep",
    "Cuts",
    "EagerBreak",
    "RunningStep",
    "cutting",
    "eager_break",
    "running",
    "running_step",
]


@dataclass(frozen=True, slots=True)
class RunningStep:
    """The step that an eager break belongs to.

    Attributes:
        key: its padded shape.
        plan: what it should do, as it was submitted. In a warm-up it has no delta: `exercise` has set the slots. Code
            that a graph holds may not ask for it: CaptureError.
        host: the program's `host`.
    """

    key: GraphKey
    plan: StepPlan
    host: object


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class CapturedStep(RunningStep):
    """What code that a graph holds finds as its step: whose plan it would be, nobody can say."""

    def __getattribute__(self, name: str) -> object:
        if name == "plan":
            raise CaptureError(
                "running_step().plan is that of one submitted step, and this code is captured: its graph would repeat "
                "what it found then. Ask for it in an eager break that ends a piece, or in before_launch."
            )
        return object.__getattribute__(self, name)


class Cuts(Enum):
    """At which eager breaks a capture ends a piece."""

    NONE = "none"
    MARKED = "marked"
    """At all but the optional ones."""
    ALL = "all"

    def honours(self, optional: bool) -> bool:
        """Whether a piece ends at a break that is optional, or at one that is not."""
        return self is Cuts.ALL or (self is Cuts.MARKED and not optional)


Prepare = Callable[..., Callable[[], None]]


@dataclass(frozen=True, slots=True)
class BreakCall:
    """One call of an eager break."""

    function: Callable[..., object]
    arguments: tuple[object, ...]
    optional: bool = False
    prepare: Prepare | None = None

    def run(self) -> None:
        """Makes the call at once.

        Raises:
            CaptureError: it returns something.
        """
        if self.function(*self.arguments) is not None:
            raise CaptureError(
                f"The eager break {self.function.__qualname__} returns something, which a graph cannot receive. Take "
                "an output tensor as an argument, write into it, and return None."
            )

    def prepared(self) -> Callable[[], None]:
        """The call as every replay makes it."""
        return self.run if self.prepare is None else self.prepare(*self.arguments)


Cutter = Callable[[BreakCall], None]

_running: ContextVar[RunningStep | None] = ContextVar("graphexec_running_step", default=None)
_cutter: ContextVar[tuple[Cutter, Cuts] | None] = ContextVar("graphexec_cutter", default=None)


def running_step() -> RunningStep:
    """The running step, for an eager break.

    Raises:
        CaptureError: no step of a backend is running.
    """
    step = _running.get()
    if step is None:
        raise CaptureError(
            "No step is running. running_step() is for eager breaks; before_launch is given its key and plan."
        )
    return step


@contextmanager
def running(step: RunningStep) -> Iterator[None]:
    """Within the block, eager breaks belong to `step`."""
    token = _running.set(step)
    try:
        yield
    finally:
        _running.reset(token)


@contextmanager
def cutting(cutter: Cutter, cuts: Cuts) -> Iterator[None]:
    """Within the block, eager breaks at which `cuts` ends a piece go to `cutter` and do not run by themselves."""
    token = _cutter.set((cutter, cuts))
    try:
        yield
    finally:
        _cutter.reset(token)


class EagerBreak:
    """A function at which a capture in pieces ends one piece and begins the next. Made by `eager_break`."""

    def __init__(self, function: Callable[..., None], writes: Sequence[str] | None, optional: bool) -> None:
        _check_signature(function, writes)
        self.optional = optional
        self._function = function
        self._prepare: Prepare | None = None
        self._operator = None if writes is None else _operator(function, self._break, writes)
        update_wrapper(self, function)

    def __call__(self, *arguments: object) -> None:
        if self._operator is not None and torch.compiler.is_compiling():
            self._operator(*arguments)
        else:
            self._break(*arguments)

    def prepare(self, function: Prepare) -> Prepare:
        """Marks the function that does, once after a capture, what need not be done in every replay.

        It has the parameters of the break, knows no running step but a warm-up's, and returns the call that replays
        make instead: e.g. a launch whose checks,
        views and choices are behind it. The stream of the replays is current. What differs between steps must not be
        settled here, nor may a tensor be kept that the step allocated: keep its address.
        """
        self._prepare = function
        return function

    def _break(self, *arguments: object) -> None:
        call = BreakCall(self._function, arguments, self.optional, self._prepare)
        cutter, cuts = _cutter.get() or (None, Cuts.NONE)
        if cutter is not None and cuts.honours(self.optional):
            cutter(call)
        else:
            call.run()


@overload
def eager_break(function: Callable[..., None], /) -> EagerBreak: ...
@overload
def eager_break(
    *, writes: Sequence[str] | None = None, optional: bool = False
) -> Callable[[Callable[..., None]], EagerBreak]: ...
def eager_break(
    function: Callable[..., None] | None = None, /, *, writes: Sequence[str] | None = None, optional: bool = False
) -> EagerBreak | Callable[[Callable[..., None]], EagerBreak]:
    """Marks a function (of positional arguments, no method) that no graph can hold: the host plans it, or it waits.

    Captured in pieces, a step is graph, call, graph, call, ...: each replay calls the function again, on the compute
    stream, with the arguments of the capture: tensors at the same addresses, everything else as it was. `running_step`
    tells it the step's own key and plan, and the program's host object. It returns nothing; it writes into tensors that
    it is given, which belong to the pool of the graphs if the step allocated them.

    While a step runs eagerly the function is an ordinary call, and in a capture of a whole graph it is captured.

    Args:
        writes: names of the parameters that it writes to. The function becomes an operator that torch.compile does not
            look into, and needs annotations that `torch.library.infer_schema` understands. None: an ordinary function,
            which compiled code cannot contain.
        optional: whether a capture by default ("None") goes through it, and only "piecewise" breaks here.
    """

    def mark(function: Callable[..., None]) -> EagerBreak:
        return EagerBreak(function, writes, optional)

    return mark if function is None else mark(function)


def _check_signature(function: Callable[..., None], writes: Sequence[str] | None) -> None:
    """Refuses what would only be found out at a call.

    Raises:
        TypeError: says what is wrong with the function or with `writes`.
    """
    if not callable(function):
        raise TypeError(f"@eager_break({function!r}): give `writes=` and `optional=` by name.")
    names = list(inspect.signature(function).parameters)
    if names[:1] == ["self"]:
        raise TypeError(
            f"{function.__qualname__} is a method, and an eager break is a function: it finds its object as "
            "running_step().host."
        )
    wrong = [writes] if isinstance(writes, str) else [name for name in writes or () if name not in names]
    if wrong:
        raise TypeError(
            f"writes={writes!r} of {function.__qualname__} must be a list of its parameters: {', '.join(names)}."
        )


_LIBRARY = torch.library.Library("graphexec_breaks", "DEF")  # type: ignore[no-untyped-call]  # torch's class


def _operator(
    function: Callable[..., None], implementation: Callable[..., None], writes: Sequence[str]
) -> Callable[..., None]:
    """Registers `implementation` under the signature of `function`."""
    plain = f"{function.__module__}.{function.__qualname__}".replace(".", "_").replace("<locals>", "local")
    name, count = plain, 1
    while hasattr(torch.ops.graphexec_breaks, name):  # a function made twice is two breaks
        count += 1
        name = f"{plain}_{count}"
    schema = torch.library.infer_schema(function, mutates_args=tuple(writes))
    _LIBRARY.define(name + schema)  # type: ignore[no-untyped-call]  # torch's methods
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]  # likewise
    torch.library.register_fake(f"graphexec_breaks::{name}", lambda *arguments: None, lib=_LIBRARY)
    operator: Callable[..., None] = getattr(torch.ops.graphexec_breaks, name).default
    return operator
