"""Apply: unpacks a batch of host-to-device changes into the slots, one program for each change."""

from __future__ import annotations

import torch

from graphexec.kernels.lang import tl, triton, use_triton
from graphexec.kernels.state import SlotTensors

__all__ = [
    "ADMIT",
    "ARM",
    "BLOCKS_FIELD",
    "ENTRY_FIELDS",
    "HEADER_WORDS",
    "RELEASE",
    "apply_deltas",
    "apply_deltas_reference",
    "apply_deltas_triton",
]

HEADER_WORDS = 4
"""Number of entries, step number, 0, 0."""
ENTRY_FIELDS = 27
"""Fixed words of an entry, before its stop ids. In order, floats by their bits:

slot, flags, query_len | seq_len, num_tokens, prompt_len, max_len, min_len | temperature, top_k, top_p, log_min_p,
seed low, seed high | repetition, presence and frequency penalty | biases, their payload offset (ids, then values) |
stop sequences, their payload offset (W words each) | first block, blocks, their payload offset | first token, tokens,
their payload offset."""

BLOCKS_FIELD = 21
"""The word of an entry with which its first block, blocks and their payload offset begin."""

ADMIT = 1
"""The slot gets a new owner: lengths, sampling and stop parameters are set, its block table starts empty."""
ARM = 2
"""`query_len` is set: the slot computes that many tokens in the step of this delta."""
RELEASE = 4
"""The slot stops running (abort, preemption)."""


def apply_deltas(staging: torch.Tensor, slots: SlotTensors, block_size: int) -> None:
    """Applies a packed batch to `slots`, in place.

    `staging` is int32: header, S entries of `ENTRY_FIELDS + K` words, then the payload (block numbers and token ids).
    A slot may stand in one entry only (F8). Blocks that cover the position a parked slot waits for revive it.
    """
    if use_triton(staging):
        apply_deltas_triton(staging, slots, block_size)
    else:
        apply_deltas_reference(staging, slots, block_size)


def apply_deltas_reference(staging: torch.Tensor, slots: SlotTensors, block_size: int) -> None:
    """What `apply_deltas` means, entry by entry."""
    words = staging.tolist()
    max_slots, max_stop_ids = slots.stop_ids.shape
    width = ENTRY_FIELDS + max_stop_ids
    payload = HEADER_WORDS + max_slots * width
    slots.last_delta[0] = words[1]
    for begin in range(HEADER_WORDS, HEADER_WORDS + words[0] * width, width):
        slot, flags, query_len = words[begin : begin + 3]
        first_block, blocks, block_offset, first_token, tokens, token_offset = words[begin + 21 : begin + 27]
        if flags & ADMIT:
            bits = staging[begin : begin + width]
            floats = bits[:17].view(torch.float32)
            slots.seq_lens[slot], slots.num_tokens[slot], slots.prompt_len[slot] = words[begin + 3 : begin + 6]
            slots.max_len[slot], slots.min_len[slot] = words[begin + 6 : begin + 8]
            slots.temperature[slot], slots.top_k[slot] = floats[8], words[begin + 9]
            slots.top_p[slot], slots.log_min_p[slot] = floats[10], floats[11]
            slots.seed[slot] = bits[12:14].clone().view(torch.int64)[0]
            slots.repetition_penalty[slot] = floats[14]
            slots.presence_penalty[slot], slots.frequency_penalty[slot] = floats[15], floats[16]
            biases, bias_offset, sequences, sequence_offset = words[begin + 17 : begin + 21]
            source = payload + bias_offset
            slots.bias_ids[slot] = -1
            slots.bias_ids[slot, :biases] = staging[source : source + biases]
            slots.bias_values[slot, :biases] = staging[source + biases : source + 2 * biases].view(torch.float32)
            source, sequence_words = payload + sequence_offset, sequences * slots.stop_sequences.shape[2]
            slots.num_stop_sequences[slot] = sequences
            slots.stop_sequences[slot].view(-1)[:sequence_words] = staging[source : source + sequence_words]
            slots.stop_ids[slot] = bits[ENTRY_FIELDS:]
            slots.num_blocks[slot] = slots.parked[slot] = slots.query_lens[slot] = 0
        source = payload + token_offset
        slots.token_ids[slot, first_token : first_token + tokens] = staging[source : source + tokens]
        if blocks:
            source = payload + block_offset
            slots.block_tables[slot, first_block : first_block + blocks] = staging[source : source + blocks]
            slots.num_blocks[slot] = first_block + blocks
            if slots.parked[slot] and slots.seq_lens[slot] // block_size < first_block + blocks:
                slots.parked[slot], slots.query_lens[slot] = 0, 1
        if flags & ARM:
            slots.query_lens[slot] = query_len
        if flags & RELEASE:
            slots.query_lens[slot] = slots.parked[slot] = 0


def apply_deltas_triton(staging: torch.Tensor, slots: SlotTensors, block_size: int) -> None:
    """The grid has a program for every possible entry; those beyond the batch leave at once."""
    max_slots, max_stop_ids = slots.stop_ids.shape
    max_biases, sequence_tokens = slots.bias_ids.shape[1], slots.stop_sequences.shape[2]
    sequence_words = slots.stop_sequences.shape[1] * sequence_tokens
    _apply[(max_slots,)](
        staging,
        slots.query_lens,
        slots.seq_lens,
        slots.num_tokens,
        slots.prompt_len,
        slots.max_len,
        slots.min_len,
        slots.num_blocks,
        slots.parked,
        slots.temperature,
        slots.top_k,
        slots.top_p,
        slots.log_min_p,
        slots.seed,
        slots.repetition_penalty,
        slots.presence_penalty,
        slots.frequency_penalty,
        slots.bias_ids,
        slots.bias_values,
        slots.num_stop_sequences,
        slots.stop_sequences,
        slots.stop_ids,
        slots.block_tables,
        slots.token_ids,
        slots.last_delta,
        MAX_SLOTS=max_slots,
        STOP_IDS=max_stop_ids,
        STOP_LANES=triton.next_power_of_2(max_stop_ids),
        BIASES=max_biases,
        BIAS_LANES=triton.next_power_of_2(max_biases),
        SEQUENCE_TOKENS=sequence_tokens,
        SEQUENCE_WORDS=sequence_words,
        SEQUENCE_LANES=triton.next_power_of_2(sequence_words),
        MAX_BLOCKS=slots.block_tables.shape[1],
        MAX_TOKENS=slots.token_ids.shape[1],
        BLOCK_SIZE=block_size,
        ENTRY_FIELDS_=ENTRY_FIELDS,
        HEADER=HEADER_WORDS,
        CHUNK=256,
        num_warps=4,
    )


@triton.jit
def _apply(
    staging,  # [HEADER + S * (ENTRY_FIELDS + STOP_IDS) + payload]
    query_lens,  # [S]
    seq_lens,  # [S]
    num_tokens,  # [S]
    prompt_len,  # [S]
    max_len,  # [S]
    min_len,  # [S]
    num_blocks,  # [S]
    parked,  # [S]
    temperature,  # [S]
    top_k,  # [S]
    top_p,  # [S]
    log_min_p,  # [S]
    seed,  # [S]
    repetition_penalty,  # [S]
    presence_penalty,  # [S]
    frequency_penalty,  # [S]
    bias_ids,  # [S, BIASES]
    bias_values,  # [S, BIASES]
    num_stop_sequences,  # [S]
    stop_sequences,  # [S, SEQUENCE_WORDS / SEQUENCE_TOKENS, SEQUENCE_TOKENS]
    stop_ids,  # [S, STOP_IDS]
    block_tables,  # [S, MAX_BLOCKS]
    token_ids,  # [S, MAX_TOKENS]
    last_delta,  # [1]
    MAX_SLOTS: tl.constexpr,
    STOP_IDS: tl.constexpr,
    STOP_LANES: tl.constexpr,
    BIASES: tl.constexpr,
    BIAS_LANES: tl.constexpr,
    SEQUENCE_TOKENS: tl.constexpr,
    SEQUENCE_WORDS: tl.constexpr,
    SEQUENCE_LANES: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ENTRY_FIELDS_: tl.constexpr,
    HEADER: tl.constexpr,
    CHUNK: tl.constexpr,
):
    index = tl.program_id(0)
    if index == 0:
        tl.store(last_delta, tl.load(staging + 1))
    if index >= tl.load(staging):
        return
    entry = staging + HEADER + index * (ENTRY_FIELDS_ + STOP_IDS)
    payload = staging + HEADER + MAX_SLOTS * (ENTRY_FIELDS_ + STOP_IDS)
    slot = tl.load(entry)
    flags = tl.load(entry + 1)
    # The slot's new values are kept in registers and stored once: within a program, a load after a store by another
    # thread would need a barrier.
    query_len = tl.load(query_lens + slot)
    is_parked = tl.load(parked + slot)
    seq_len = tl.load(seq_lens + slot)
    held_blocks = tl.load(num_blocks + slot)
    if flags & 1:  # ADMIT
        query_len = query_len * 0
        is_parked = is_parked * 0
        held_blocks = held_blocks * 0
        seq_len = tl.load(entry + 3)
        tl.store(seq_lens + slot, seq_len)
        tl.store(num_tokens + slot, tl.load(entry + 4))
        tl.store(prompt_len + slot, tl.load(entry + 5))
        tl.store(max_len + slot, tl.load(entry + 6))
        tl.store(min_len + slot, tl.load(entry + 7))
        tl.store(temperature + slot, tl.load(entry + 8).to(tl.float32, bitcast=True))
        tl.store(top_k + slot, tl.load(entry + 9))
        tl.store(top_p + slot, tl.load(entry + 10).to(tl.float32, bitcast=True))
        tl.store(log_min_p + slot, tl.load(entry + 11).to(tl.float32, bitcast=True))
        low = tl.load(entry + 12).to(tl.int64) & 0xFFFFFFFF
        tl.store(seed + slot, (tl.load(entry + 13).to(tl.int64) << 32) | low)
        tl.store(repetition_penalty + slot, tl.load(entry + 14).to(tl.float32, bitcast=True))
        tl.store(presence_penalty + slot, tl.load(entry + 15).to(tl.float32, bitcast=True))
        tl.store(frequency_penalty + slot, tl.load(entry + 16).to(tl.float32, bitcast=True))
        biases = tl.load(entry + 17)
        source = payload + tl.load(entry + 18)
        lane = tl.arange(0, BIAS_LANES)
        ids = tl.load(source + lane, mask=lane < biases, other=-1)
        values = tl.load(source + biases + lane, mask=lane < biases, other=0)
        tl.store(bias_ids + slot * BIASES + lane, ids, mask=lane < BIASES)
        tl.store(bias_values + slot * BIASES + lane, values.to(tl.float32, bitcast=True), mask=lane < biases)
        sequences = tl.load(entry + 19)
        source = payload + tl.load(entry + 20)
        lane = tl.arange(0, SEQUENCE_LANES)
        used = lane < sequences * SEQUENCE_TOKENS
        tl.store(stop_sequences + slot * SEQUENCE_WORDS + lane, tl.load(source + lane, mask=used, other=-1), mask=used)
        tl.store(num_stop_sequences + slot, sequences)
        lane = tl.arange(0, STOP_LANES)
        stops = tl.load(entry + ENTRY_FIELDS_ + lane, mask=lane < STOP_IDS, other=-1)
        tl.store(stop_ids + slot * STOP_IDS + lane, stops, mask=lane < STOP_IDS)
    first_token = tl.load(entry + 24)
    tokens = tl.load(entry + 25)
    source = payload + tl.load(entry + 26)
    for done in range(0, tokens, CHUNK):
        offset = done + tl.arange(0, CHUNK)
        values = tl.load(source + offset, mask=offset < tokens, other=0)
        target = token_ids + slot.to(tl.int64) * MAX_TOKENS + first_token
        tl.store(target + offset, values, mask=offset < tokens)
    first_block = tl.load(entry + 21)
    blocks = tl.load(entry + 22)
    source = payload + tl.load(entry + 23)
    for done in range(0, blocks, CHUNK):
        offset = done + tl.arange(0, CHUNK)
        values = tl.load(source + offset, mask=offset < blocks, other=0)
        tl.store(block_tables + slot * MAX_BLOCKS + first_block + offset, values, mask=offset < blocks)
    if blocks > 0:
        held_blocks = first_block + blocks
        if (is_parked != 0) & (seq_len // BLOCK_SIZE < held_blocks):
            is_parked = is_parked * 0
            query_len = query_len * 0 + 1
    if flags & 2:  # ARM
        query_len = tl.load(entry + 2)
    if flags & 4:  # RELEASE
        query_len = query_len * 0
        is_parked = is_parked * 0
    tl.store(query_lens + slot, query_len)
    tl.store(parked + slot, is_parked)
    tl.store(num_blocks + slot, held_blocks)
