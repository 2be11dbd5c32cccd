"""The layout of a packed batch of deltas: what the host writes, the kernel reads and the reference means by it.

`[header | entries | payload]` in int32 words, one entry a slot (F8), the payload right behind the last entry. An entry
is `[control | parameters | stop ids]`; the latter two are read only where the slot gets a new owner.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

from graphexec.kernels.state import PARAMETERS

__all__ = [
    "ADMIT",
    "ARM",
    "CONTROL",
    "ENTRY_WORDS",
    "HEADER_WORDS",
    "PROGRESS",
    "RELEASE",
    "pack_control",
    "pack_parameters",
    "word_of",
]

HEADER_WORDS = 4
"""Number of entries, step number, 0, 0."""

ADMIT = 1
"""The slot gets a new owner: its parameters and lists are set, its block table starts empty."""
ARM = 2
"""`query_len` is set: the slot computes that many tokens in the step of this delta."""
RELEASE = 4
"""The slot stops running (abort, preemption)."""

CONTROL = (
    "slot", "flags", "query_len",
    "first_token", "tokens", "token_offset",
    "first_block", "blocks", "block_offset",
    "biases", "bias_offset",  # ids, then values
    "stop_sequences", "stop_sequence_offset",  # W words each
)  # fmt: skip
"""The first words of every entry. Offsets count words from the beginning of the payload. The lists in the last two
lines are an admission's, like the parameters behind them."""

PROGRESS = ("seq_len", "num_tokens")
"""The first of the parameters: how far the new owner is, where the others say what it asked for."""

_FORMATS = {torch.int32: "i", torch.float32: "f", torch.int64: "q"}
_FIXED = [parameter for parameter in PARAMETERS if parameter.name not in PROGRESS]
_CONTROL = struct.Struct(f"={len(CONTROL) + len(PROGRESS)}i")
_PARAMETERS = struct.Struct("=" + "".join(_FORMATS[parameter.dtype] for parameter in _FIXED))


def _layout() -> tuple[dict[str, int], int]:
    words = {name: word for word, name in enumerate(CONTROL)}
    used = len(CONTROL)
    for parameter in PARAMETERS:
        words[parameter.name] = used
        used += parameter.dtype.itemsize // 4
    return words, used


_WORDS, ENTRY_WORDS = _layout()
"""ENTRY_WORDS: words of an entry before its stop ids."""


def word_of(name: str) -> int:
    """The word of an entry at which a field of CONTROL or a parameter begins."""
    return _WORDS[name]


def pack_control(words: Sequence[int], progress: tuple[int, int] = (0, 0)) -> bytes:
    """The beginning of an entry: the words of CONTROL, then the values of PROGRESS."""
    return _CONTROL.pack(*words, *progress)


def pack_parameters(owner: object) -> bytes:
    """What stands behind that, up to the stop ids: the attributes of `owner` by the names of the other parameters."""
    return _PARAMETERS.pack(*(getattr(owner, parameter.name) for parameter in _FIXED))
