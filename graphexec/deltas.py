"""Deltas: the host's changes to the slots in one step, merged to one entry a slot (F8) and packed for the device."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from graphexec.kernels.delta_layout import (
    ADMIT,
    ARM,
    HEADER_WORDS,
    RELEASE,
    pack_control,
    pack_parameters,
    word_of,
)
from graphexec.plan import Delta, Int32Array
from graphexec.slots import SlotLimits

__all__ = ["Admission", "SlotDeltas", "as_words"]

IntArray = NDArray[np.int64]

_WORD_BYTES = 4
_MINUS_ONE = b"\xff" * _WORD_BYTES


def as_words(numbers: Sequence[int]) -> bytes:
    """Numbers as int32 words, which can be compared, hashed and copied at once."""
    return array("i", numbers).tobytes()


@dataclass(frozen=True, slots=True)
class Admission:
    """What a slot learns about its new owner, but for how far that is: the parameters of SlotTensors, and lists.

    Attributes:
        biases: pairs of a token id and what is added to its logit; no id twice.
        stop_sequences: each of one token or more.
    """

    max_len: int
    min_len: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop_ids: tuple[int, ...]
    prompt_len: int = 0
    log_min_p: float = -math.inf
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    biases: tuple[tuple[int, float], ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    packed: bytes = field(init=False, repr=False, compare=False)
    """What its entry says beside where the lists stand: parameters and stop ids."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "packed", pack_parameters(self) + as_words(self.stop_ids))

    def bias_words(self) -> bytes:
        """Ids, then values."""
        if not self.biases:
            return b""
        ids, values = zip(*self.biases, strict=True)
        return as_words(ids) + struct.pack(f"={len(values)}f", *values)

    def stop_sequence_words(self, width: int) -> bytes:
        """Each sequence at the end of `width` words, behind -1."""
        return b"".join(_MINUS_ONE * (width - len(each)) + as_words(each) for each in self.stop_sequences)


@dataclass(slots=True)
class _SlotDelta:
    flags: int = 0
    query_len: int = 0
    admission: Admission | None = None
    progress: tuple[int, int] = (0, 0)
    first_block: int = 0
    blocks: list[int] = field(default_factory=list)
    first_token: int = 0
    tokens: bytes = b""


class _Growth(NamedTuple):
    slots: IntArray
    first_blocks: IntArray
    counts: IntArray
    blocks: Sequence[int]


class _Payload:
    """What entries refer to by its offset."""

    def __init__(self) -> None:
        self.words = 0
        self.parts: list[bytes] = []

    def put(self, part: bytes) -> int:
        """Adds a part and returns its offset."""
        offset = self.words
        if part:
            self.parts.append(part)
            self.words += len(part) // _WORD_BYTES
        return offset


class SlotDeltas(Delta):
    """The changes of one step, at most one entry a slot (F8): later changes of a slot are merged into the first."""

    def __init__(self, limits: SlotLimits) -> None:
        self._limits = limits
        self._deltas: dict[int, _SlotDelta] = {}
        self._growth: _Growth | None = None
        self._admission_words = 0

    def __len__(self) -> int:
        return len(self._deltas) + (0 if self._growth is None else len(self._growth.slots))

    @property
    def armed(self) -> Sequence[int]:
        """Slots that may run because of this batch: all but those that are only released."""
        grown = [] if self._growth is None else self._growth.slots.tolist()
        return grown + [slot for slot, delta in self._deltas.items() if delta.flags != RELEASE]

    @property
    def chunk_slots(self) -> int:
        return sum(bool(delta.flags & ARM) for delta in self._deltas.values())

    @property
    def chunk_rows(self) -> int:
        return sum(delta.query_len for delta in self._deltas.values() if delta.flags & ARM)

    def has_room_for(self, admission: Admission) -> bool:
        """Whether its biases and stop sequences fit beside those of this step; alone they always do."""
        return self._admission_words + self._words_of(admission) <= self._limits.admission_words

    def admit(self, slot: int, admission: Admission, seq_len: int, num_tokens: int) -> None:
        """Gives the slot a new owner, with an empty block table.

        Args:
            slot: which.
            admission: what the owner asked for.
            seq_len: its tokens whose KV is in the blocks that it will be supplied with.
            num_tokens: its tokens that are known.
        """
        self._admission_words += self._words_of(admission)
        delta = self._of(slot)
        delta.flags = delta.flags & ~RELEASE | ADMIT
        delta.admission, delta.progress = admission, (seq_len, num_tokens)

    def arm(self, slot: int, first_token: int, tokens: bytes, query_len: int | None = None) -> None:
        """The slot computes `tokens` (int32 words) from position `first_token` of its sequence on, in this step.

        With `query_len`, only so many of them; those behind are known to the device from now on.
        """
        delta = self._of(slot)
        delta.flags |= ARM
        delta.query_len = len(tokens) // _WORD_BYTES if query_len is None else query_len
        delta.first_token, delta.tokens = first_token, tokens

    def supply(self, slot: int, first_block: int, blocks: Sequence[int]) -> None:
        """Appends KV blocks at index `first_block` of the slot's block table; revives it if it is parked."""
        delta = self._of(slot)
        if not delta.blocks:
            delta.first_block = first_block
        delta.blocks.extend(blocks)

    def grow(self, slots: IntArray, first_blocks: IntArray, counts: IntArray, blocks: Sequence[int]) -> None:
        """`supply` for many running slots at once, without an object for each; `blocks` lie slot behind slot.

        At most once a batch, which then holds nothing else for these slots.
        """
        self._growth = _Growth(slots, first_blocks, counts, blocks)

    def release(self, slot: int) -> None:
        """The slot stops running; what else this batch held for it is dropped."""
        self._deltas[slot] = _SlotDelta(flags=RELEASE)

    def pack(self, words: Int32Array, step: int) -> None:
        """Writes the batch in the layout of `graphexec.kernels.delta_layout`.

        Raises:
            ValueError: the batch carries more than the layout holds.
        """
        payload = _Payload()
        entries = [] if self._growth is None else [self._pack_growth(self._growth, payload)]
        entries += [self._pack_one(slot, delta, payload) for slot, delta in self._deltas.items()]
        if payload.words > self._limits.payload_words:
            raise ValueError(
                f"The deltas of step {step} carry more than {self._limits.payload_words} words of payload."
            )
        header = struct.pack(f"=iI{4 * (HEADER_WORDS - 2)}x", len(self), step & 0xFFFFFFFF)
        packed = np.frombuffer(b"".join([header, *entries, *payload.parts]), dtype=np.int32)
        words[: len(packed)] = packed

    def _pack_growth(self, growth: _Growth, payload: _Payload) -> bytes:
        if not self._deltas.keys().isdisjoint(growth.slots.tolist()):
            raise ValueError("A slot that grows has another entry in this batch (F8).")
        first = payload.put(as_words(growth.blocks))
        entries = np.zeros((len(growth.slots), self._limits.entry_words), dtype=np.int32)
        entries[:, word_of("slot")] = growth.slots
        entries[:, word_of("first_block")] = growth.first_blocks
        entries[:, word_of("blocks")] = growth.counts
        entries[:, word_of("block_offset")] = first + np.cumsum(growth.counts) - growth.counts
        return entries.tobytes()

    def _pack_one(self, slot: int, delta: _SlotDelta, payload: _Payload) -> bytes:
        tokens, blocks = len(delta.tokens) // _WORD_BYTES, len(delta.blocks)
        token_offset, block_offset = payload.put(delta.tokens), payload.put(as_words(delta.blocks))
        control = [
            slot, delta.flags, delta.query_len,
            delta.first_token, tokens, token_offset,
            delta.first_block, blocks, block_offset,
        ]  # fmt: skip
        admission, size = delta.admission, self._limits.entry_words * _WORD_BYTES
        if admission is None:
            return pack_control([*control, 0, 0, 0, 0]).ljust(size, b"\0")
        biases, sequences = len(admission.biases), len(admission.stop_sequences)
        bias_offset = payload.put(admission.bias_words())
        sequence_offset = payload.put(admission.stop_sequence_words(self._limits.max_stop_sequence_tokens))
        control += [biases, bias_offset, sequences, sequence_offset]
        return (pack_control(control, delta.progress) + admission.packed).ljust(size, b"\xff")  # -1: no stop id

    def _of(self, slot: int) -> _SlotDelta:
        delta = self._deltas.get(slot)
        if delta is None:
            delta = self._deltas[slot] = _SlotDelta()
        return delta

    def _words_of(self, admission: Admission) -> int:
        return 2 * len(admission.biases) + len(admission.stop_sequences) * self._limits.max_stop_sequence_tokens
