"""The device tensors that steps read and write: one row per slot, and one entry per row of the launched batch."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

__all__ = ["SlotTensors", "StepTensors"]


@dataclass(frozen=True)
class SlotTensors:
    """Persistent state of the slots; S slots, K stop ids, M blocks a slot, L tokens a slot, J biases.

    Q stop sequences of at most W tokens.

    Attributes:
        query_lens: `[S]` int32, tokens that the slot computes in the next step: 0 idle, 1 decode, else a chunk.
        seq_lens: `[S]` int32, tokens whose KV is written.
        num_tokens: `[S]` int32, tokens that are known (prompt and output); a step yields a token when it computes
            the last known one.
        max_len: `[S]` int32, the slot ends when it knows that many tokens.
        min_len: `[S]` int32, stop ids are ignored while fewer tokens are known.
        num_blocks: `[S]` int32, KV blocks in the block table.
        parked: `[S]` int32, 1 while the slot waits for a KV block.
        prompt_len: `[S]` int32, tokens of the prompt; those behind it are output.
        temperature, top_k, top_p, seed: `[S]` float32, int32, float32, int64; see `graphexec.kernels.sample`.
        log_min_p: `[S]` float32, logarithm of min-p, -inf for none.
        repetition_penalty, presence_penalty, frequency_penalty: `[S]` float32, 1, 0 and 0 for none.
        bias_ids, bias_values: `[S, J]` int32 and float32, added to the logits of those ids; -1 for unused entries.
        stop_ids: `[S, K]` int32, -1 for unused entries.
        stop_sequences: `[S, Q, W]` int32, each at the end of its row, behind -1.
        num_stop_sequences: `[S]` int32, those in use.
        block_tables: `[S, M]` int32.
        token_ids: `[S, L]` int32.
        last_delta: `[1]` int32, number of the step whose delta was applied last, -1 before the first.
    """

    query_lens: torch.Tensor
    seq_lens: torch.Tensor
    num_tokens: torch.Tensor
    max_len: torch.Tensor
    min_len: torch.Tensor
    num_blocks: torch.Tensor
    parked: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    seed: torch.Tensor
    log_min_p: torch.Tensor
    repetition_penalty: torch.Tensor
    presence_penalty: torch.Tensor
    frequency_penalty: torch.Tensor
    prompt_len: torch.Tensor
    bias_ids: torch.Tensor
    bias_values: torch.Tensor
    stop_ids: torch.Tensor
    stop_sequences: torch.Tensor
    num_stop_sequences: torch.Tensor
    block_tables: torch.Tensor
    token_ids: torch.Tensor
    last_delta: torch.Tensor

    @classmethod
    def allocate(
        cls,
        max_slots: int,
        max_stop_ids: int,
        max_blocks: int,
        max_tokens: int,
        device: torch.device,
        max_biases: int = 1,
        stop_sequences: tuple[int, int] = (1, 1),
    ) -> SlotTensors:
        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def floats(value: float, *shape: int) -> torch.Tensor:
            return torch.full(shape, value, dtype=torch.float32, device=device)

        return cls(
            **{name: ints(max_slots) for name in _PER_SLOT},
            temperature=floats(0.0, max_slots),
            top_k=ints(max_slots),
            top_p=floats(1.0, max_slots),
            seed=torch.zeros(max_slots, dtype=torch.int64, device=device),
            log_min_p=floats(float("-inf"), max_slots),
            repetition_penalty=floats(1.0, max_slots),
            presence_penalty=floats(0.0, max_slots),
            frequency_penalty=floats(0.0, max_slots),
            bias_ids=ints(max_slots, max_biases) - 1,
            bias_values=floats(0.0, max_slots, max_biases),
            stop_ids=ints(max_slots, max_stop_ids) - 1,
            stop_sequences=ints(max_slots, *stop_sequences) - 1,
            block_tables=ints(max_slots, max_blocks),
            token_ids=ints(max_slots, max_tokens),
            last_delta=ints(1) - 1,
        )

    def all(self) -> list[torch.Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


_PER_SLOT = (
    "query_lens", "seq_lens", "num_tokens", "prompt_len", "max_len", "min_len", "num_blocks", "parked",
    "num_stop_sequences",
)  # fmt: skip


@dataclass(frozen=True)
class StepTensors:
    """What `prepare` derives from the slots for one step; T rows, S slots. A step of fewer rows uses the front.

    Attributes:
        row_slot: `[T]` int32, slot of a row, -1 for padding.
        positions: `[T]` int32, position of the row's token in its sequence.
        input_ids: `[T]` int32, 0 for padding.
        kv_slots: `[T]` int64, block * block_size + offset where the row's KV goes, -1 for nowhere.
        active_slots: `[S]` int32, slots that run, in ascending order, then -1.
        active_index: `[S]` int32, index of a slot in `active_slots`, -1 if it does not run.
        query_start: `[S + 1]` int32, first row of each active slot, then the total.
        logit_rows: `[S]` int32, last row of each active slot, 0 for padding.
        info: `[2]` int32, real_bsz and overflow.
    """

    row_slot: torch.Tensor
    positions: torch.Tensor
    input_ids: torch.Tensor
    kv_slots: torch.Tensor
    active_slots: torch.Tensor
    active_index: torch.Tensor
    query_start: torch.Tensor
    logit_rows: torch.Tensor
    info: torch.Tensor

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
            query_start=ints(max_slots + 1),
            logit_rows=ints(max_slots),
            info=ints(2),
        )
