"""What the nodes of a captured graph were given, as plain data: two captures can be compared without a device."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["POINTER_BYTES", "Argument", "NodeArguments"]

POINTER_BYTES = 8


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel.

    Attributes:
        data: its bytes, with zeros where it holds an address: those differ from capture to capture.
        pointers: offsets of the words, of `POINTER_BYTES` each, that hold the address of memory that CUDA knows.
        leftovers: offsets of the words that hold an address of the host's own memory, for which no kernel has a use:
            the struct has padding there, and nobody cleared what the stack or the heap held before.
    """

    data: bytes
    pointers: tuple[int, ...] = ()
    leftovers: tuple[int, ...] = ()


@dataclass(frozen=True)
class NodeArguments:
    """One node of a graph.

    Attributes:
        name: of the kernel, as the driver knows it; of other nodes, their kind.
        kind: "kernel", "memset", "memcpy" or whatever else the driver has.
        sizes: of a kernel its grid (3 numbers), its block (3) and the bytes of its dynamic shared memory; of a memset
            its width in elements, its height and the bytes of an element; of a memcpy its width in bytes, its height
            and its depth.
        arguments: of a kernel all of them, in order; of a memset its value; None if they cannot be read.
        why_unread: the reason, where they cannot be read.
    """

    name: str
    kind: str
    sizes: tuple[int, ...]
    arguments: tuple[Argument, ...] | None
    why_unread: str = ""
