"""Deltas: the host's changes to the slots in one step, merged to one entry a slot (F8) and packed for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from graphexec.kernels.apply import ADMIT, ARM, BLOCKS_FIELD, ENTRY_FIELDS, HEADER_WORDS, RELEASE
from graphexec.plan import Int32Array
from graphexec.slots import SlotLimits

__all__ = ["Admission", "SlotDeltas"]

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Admission:
    """What a slot learns about its new owner; fields as in SlotTensors.

    Attributes:
        biases: pairs of a token id and what is added to its logit; no id twice.
        stop_sequences: each of one token or more.
    """

    seq_len: int
    num_tokens: int
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


@dataclass(slots=True)
class _SlotDelta:
    flags: int = 0
    query_len: int = 0
    admission: Admission | None = None
    first_block: int = 0
    blocks: list[int] = field(default_factory=list)
    first_token: int = 0
    tokens: Sequence[int] = ()


class _Growth(NamedTuple):
    slots: IntArray
    first_blocks: IntArray
    counts: IntArray
    blocks: Sequence[int]


class SlotDeltas:
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

    def has_room_for(self, admission: Admission) -> bool:
        """Whether its biases and stop sequences fit beside those of this step; alone they always do."""
        return self._admission_words + self._words_of(admission) <= self._limits.admission_words

    def admit(self, slot: int, admission: Admission) -> None:
        """Gives the slot a new owner, with an empty block table."""
        self._admission_words += self._words_of(admission)
        delta = self._of(slot)
        delta.flags = delta.flags & ~RELEASE | ADMIT
        delta.admission = admission

    def arm(self, slot: int, first_token: int, tokens: Sequence[int], query_len: int | None = None) -> None:
        """The slot computes `tokens`, which start at position `first_token` of its sequence, in this step.

        With `query_len`, only so many of them; those behind are known to the device from now on.
        """
        delta = self._of(slot)
        delta.flags |= ARM
        delta.query_len = len(tokens) if query_len is None else query_len
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
        """Writes the batch in the layout that `graphexec.kernels.apply` reads.

        Raises:
            ValueError: the batch carries more than the layout holds.
        """
        limits, width, count = self._limits, self._limits.entry_words, len(self)
        words[0] = count
        words[1] = np.uint32(step & 0xFFFFFFFF).astype(np.int32)
        if count == 0:
            return
        entries = words[HEADER_WORDS : HEADER_WORDS + count * width].reshape(count, width)
        payload: list[int] = []
        if self._growth is not None:
            self._pack_growth(entries, self._growth, payload)
            entries = entries[len(self._growth.slots) :]
        if self._deltas:
            self._pack_deltas(entries, payload)
        if len(payload) > limits.payload_words:
            raise ValueError(f"The deltas of step {step} carry more than {limits.payload_words} words of payload.")
        begin = HEADER_WORDS + limits.max_slots * width
        words[begin : begin + len(payload)] = payload

    def _pack_growth(self, entries: Int32Array, growth: _Growth, payload: list[int]) -> None:
        if not self._deltas.keys().isdisjoint(growth.slots.tolist()):
            raise ValueError("A slot that grows has another entry in this batch (F8).")
        grown = entries[: len(growth.slots)]
        grown[:, :ENTRY_FIELDS] = 0
        grown[:, 0] = growth.slots
        offsets = np.cumsum(growth.counts) - growth.counts
        for field_at, values in enumerate((growth.first_blocks, growth.counts, offsets), BLOCKS_FIELD):
            grown[:, field_at] = values
        payload += growth.blocks

    def _pack_deltas(self, entries: Int32Array, payload: list[int]) -> None:
        heads, tails = [], []
        for index, (slot, delta) in enumerate(self._deltas.items()):
            heads.append((slot, delta.flags, delta.query_len))
            blocks, tokens = len(delta.blocks), len(delta.tokens)
            used = len(payload)
            tails.append((delta.first_block, blocks, used, delta.first_token, tokens, used + blocks))
            payload += delta.blocks
            payload += delta.tokens
            if delta.admission is not None:
                self._pack_admission(entries[index], delta.admission, payload)
        entries[:, : len(heads[0])] = heads
        entries[:, BLOCKS_FIELD:ENTRY_FIELDS] = tails

    def _of(self, slot: int) -> _SlotDelta:
        delta = self._deltas.get(slot)
        if delta is None:
            delta = self._deltas[slot] = _SlotDelta()
        return delta

    def _words_of(self, admission: Admission) -> int:
        return 2 * len(admission.biases) + len(admission.stop_sequences) * self._limits.max_stop_sequence_tokens

    def _pack_admission(self, entry: Int32Array, admission: Admission, payload: list[int]) -> None:
        _pack_fields(entry, admission)
        ids, values = zip(*admission.biases, strict=True) if admission.biases else ((), ())
        entry[17:19] = len(ids), len(payload)
        payload += ids
        payload += np.array(values, dtype=np.float32).view(np.int32).tolist()
        entry[19:21] = len(admission.stop_sequences), len(payload)
        for sequence in admission.stop_sequences:
            payload += [-1] * (self._limits.max_stop_sequence_tokens - len(sequence))
            payload += sequence


def _pack_fields(entry: Int32Array, admission: Admission) -> None:
    floats = entry[:17].view(np.float32)
    entry[3:6] = admission.seq_len, admission.num_tokens, admission.prompt_len
    entry[6:8] = admission.max_len, admission.min_len
    floats[8] = admission.temperature
    entry[9] = admission.top_k
    floats[10:12] = admission.top_p, admission.log_min_p
    entry[12:14] = np.array([admission.seed & 0xFFFFFFFF, admission.seed >> 32], dtype=np.uint32).view(np.int32)
    floats[14:17] = admission.repetition_penalty, admission.presence_penalty, admission.frequency_penalty
    entry[ENTRY_FIELDS:] = -1
    entry[ENTRY_FIELDS : ENTRY_FIELDS + len(admission.stop_ids)] = admission.stop_ids
