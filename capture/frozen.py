"""Finds host numbers that were frozen into a graph: captures of one step under other metadata must not differ.

Each of two sets of metadata is captured twice. Addresses are left out. Padding inside a struct holds whatever was
there before, so a byte tells something only where both captures of a set agree; four bytes alone have no room for
padding, nor have names and sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from graphexec.errors import CaptureError
from graphexec.plan import GraphKey
from graphexec.runtime.arguments import POINTER_BYTES, Argument, NodeArguments

__all__ = ["Captures", "FrozenCheck", "compare_captures"]

Captures = tuple[Sequence[NodeArguments], Sequence[NodeArguments]]
"""The nodes of two captures of a step under the same metadata."""

_WORD = 4
_ADDRESS = 256
"""Stands for a byte of an address: no byte's value."""
_LEFTOVER = 257
"""Stands for a byte of padding in which the host's memory left an address."""


@dataclass(frozen=True)
class FrozenCheck:
    """What the captures of one step say.

    Attributes:
        key: the step.
        leaks: sentences, each about a number of the host that was frozen into the graph.
        checked: nodes whose parameters were compared.
        unchecked: nodes whose parameters cannot be read, with the reason: nothing is known of them.
        noise: arguments, of nodes that were compared, with bytes that differ between captures under the same metadata.
            That is padding, or a number that changes with every capture, whatever the metadata: nothing is known of
            those bytes.
    """

    key: GraphKey
    leaks: tuple[str, ...]
    checked: int
    unchecked: tuple[str, ...]
    noise: tuple[str, ...] = ()

    def raise_for_leaks(self) -> None:
        """Does nothing for a step without leaks.

        Raises:
            CaptureError: names the step, the kernel and the argument of the first leak.
        """
        if self.leaks:
            others = f" (and {len(self.leaks) - 1} more)" if len(self.leaks) > 1 else ""
            raise CaptureError(
                f"A host number was frozen into the graph of the {self.key}: {self.leaks[0]}{others}. "
                "Put it into the key, or keep it on the device."
            )


def compare_captures(key: GraphKey, first: Captures, second: Captures) -> FrozenCheck:
    """Compares two captures under some metadata with two under other metadata.

    What kernels are launched, and with which sizes, must be the same in all four. Whether the host chose among
    addresses is not found: those differ in any case.
    """
    captures = [*first, *second]
    if len({len(nodes) for nodes in captures}) > 1:
        return FrozenCheck(key, (_other_count(captures),), 0, ())
    leaks: list[str] = []
    unchecked: list[str] = []
    noise: list[str] = []
    for index, nodes in enumerate(zip(*captures, strict=True)):
        label = f"node {index}, {nodes[0].name}"
        structure = _other_structure(nodes)
        leaks += [f"{label}, {structure}"] if structure else []
        unread = [node.why_unread for node in nodes if node.arguments is None]
        if unread:
            unchecked.append(f"{label}: {unread[0]}")
        elif len({node.name for node in nodes}) == 1:
            for place, arguments in enumerate(zip(*(node.arguments or () for node in nodes), strict=False)):
                leaked, unsteady = _compare_arguments(arguments)
                leaks += [f"{label}, argument {place}: {difference}" for difference in leaked]
                noise += [f"{label}, argument {place}: {difference}" for difference in unsteady]
    return FrozenCheck(key, tuple(leaks), len(captures[0]) - len(unchecked), tuple(unchecked), tuple(noise))


def _other_count(captures: Sequence[Sequence[NodeArguments]]) -> str:
    counts = " and ".join(str(count) for count in dict.fromkeys(len(nodes) for nodes in captures))
    shortest = min(len(nodes) for nodes in captures)
    apart = next((at for at in range(shortest) if len({nodes[at].name for nodes in captures}) > 1), shortest)
    names = " or ".join(dict.fromkeys(nodes[apart].name if apart < len(nodes) else "nothing" for nodes in captures))
    return f"captures have {counts} nodes; node {apart} is {names}"


def _other_structure(nodes: Sequence[NodeArguments]) -> str:
    """How nodes in the same place differ, or nothing."""
    if len({(node.kind, node.name) for node in nodes}) > 1:
        return "is " + " or ".join(dict.fromkeys(f"{node.kind} {node.name}" for node in nodes))
    if len({node.sizes for node in nodes}) > 1:
        return "is launched with " + " or ".join(dict.fromkeys(_sizes(node) for node in nodes))
    layouts = {tuple(len(each.data) for each in node.arguments) for node in nodes if node.arguments is not None}
    return "takes other arguments" if len(layouts) > 1 else ""


def _sizes(node: NodeArguments) -> str:
    if node.kind != "kernel":
        return f"sizes {node.sizes}"
    return f"grid {node.sizes[:3]}, block {node.sizes[3:6]}, {node.sizes[6]} bytes of shared memory"


def _compare_arguments(arguments: Sequence[Argument]) -> tuple[list[str], list[str]]:
    """What differs between the metadata, and which bytes differ under the same."""
    if len({len(each.data) for each in arguments}) > 1:
        return [], []  # other arguments altogether, which is said of the node
    size = len(arguments[0].data)
    columns = list(zip(*(_symbols(each) for each in arguments), strict=True))
    unsteady = {
        at
        for at, (one, two, three, four) in enumerate(columns)
        if one != two or three != four or _LEFTOVER in (one, three)
    }
    leaked = {at for at, (one, _, three, _) in enumerate(columns) if at not in unsteady and one != three}
    if size == _WORD:
        leaked, unsteady = leaked | unsteady, set()
    differences = []
    for begin, end in _ranges({word for at in leaked for word in _word_around(at, size)}):
        values = " or ".join(dict.fromkeys(_value(each, begin, end) for each in arguments))
        differences.append(f"bytes {begin} to {end - 1} of {size} hold {values}")
    return differences, [f"bytes {begin} to {end - 1} of {size}" for begin, end in _ranges(unsteady)]


def _symbols(argument: Argument) -> list[int]:
    """The bytes, those of addresses apart: an address is like any other, and unlike every number."""
    symbols = list(argument.data)
    for at in argument.pointers:
        symbols[at : at + POINTER_BYTES] = [_ADDRESS] * POINTER_BYTES
    for at in argument.leftovers:
        symbols[at : at + POINTER_BYTES] = [_LEFTOVER] * POINTER_BYTES
    return symbols


def _word_around(at: int, size: int) -> range:
    """The aligned word that a byte belongs to: numbers are shown whole."""
    begin = at // _WORD * _WORD
    return range(begin, min(begin + _WORD, size))


def _ranges(places: set[int]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive numbers, each as its first and the one behind its last."""
    for begin in sorted(at for at in places if at - 1 not in places):
        end = begin
        while end in places:
            end += 1
        yield begin, end


def _value(argument: Argument, begin: int, end: int) -> str:
    if any(at < end and begin < at + POINTER_BYTES for at in argument.pointers):
        return "an address"
    value = argument.data[begin:end]
    return str(int.from_bytes(value, "little")) if len(value) in (_WORD, 2 * _WORD) else f"0x{value.hex()}"
