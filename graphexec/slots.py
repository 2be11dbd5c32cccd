"""Slots: the persistent state of running requests on the device, and its sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphexec.kernels.apply import apply_deltas
from graphexec.kernels.delta_layout import ENTRY_WORDS, HEADER_WORDS
from graphexec.kernels.state import SlotTensors, StepTensors

__all__ = ["SlotLimits", "SlotState"]


@dataclass(frozen=True, slots=True)
class SlotLimits:
    """Sizes of the slot state.

    Attributes:
        max_slots: S.
        max_tokens: tokens of a sequence, prompt and output.
        max_rows: rows of the largest step.
        block_size: tokens of a KV block, a power of two.
        max_stop_ids: K, stop ids of a slot.
        max_biases: J, token ids of a slot whose logits get a bias.
        max_stop_sequences: Q, stop sequences of a slot.
        max_stop_sequence_tokens: W, tokens of a stop sequence.
    """

    max_slots: int
    max_tokens: int
    max_rows: int
    block_size: int
    max_stop_ids: int
    max_biases: int = 1
    max_stop_sequences: int = 1
    max_stop_sequence_tokens: int = 1

    @property
    def max_blocks(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.max_tokens // self.block_size)

    @property
    def max_shared_blocks(self) -> int:
        """Most blocks of cached prefixes that the admissions of one step bring: those of one sequence at least."""
        return self.max_blocks + self.max_rows

    @property
    def entry_words(self) -> int:
        return ENTRY_WORDS + self.max_stop_ids

    @property
    def payload_words(self) -> int:
        """Most tokens and blocks that the deltas of one step carry.

        Tokens: the chunks of a step, and for each the token behind it. Blocks: those that the chunks fill, and three
        more for every slot, since a chunk may begin and end within a block and reserves ahead; and those that
        admissions share.
        """
        chunks = self.max_rows + self.max_rows // self.block_size + 4 * self.max_slots
        return chunks + self.max_shared_blocks + self.admission_words

    @property
    def admission_words(self) -> int:
        """Most words of biases and stop sequences that the admissions of one step bring: those of two full ones."""
        return 2 * (2 * self.max_biases + self.max_stop_sequences * self.max_stop_sequence_tokens)

    @property
    def staging_words(self) -> int:
        return HEADER_WORDS + self.max_slots * self.entry_words + self.payload_words


class SlotState:
    """Owner of the slot tensors and of the rows that each step derives from them."""

    def __init__(self, limits: SlotLimits, device: torch.device) -> None:
        self.limits = limits
        # One token more than a sequence may have: the last sampled token is stored before its slot is found to end.
        self.slots = SlotTensors.allocate(
            limits.max_slots,
            device,
            tokens=limits.max_tokens + 1,
            blocks=limits.max_blocks,
            stop_ids=limits.max_stop_ids,
            biases=limits.max_biases,
            stop_sequences=limits.max_stop_sequences,
            stop_sequence_tokens=limits.max_stop_sequence_tokens,
        )
        # One row more than a step may have: a compiled model would make a step that fills the buffer a case of its own.
        self.step = StepTensors.allocate(limits.max_slots, limits.max_rows + 1, device)

    def apply(self, staging: torch.Tensor) -> None:
        """Applies a packed batch of deltas, `[staging_words]` int32 on the device."""
        apply_deltas(staging, self.slots, self.limits.block_size)

    def exercise(self, slots: int, rows: int, num_blocks: int, vocab_size: int, generator: torch.Generator) -> None:
        """Fills the first `slots` slots with random sequences that compute `rows` rows between them.

        Rows beyond one for each slot go into prompt chunks of the first slots, as far as there are blocks for them. The
        sequences lie in KV blocks 1 to `num_blocks - 1`, and no two of them write to the same place. Stop ids are left
        out: no slot ends by chance.
        """
        limits, usable, state = self.limits, num_blocks - 1, self.slots
        size, spare, surplus = limits.block_size, max(usable - slots, 0), rows - slots
        query_lens, held = torch.ones(slots, dtype=torch.int32), torch.ones(slots, dtype=torch.int32)
        chunks = 0
        while chunks < slots <= usable:
            more = min(surplus, limits.max_tokens - 2, (1 + spare) * size - 2)
            if more <= 0:
                break
            query_lens[chunks] += more
            held[chunks] = -(-(more + 2) // size)  # with room for the token behind it
            spare, surplus, chunks = spare - int(held[chunks]) + 1, surplus - more, chunks + 1
        if chunks < slots:
            held[chunks:] = min(1 + spare // (slots - chunks), limits.max_blocks)
        longest = max(min(int(held[-1]) * size, limits.max_tokens) - 2, 1)
        seq_lens = torch.randint(0, longest, (slots,), generator=generator, dtype=torch.int32)
        seq_lens[:chunks] = 0
        order = torch.randperm(usable, generator=generator, dtype=torch.int32) + 1
        tables = torch.zeros(slots, limits.max_blocks, dtype=torch.int32)
        first = 0
        for slot, count in enumerate(held.tolist()):
            tables[slot, :count] = order[torch.arange(first, first + count) % usable]
            first += count
        if usable < slots:  # slots that share a block write at different offsets of it, and those left over nowhere
            seq_lens = torch.arange(slots, dtype=torch.int32) // usable
            held[seq_lens >= size] = 0
            seq_lens.clamp_(max=limits.max_tokens - 2)
        ids = torch.randint(0, vocab_size, (slots, limits.max_tokens + 1), generator=generator, dtype=torch.int32)
        for tensor in state.all():
            tensor.zero_()
        device = state.query_lens.device
        state.stop_ids.fill_(-1)
        state.query_lens[:slots] = query_lens.to(device)
        state.seq_lens[:slots] = seq_lens.to(device)
        state.num_tokens[:slots] = (seq_lens + query_lens).to(device)
        state.max_len.fill_(limits.max_tokens)
        state.num_blocks[:slots] = held.to(device)
        state.block_tables[:slots] = tables.to(device)
        state.token_ids[:slots] = ids.to(device)
        state.temperature.fill_(1.0)
        state.top_p.fill_(0.9)
        state.top_k.fill_(50)
        state.log_min_p.fill_(-8.0)
        state.prompt_len[:slots] = (seq_lens // 2).to(device)
        state.repetition_penalty.fill_(1.25)
        state.presence_penalty.fill_(0.25)
        state.frequency_penalty.fill_(0.125)
        state.bias_ids.fill_(-1)
        state.bias_ids[:, 0] = 0
        state.bias_values.fill_(1.0)
