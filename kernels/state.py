"""The device tensors that steps read and write: one row per slot, and one entry per row of the launched batch.

The fields of `SlotTensors` are the one table of what a slot holds: how it is allocated, and what an admission sets, is
derived from it (`delta_layout`).
"""

# ruff: noqa: RUF009  # the functions that are called in the class body make its fields
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch

__all__ = ["PARAMETERS", "Parameter", "SlotTensors", "StepTensors", "parameter_words"]


class Parameter(NamedTuple):
    """A number of a slot that an admission sets.

    Attributes:
        tensor: the field of SlotTensors.
        name: what an admission calls it.
        dtype: of 4 or 8 bytes.
        initial: its value in a slot that never had an owner.
    """

    tensor: str
    name: str
    dtype: torch.dtype
    initial: float


def _number() -> Any:
    """`[S]` int32, zero at first."""
    return field(metadata={"shape": ()})


def _parameter(dtype: torch.dtype = torch.int32, initial: float = 0, name: str | None = None) -> Any:
    """`[S]`, set by an admission; under another name there if `name` says so."""
    return field(metadata={"parameter": (name, dtype, initial)})


def _table(*shape: str, dtype: torch.dtype = torch.int32, initial: float = 0) -> Any:
    """`[S, *shape]`, the sizes by the names that `allocate` is given."""
    return field(metadata={"shape": shape, "dtype": dtype, "initial": initial})


def _buffer() -> Any:
    """Of a shape of its own."""
    return field(metadata={})


@dataclass(frozen=True)
class SlotTensors:
    """Persistent state of the slots; S slots, K stop ids, M blocks a slot, L tokens a slot, J biases.

    Q stop sequences of at most W tokens.

    Attributes:
        query_lens: `[S]` int32, tokens that the slot computes in the next step: 0 idle, 1 decode, else a chunk.
        num_blocks: `[S]` int32, KV blocks in the block table.
        parked: `[S]` int32, 1 while the slot waits for a KV block.
        num_stop_sequences: `[S]` int32, those in use.
        seq_lens: `[S]` int32, tokens whose KV is written.
        num_tokens: `[S]` int32, tokens that are known (prompt and output); a step yields a token when it computes
            the last known one.
        prompt_len: `[S]` int32, tokens of the prompt; those behind it are output.
        max_len: `[S]` int32, the slot ends when it knows that many tokens.
        min_len: `[S]` int32, stop ids are ignored while fewer tokens are known.
        temperature, top_k, top_p, seed: `[S]` float32, int32, float32, int64; see `graphexec.kernels.sample`.
        log_min_p: `[S]` float32, logarithm of min-p, -inf for none.
        repetition_penalty, presence_penalty, frequency_penalty: `[S]` float32, 1, 0 and 0 for none.
        bias_ids, bias_values: `[S, J]` int32 and float32, added to the logits of those ids; -1 for unused entries.
        stop_ids: `[S, K]` int32, -1 for unused entries.
        stop_sequences: `[S, Q, W]` int32, each at the end of its row, behind -1.
        block_tables: `[S, M]` int32.
        token_ids: `[S, L]` int32.
        last_delta: `[1]` int32, number of the step whose delta was applied last, -1 before the first.
        parameters: `[P, S padded]` int32, the memory of what an admission sets, from `seq_lens` to `seed`: a row for
            each word. One store by one program then sets them all.
    """

    query_lens: torch.Tensor = _number()
    num_blocks: torch.Tensor = _number()
    parked: torch.Tensor = _number()
    num_stop_sequences: torch.Tensor = _number()
    seq_lens: torch.Tensor = _parameter(name="seq_len")
    num_tokens: torch.Tensor = _parameter()
    prompt_len: torch.Tensor = _parameter()
    max_len: torch.Tensor = _parameter()
    min_len: torch.Tensor = _parameter()
    temperature: torch.Tensor = _parameter(torch.float32)
    top_k: torch.Tensor = _parameter()
    top_p: torch.Tensor = _parameter(torch.float32, 1.0)
    log_min_p: torch.Tensor = _parameter(torch.float32, float("-inf"))
    repetition_penalty: torch.Tensor = _parameter(torch.float32, 1.0)
    presence_penalty: torch.Tensor = _parameter(torch.float32)
    frequency_penalty: torch.Tensor = _parameter(torch.float32)
    seed: torch.Tensor = _parameter(torch.int64)
    bias_ids: torch.Tensor = _table("biases", initial=-1)
    bias_values: torch.Tensor = _table("biases", dtype=torch.float32)
    stop_ids: torch.Tensor = _table("stop_ids", initial=-1)
    stop_sequences: torch.Tensor = _table("stop_sequences", "stop_sequence_tokens", initial=-1)
    block_tables: torch.Tensor = _table("blocks")
    token_ids: torch.Tensor = _table("tokens")
    last_delta: torch.Tensor = _buffer()
    parameters: torch.Tensor = _buffer()

    @classmethod
    def allocate(cls, max_slots: int, device: torch.device, **sizes: int) -> SlotTensors:
        """Slots without owners.

        Args:
            max_slots: S.
            device: of the tensors.
            sizes: `tokens` and `blocks` of a slot, and where they are not 1, `stop_ids`, `biases`, `stop_sequences`,
                `stop_sequence_tokens`.
        """
        stride = -(-max_slots // 4) * 4  # every row begins at a multiple of 16 bytes
        parameters = torch.zeros(parameter_words(), stride, dtype=torch.int32, device=device)
        tensors = {"parameters": parameters, "last_delta": torch.full((1,), -1, dtype=torch.int32, device=device)}
        row = 0
        for parameter in PARAMETERS:
            words = parameter.dtype.itemsize // 4
            tensor = parameters[row : row + words].view(-1).view(parameter.dtype)[:max_slots]
            tensors[parameter.tensor] = tensor.fill_(parameter.initial)
            row += words
        for column in fields(cls):
            shape = column.metadata.get("shape")
            if shape is not None:
                full = (max_slots, *(sizes.get(name, 1) for name in shape))
                dtype = column.metadata.get("dtype", torch.int32)
                tensors[column.name] = torch.full(full, column.metadata.get("initial", 0), dtype=dtype, device=device)
        return cls(**tensors)

    def all(self) -> list[torch.Tensor]:
        """Every tensor that a step or a delta may change, none of them twice."""
        names = {parameter.tensor for parameter in PARAMETERS}
        return [getattr(self, column.name) for column in fields(self) if column.name not in names]


def _parameters(table: Mapping[str, Any]) -> tuple[Parameter, ...]:
    """The parameters in the order of their words: those of 4 bytes first, or the others would not be aligned."""
    found = [Parameter(name, called or name, dtype, initial) for name, (called, dtype, initial) in table.items()]
    return tuple(sorted(found, key=lambda parameter: parameter.dtype.itemsize))


PARAMETERS = _parameters(
    {column.name: column.metadata["parameter"] for column in fields(SlotTensors) if "parameter" in column.metadata}
)
"""What an admission sets, in the order in which a delta carries it."""


def parameter_words(itemsize: int | None = None) -> int:
    """Words of the parameters of a slot; of those of `itemsize` bytes alone, if it is given."""
    chosen = [each.dtype.itemsize for each in PARAMETERS if itemsize in (None, each.dtype.itemsize)]
    return sum(chosen) // 4


@dataclass(frozen=True)
class StepTensors:
    """What `prepare` derives from the slots for one step; T rows, S slots. A step of fewer rows uses the front.

    Rows of slots that compute one token come first, then those of chunks, slots ascending in both; padding is last. So
    each kind has a kernel of its own, and neither pays for the other. In a step of chunks alone, all slots have one.

    Attributes:
        row_slot: `[T]` int32, slot of a row, -1 for padding.
        positions: `[T]` int32, position of the row's token in its sequence.
        input_ids: `[T]` int32, 0 for padding.
        kv_slots: `[T]` int64, block * block_size + offset where the row's KV goes, -1 for nowhere.
        active_slots: `[S]` int32, slots that run, in ascending order, then -1.
        active_index: `[S]` int32, index of a slot in `active_slots`, -1 if it does not run.
        decode_slots: `[S]` int32, `row_slot` of the rows in front of the chunks, -1 from the first chunk on.
        split_start: `[S + 1]` int32, the first split of each of them, counted over all; see `paged_decode`.
        chunk_slots: `[S]` int32, slots with a chunk, then -1.
        chunk_start: `[S + 1]` int32, first row of each chunk, then the total of the rows.
        logit_rows: `[S]` int32, last row of each active slot, 0 for padding.
        info: `[2]` int32, real_bsz and overflow.
        tickets: `[2]` int32, the work that `paged_prefill` shares out; zero between its launches, not `prepare`'s.
    """

    row_slot: torch.Tensor
    positions: torch.Tensor
    input_ids: torch.Tensor
    kv_slots: torch.Tensor
    active_slots: torch.Tensor
    active_index: torch.Tensor
    decode_slots: torch.Tensor
    split_start: torch.Tensor
    chunk_slots: torch.Tensor
    chunk_start: torch.Tensor
    logit_rows: torch.Tensor
    info: torch.Tensor
    tickets: torch.Tensor

    @classmethod
    def allocate(cls, max_slots: int, max_rows: int, device: torch.device) -> StepTensors:
        def ints(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        return cls(
            row_slot=ints(max_rows) - 1,
            positions=ints(max_rows),
            input_ids=ints(max_rows),
            kv_slots=torch.full((max_rows,), -1, dtype=torch.int64, device=device),
            active_slots=ints(max_slots) - 1,
            active_index=ints(max_slots) - 1,
            decode_slots=ints(max_slots) - 1,
            split_start=ints(max_slots + 1),
            chunk_slots=ints(max_slots) - 1,
            chunk_start=ints(max_slots + 1),
            logit_rows=ints(max_slots),
            info=ints(2),
            tickets=ints(2),
        )
