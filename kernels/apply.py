"""Apply: unpacks a batch of host-to-device changes into the slots, one program for each change."""

from __future__ import annotations

import torch

from graphexec.kernels.delta_layout import ADMIT, ARM, CONTROL, ENTRY_WORDS, HEADER_WORDS, RELEASE, word_of
from graphexec.kernels.lang import tl, triton, use_triton
from graphexec.kernels.state import SlotTensors, parameter_words

__all__ = ["apply_deltas", "apply_deltas_reference", "apply_deltas_triton"]


def apply_deltas(staging: torch.Tensor, slots: SlotTensors, block_size: int) -> None:
    """Applies a packed batch to `slots`, in place.

    `staging` is int32, as `delta_layout` describes it. A slot may stand in one entry only (F8). Blocks that cover the
    position a parked slot waits for revive it.
    """
    if use_triton(staging):
        apply_deltas_triton(staging, slots, block_size)
    else:
        apply_deltas_reference(staging, slots, block_size)


def apply_deltas_reference(staging: torch.Tensor, slots: SlotTensors, block_size: int) -> None:
    """What `apply_deltas` means, entry by entry."""
    count, step = staging[:2].tolist()
    width = ENTRY_WORDS + slots.stop_ids.shape[1]
    payload = staging[HEADER_WORDS + count * width :]
    slots.last_delta[0] = step
    for entry in staging[HEADER_WORDS : HEADER_WORDS + count * width].view(count, width):
        delta = dict(zip(CONTROL, entry[: len(CONTROL)].tolist(), strict=True))
        slot, flags = delta["slot"], delta["flags"]
        if flags & ADMIT:
            _admit_reference(delta, entry, payload, slots)
        first, count = delta["first_token"], delta["tokens"]
        slots.token_ids[slot, first : first + count] = payload[delta["token_offset"] :][:count]
        first, count = delta["first_block"], delta["blocks"]
        if count:
            slots.block_tables[slot, first : first + count] = payload[delta["block_offset"] :][:count]
            slots.num_blocks[slot] = first + count
            if slots.parked[slot] and slots.seq_lens[slot] // block_size < first + count:
                slots.parked[slot], slots.query_lens[slot] = 0, 1
        if flags & ARM:
            slots.query_lens[slot] = delta["query_len"]
        if flags & RELEASE:
            slots.query_lens[slot] = slots.parked[slot] = 0


def _admit_reference(delta: dict[str, int], entry: torch.Tensor, payload: torch.Tensor, slots: SlotTensors) -> None:
    slot = delta["slot"]
    slots.parameters.view(-1)[_places(slot, slots)] = entry[len(CONTROL) : ENTRY_WORDS]
    biases, source = delta["biases"], payload[delta["bias_offset"] :]
    slots.bias_ids[slot] = -1
    slots.bias_ids[slot, :biases] = source[:biases]
    slots.bias_values[slot, :biases] = source[biases : 2 * biases].view(torch.float32)
    sequences, source = delta["stop_sequences"], payload[delta["stop_sequence_offset"] :]
    words = sequences * slots.stop_sequences.shape[2]
    slots.num_stop_sequences[slot] = sequences
    slots.stop_sequences[slot].view(-1)[:words] = source[:words]
    slots.stop_ids[slot] = entry[ENTRY_WORDS:]
    slots.num_blocks[slot] = slots.parked[slot] = slots.query_lens[slot] = 0


def _places(slot: int, slots: SlotTensors) -> torch.Tensor:
    """Where in `parameters` the words of a slot stand, `[P]`: a row for each, but 8 bytes side by side in two rows."""
    words, stride = slots.parameters.shape
    narrow, word = parameter_words(4), torch.arange(words, device=slots.parameters.device)
    wide = word - narrow
    return torch.where(word < narrow, word * stride + slot, (narrow + wide // 2 * 2) * stride + 2 * slot + wide % 2)


def apply_deltas_triton(staging: torch.Tensor, slots: SlotTensors, block_size: int) -> None:
    """The grid has a program for every possible entry; those beyond the batch leave at once."""
    max_slots, max_stop_ids = slots.stop_ids.shape
    max_biases, sequence_tokens = slots.bias_ids.shape[1], slots.stop_sequences.shape[2]
    sequence_words = slots.stop_sequences.shape[1] * sequence_tokens
    _apply[(max_slots,)](
        staging,
        slots.parameters,
        slots.query_lens,
        slots.seq_lens,
        slots.num_blocks,
        slots.parked,
        slots.bias_ids,
        slots.bias_values,
        slots.num_stop_sequences,
        slots.stop_sequences,
        slots.stop_ids,
        slots.block_tables,
        slots.token_ids,
        slots.last_delta,
        STRIDE=slots.parameters.shape[1],
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
        CHUNK=1024,
        num_warps=1,
    )


_HEADER = tl.constexpr(HEADER_WORDS)
_ENTRY = tl.constexpr(ENTRY_WORDS)
_ADMIT = tl.constexpr(ADMIT)
_ARM = tl.constexpr(ARM)
_RELEASE = tl.constexpr(RELEASE)
_SLOT = tl.constexpr(word_of("slot"))
_FLAGS = tl.constexpr(word_of("flags"))
_QUERY_LEN = tl.constexpr(word_of("query_len"))
_FIRST_BLOCK = tl.constexpr(word_of("first_block"))
_BLOCKS = tl.constexpr(word_of("blocks"))
_BLOCK_OFFSET = tl.constexpr(word_of("block_offset"))
_FIRST_TOKEN = tl.constexpr(word_of("first_token"))
_TOKENS = tl.constexpr(word_of("tokens"))
_TOKEN_OFFSET = tl.constexpr(word_of("token_offset"))
_SEQ_LEN = tl.constexpr(word_of("seq_len"))
_BIASES = tl.constexpr(word_of("biases"))
_BIAS_OFFSET = tl.constexpr(word_of("bias_offset"))
_SEQUENCES = tl.constexpr(word_of("stop_sequences"))
_SEQUENCE_OFFSET = tl.constexpr(word_of("stop_sequence_offset"))
_PARAMETERS = tl.constexpr(len(CONTROL))  # where they begin in an entry
_WORDS = tl.constexpr(parameter_words())
_NARROW = tl.constexpr(parameter_words(4))
_ENTRY_LANES = tl.constexpr(1 << (ENTRY_WORDS - 1).bit_length())


@triton.jit
def _pick(words, lanes, index: tl.constexpr):
    """One of the words, as a scalar."""
    return tl.sum(tl.where(lanes == index, words, 0), axis=0)


@triton.jit
def _apply(
    staging,  # [HEADER + count * (ENTRY + STOP_IDS) + payload]
    parameters,  # [WORDS, STRIDE]
    query_lens,  # [S]
    seq_lens,  # [S], one of the parameters
    num_blocks,  # [S]
    parked,  # [S]
    bias_ids,  # [S, BIASES]
    bias_values,  # [S, BIASES]
    num_stop_sequences,  # [S]
    stop_sequences,  # [S, SEQUENCE_WORDS / SEQUENCE_TOKENS, SEQUENCE_TOKENS]
    stop_ids,  # [S, STOP_IDS]
    block_tables,  # [S, MAX_BLOCKS]
    token_ids,  # [S, MAX_TOKENS]
    last_delta,  # [1]
    STRIDE: tl.constexpr,
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
    CHUNK: tl.constexpr,
):
    index = tl.program_id(0)
    count = tl.load(staging)
    step = tl.load(staging + 1)
    if index == 0:
        tl.store(last_delta, step)
    if index >= count:
        return
    entry = staging + _HEADER + index * (_ENTRY + STOP_IDS)
    payload = staging + _HEADER + count * (_ENTRY + STOP_IDS)

    # The batch lies in the host's memory. A read crosses the bus and takes microseconds, so reads are few and wide, by
    # a single warp, and those that hang on nothing else go together, in three rounds: number of entries, entry,
    # payload. All come before the first store, which no read may overtake.
    word = tl.arange(0, _ENTRY_LANES)
    words = tl.load(entry + word, mask=word < _ENTRY, other=0)
    stop_lane = tl.arange(0, STOP_LANES)
    stops = tl.load(entry + _ENTRY + stop_lane, mask=stop_lane < STOP_IDS, other=-1)
    slot = _pick(words, word, _SLOT)
    flags = _pick(words, word, _FLAGS)
    new_query_len = _pick(words, word, _QUERY_LEN)
    new_seq_len = _pick(words, word, _SEQ_LEN)
    first_token = _pick(words, word, _FIRST_TOKEN)
    tokens = _pick(words, word, _TOKENS)
    token_source = payload + _pick(words, word, _TOKEN_OFFSET)
    first_block = _pick(words, word, _FIRST_BLOCK)
    blocks = _pick(words, word, _BLOCKS)
    block_source = payload + _pick(words, word, _BLOCK_OFFSET)
    biases = _pick(words, word, _BIASES)
    bias_source = payload + _pick(words, word, _BIAS_OFFSET)
    sequences = _pick(words, word, _SEQUENCES)
    sequence_source = payload + _pick(words, word, _SEQUENCE_OFFSET)

    is_admitted = flags & _ADMIT != 0
    lane = tl.arange(0, CHUNK)
    first_tokens = tl.load(token_source + lane, mask=lane < tokens, other=0)
    first_blocks = tl.load(block_source + lane, mask=lane < blocks, other=0)
    bias_lane = tl.arange(0, BIAS_LANES)
    has_bias = is_admitted & (bias_lane < biases)
    ids = tl.load(bias_source + bias_lane, mask=has_bias, other=-1)
    bits = tl.load(bias_source + biases + bias_lane, mask=has_bias, other=0)
    sequence_lane = tl.arange(0, SEQUENCE_LANES)
    in_sequence = is_admitted & (sequence_lane < sequences * SEQUENCE_TOKENS)
    sequence_tokens = tl.load(sequence_source + sequence_lane, mask=in_sequence, other=-1)

    # The slot's new values are kept in registers and stored once: within a program, a load after a store by another
    # thread would need a barrier.
    query_len = tl.load(query_lens + slot)
    is_parked = tl.load(parked + slot)
    seq_len = tl.load(seq_lens + slot)
    held_blocks = tl.load(num_blocks + slot)
    if is_admitted:
        query_len = query_len * 0
        is_parked = is_parked * 0
        held_blocks = held_blocks * 0
        seq_len = new_seq_len
        parameter = word - _PARAMETERS
        wide = parameter - _NARROW
        in_wide = (_NARROW + wide // 2 * 2) * STRIDE + 2 * slot + wide % 2
        place = tl.where(parameter < _NARROW, parameter * STRIDE + slot, in_wide)
        tl.store(parameters + place, words, mask=(parameter >= 0) & (parameter < _WORDS))
        tl.store(bias_ids + slot * BIASES + bias_lane, ids, mask=bias_lane < BIASES)
        weights = bits.to(tl.float32, bitcast=True)
        tl.store(bias_values + slot * BIASES + bias_lane, weights, mask=has_bias)
        tl.store(stop_sequences + slot * SEQUENCE_WORDS + sequence_lane, sequence_tokens, mask=in_sequence)
        tl.store(num_stop_sequences + slot, sequences)
        tl.store(stop_ids + slot * STOP_IDS + stop_lane, stops, mask=stop_lane < STOP_IDS)
    target = token_ids + slot.to(tl.int64) * MAX_TOKENS + first_token
    tl.store(target + lane, first_tokens, mask=lane < tokens)
    for done in range(CHUNK, tokens, CHUNK):
        offset = done + lane
        more = tl.load(token_source + offset, mask=offset < tokens, other=0)
        tl.store(target + offset, more, mask=offset < tokens)
    block_target = block_tables + slot * MAX_BLOCKS + first_block
    tl.store(block_target + lane, first_blocks, mask=lane < blocks)
    for done in range(CHUNK, blocks, CHUNK):
        offset = done + lane
        more = tl.load(block_source + offset, mask=offset < blocks, other=0)
        tl.store(block_target + offset, more, mask=offset < blocks)
    if blocks > 0:
        held_blocks = first_block + blocks
        if (is_parked != 0) & (seq_len // BLOCK_SIZE < held_blocks):
            is_parked = is_parked * 0
            query_len = query_len * 0 + 1
    if flags & _ARM:
        query_len = new_query_len
    if flags & _RELEASE:
        query_len = query_len * 0
        is_parked = is_parked * 0
    tl.store(query_lens + slot, query_len)
    tl.store(parked + slot, is_parked)
    tl.store(num_blocks + slot, held_blocks)
