"""Slot states, batches of deltas, and checks of the three step kernels, for any device.

What must come out is written once more here, slot by slot in plain Python, apart from kernel and reference alike; both
are held to it, over poisoned outputs, so that a write out of place or left out shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from hypothesis import strategies as st

from graphexec.deltas import Admission, SlotDeltas, as_words
from graphexec.kernels.apply import apply_deltas_reference, apply_deltas_triton
from graphexec.kernels.delta_layout import ADMIT, ARM, HEADER_WORDS, RELEASE
from graphexec.kernels.paged_decode import DecodeSplits
from graphexec.kernels.prepare import prepare_reference, prepare_triton
from graphexec.kernels.state import SlotTensors, StepTensors
from graphexec.kernels.update import update_reference, update_triton
from graphexec.plan import FinishCode, RecordLayout
from graphexec.slots import SlotLimits

POISON = -7777
SPLITS = DecodeSplits(tile=2, size=3, most=4)
NOWHERE = 2**28  # what block tables hold beyond a slot's blocks
VOCABULARY = 50
RING = 8
COUNTERS = (0, 1, 7, 8, 2**31 - 1, -(2**31), -2, -1)  # as int32: -1 is step 2**32 - 1


@dataclass(frozen=True)
class SlotCase:
    """One slot: `query_len` tokens from `seq_len` on, of `num_tokens` known ones."""

    query_len: int = 0
    seq_len: int = 0
    num_tokens: int = 0
    num_blocks: int = 0
    max_len: int = 1000
    min_len: int = 0
    parked: int = 0
    stop_ids: tuple[int, ...] = ()
    prompt_len: int = 0
    stop_sequences: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class StepCase:
    """One step over these slots, with room for `rows` rows and `bucket` slots."""

    limits: SlotLimits
    slots: tuple[SlotCase, ...]
    rows: int
    bucket: int
    counter: int = 0
    sampled: tuple[int, ...] = ()
    nan: tuple[int, ...] = ()
    last_delta: int = -1

    def slot_tensors(self, device: str = "cpu") -> SlotTensors:
        limits = self.limits
        generator = torch.Generator().manual_seed(len(self.slots) + self.rows)
        tensors = SlotTensors.allocate(
            limits.max_slots,
            torch.device("cpu"),
            tokens=limits.max_tokens + 1,
            blocks=limits.max_blocks,
            stop_ids=limits.max_stop_ids,
            biases=limits.max_biases,
            stop_sequences=limits.max_stop_sequences,
            stop_sequence_tokens=limits.max_stop_sequence_tokens,
        )
        tensors.stop_sequences.fill_(POISON)  # what lies beyond those in use must not matter
        tensors.bias_ids.fill_(7)  # of the last owner, and no longer true of the next
        # Few ids, so that sequences of several tokens are met.
        tensors.token_ids.copy_(torch.randint(0, 3, tensors.token_ids.shape, generator=generator))
        tensors.block_tables.copy_(torch.randint(1, 100, tensors.block_tables.shape, generator=generator))
        tensors.last_delta[0] = self.last_delta
        for index, slot in enumerate(self.slots):
            for name in ("query_len", "seq_len"):
                getattr(tensors, name + "s")[index] = getattr(slot, name)
            for name in ("num_tokens", "num_blocks", "max_len", "min_len", "parked", "prompt_len"):
                getattr(tensors, name)[index] = getattr(slot, name)
            tensors.stop_ids[index, : len(slot.stop_ids)] = torch.tensor(slot.stop_ids, dtype=torch.int32)
            tensors.block_tables[index, slot.num_blocks :] = NOWHERE
            put_sequences(tensors, index, slot.stop_sequences)
        return slots_on(tensors, device)

    @property
    def active(self) -> list[int]:
        """Slots that run, none if they do not fit."""
        running = [index for index, slot in enumerate(self.slots) if slot.query_len]
        rows = sum(self.slots[index].query_len for index in running)
        return [] if rows > self.rows or len(running) > self.bucket else running

    @property
    def overflows(self) -> bool:
        return not self.active and any(slot.query_len for slot in self.slots)


def put_sequences(tensors: SlotTensors, slot: int, sequences: tuple[tuple[int, ...], ...]) -> None:
    """Writes a slot's stop sequences as SlotTensors describes them."""
    tensors.num_stop_sequences[slot] = len(sequences)
    for entry, sequence in enumerate(sequences):
        padding = [-1] * (tensors.stop_sequences.shape[2] - len(sequence))
        tensors.stop_sequences[slot, entry] = torch.tensor([*padding, *sequence], dtype=torch.int32)


def make_limits(max_slots: int = 4, max_blocks: int = 5, block_size: int = 8, stop_ids: int = 2) -> SlotLimits:
    return SlotLimits(
        max_slots, max_blocks * block_size, max_slots * max_blocks * block_size, block_size, stop_ids,
        max_biases=5, max_stop_sequences=3, max_stop_sequence_tokens=4,
    )  # fmt: skip


def many_slots(max_slots: int) -> StepCase:
    """As many slots as a large deployment has: holes, decodes and short chunks in turn."""
    limits = make_limits(max_slots, max_blocks=3)
    kinds = (
        SlotCase(query_len=1, seq_len=7, num_tokens=8, num_blocks=1),
        SlotCase(),
        SlotCase(query_len=1, seq_len=9, num_tokens=10, num_blocks=2, stop_ids=(3,)),
        SlotCase(query_len=6, seq_len=4, num_tokens=10, num_blocks=2),
        SlotCase(query_len=2, seq_len=0, num_tokens=10, num_blocks=1),
    )
    slots = tuple(kinds[index * 7 % 5] for index in range(max_slots))
    rows = sum(slot.query_len for slot in slots)
    words = tuple(index % 5 for index in range(max_slots))
    nan = tuple(int(index % 11 == 0) for index in range(max_slots))
    return StepCase(limits, slots, rows + 300, max_slots - 2, 2**31 - 1, words, nan)


_CHUNK = SlotCase(query_len=300, seq_len=5, num_tokens=305, num_blocks=5, max_len=306)
_HOLE = SlotCase(seq_len=9, num_tokens=10)
_LONG = make_limits(max_slots=4, max_blocks=6, block_size=64)
NO_ACTIVE_SLOT = StepCase(make_limits(), (_HOLE,) * 4, rows=0, bucket=0)
LONG_STEP = StepCase(_LONG, (_HOLE, _CHUNK, _HOLE, _CHUNK), rows=1000, bucket=3, sampled=(4, 5), nan=(0, 0))
BROKEN_CASES = (
    StepCase(_LONG, (_HOLE, _CHUNK, _HOLE, _CHUNK), rows=599, bucket=4, sampled=(4, 5), nan=(0, 0)),
    StepCase(_LONG, (_HOLE, _CHUNK, _HOLE, _CHUNK), rows=700, bucket=1, sampled=(4, 5), nan=(0, 0)),
)


_sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), max_size=3)


@st.composite
def slot_cases(draw: st.DrawFn, limits: SlotLimits) -> SlotCase:
    """A slot that is idle, decodes, computes a chunk (the last of its prompt or not), or waits for a block."""
    kind = draw(st.sampled_from(["idle", "decode", "decode", "chunk", "unfinished", "parked"]))
    seq_len = draw(st.integers(0, limits.max_tokens - 3))
    if draw(st.booleans()):
        seq_len = max(seq_len // limits.block_size * limits.block_size - 1, 0)  # the step fills a block
    if kind == "parked":
        seq_len -= seq_len % limits.block_size
    room = limits.max_tokens - 1 - seq_len
    query_len = 0 if kind in ("idle", "parked") else 1 if kind == "decode" else draw(st.integers(1, room - 1))
    known = seq_len + max(query_len, 1)
    num_tokens = draw(st.integers(known + 1, limits.max_tokens)) if kind == "unfinished" else known
    covered = -(-known // limits.block_size)
    blocks = (
        seq_len // limits.block_size if kind == "parked" else min(covered + draw(st.integers(0, 1)), limits.max_blocks)
    )
    if kind != "parked" and draw(st.integers(0, 7)) == 0:
        blocks = draw(st.integers(0, blocks))  # KV of a row without a block goes nowhere
    return SlotCase(
        query_len=query_len,
        seq_len=seq_len,
        num_tokens=num_tokens,
        num_blocks=blocks,
        max_len=draw(st.sampled_from([num_tokens, num_tokens + 1, num_tokens + 2, limits.max_tokens])),
        min_len=draw(st.sampled_from([0, num_tokens - 1, num_tokens, num_tokens + 1])),
        parked=int(kind == "parked"),
        stop_ids=tuple(draw(st.lists(st.integers(0, 4), max_size=limits.max_stop_ids))),
        prompt_len=draw(st.sampled_from([0, max(num_tokens - 2, 0), num_tokens])),
        stop_sequences=tuple(draw(_sequences)),
    )


@st.composite
def step_cases(draw: st.DrawFn) -> StepCase:
    """Steps of up to 9 slots, short or long, that fit, just fit, or overflow in rows or in slots."""
    limits = make_limits(
        max_slots=draw(st.integers(1, 9)),
        max_blocks=draw(st.integers(1, 5)),
        block_size=draw(st.sampled_from([8, 16, 64])),
        stop_ids=draw(st.integers(1, 3)),
    )
    slots = tuple(draw(slot_cases(limits)) for _ in range(limits.max_slots))
    needed_rows = sum(slot.query_len for slot in slots)
    needed_slots = sum(slot.query_len > 0 for slot in slots)
    rows = max(needed_rows + draw(st.sampled_from([-1, 0, 0, 1, 3, 200])), 0)
    bucket = draw(st.integers(needed_slots, limits.max_slots))
    if draw(st.integers(0, 9)) == 0:
        bucket = max(needed_slots - 1, 0)
    words = st.lists(st.integers(0, 5), min_size=limits.max_slots, max_size=limits.max_slots)
    flags = st.lists(st.sampled_from([0, 0, 0, 1]), min_size=limits.max_slots, max_size=limits.max_slots)
    return StepCase(
        limits,
        slots,
        min(rows, limits.max_rows),
        bucket,
        counter=draw(st.sampled_from(COUNTERS) | st.integers(-(2**31), 2**31 - 1)),
        sampled=tuple(draw(words)),
        nan=tuple(draw(flags)),
        last_delta=draw(st.integers(-(2**31), 2**31 - 1)),
    )


# -- prepare


def check_prepare(case: StepCase, device: str) -> None:
    """The kernel on `device` and the reference both give the expected rows, and write nothing else."""
    for run, where in ((prepare_triton, device), (prepare_reference, "cpu")):
        for shortest_chunk in (1, 2):
            _check_prepare(run, where, case, shortest_chunk)


def _check_prepare(run: Callable[..., None], where: str, case: StepCase, shortest_chunk: int) -> None:
    expected = _expected_rows(case, shortest_chunk)
    slots, step = case.slot_tensors(where), poisoned_step(case.limits, where)
    before = [tensor.clone() for tensor in slots.all()]
    run(slots, step, case.rows, case.bucket, case.limits.block_size, SPLITS, shortest_chunk)
    assert all(map(torch.equal, before, slots.all())), f"{run.__name__} changed the slots"
    for name, values in expected.items():
        assert getattr(step, name).tolist() == values, f"{run.__name__}: {name}"


def poisoned_step(limits: SlotLimits, device: str) -> StepTensors:
    step = StepTensors.allocate(limits.max_slots, limits.max_rows, torch.device(device))
    for column in fields(StepTensors):
        getattr(step, column.name).fill_(POISON)
    return step


def _expected_rows(case: StepCase, shortest_chunk: int) -> dict[str, list[int]]:
    limits, slots = case.limits, case.slot_tensors()
    size = limits.block_size
    rows: list[tuple[int, int, int, int]] = []
    last_row: dict[int, int] = {}
    starts: list[int] = []
    singles = [index for index in case.active if case.slots[index].query_len < shortest_chunk]
    chunks = [index for index in case.active if case.slots[index].query_len >= shortest_chunk]
    for index in [*singles, *chunks]:
        slot = case.slots[index]
        if index in chunks:
            starts.append(len(rows))
        for position in range(slot.seq_len, slot.seq_len + slot.query_len):
            has_block = position // size < slot.num_blocks
            block = int(slots.block_tables[index, position // size]) if has_block else 0
            kv_slot = block * size + position % size if has_block else -1
            rows.append((index, position, int(slots.token_ids[index, position]), kv_slot))
        last_row[index] = len(rows) - 1
    total, count = len(rows), len(case.active)
    rows += [(-1, 0, 0, -1)] * (case.rows - total)
    index_of = {slot: index for index, slot in enumerate(case.active)}

    split_start = [0]
    for index in singles:
        tiles = -(-(case.slots[index].seq_len + 1) // SPLITS.tile)
        share = -(-tiles // min(max((tiles + SPLITS.size // 2) // SPLITS.size, 1), SPLITS.most))
        split_start.append(split_start[-1] + -(-tiles // share))

    def filled(values: list[int], size: int) -> list[int]:
        return values + [POISON] * (size - len(values))

    def slotwise(values: list[int], padding: int, more: int = 0) -> list[int]:
        return filled(values + [padding] * (case.bucket + more - len(values)), limits.max_slots + more)

    return {
        "row_slot": filled([row[0] for row in rows], limits.max_rows),
        "positions": filled([row[1] for row in rows], limits.max_rows),
        "input_ids": filled([row[2] for row in rows], limits.max_rows),
        "kv_slots": filled([row[3] for row in rows], limits.max_rows),
        "active_slots": slotwise(case.active, -1),
        "active_index": [index_of.get(slot, -1) for slot in range(limits.max_slots)],
        "decode_slots": slotwise(singles, -1),
        "split_start": slotwise(split_start, split_start[-1], more=1),
        "chunk_slots": slotwise(chunks, -1),
        "chunk_start": slotwise(starts, total, more=1),
        "logit_rows": slotwise([last_row[index] for index in case.active], 0),
        "info": [count, int(case.overflows)],
        "tickets": [POISON] * 2,
    }


# -- update


def check_update(case: StepCase, device: str) -> None:
    """The kernel on `device` and the reference both move the slots on as expected, and write that record alone."""
    expected_slots, expected_record, counter_after = _expected_update(case)
    layout = RecordLayout(case.limits.max_slots, extra_words=3)
    for run, where in ((update_triton, device), (update_reference, "cpu")):
        slots, step = case.slot_tensors(where), poisoned_step(case.limits, where)
        prepare_reference(slots, step, case.rows, case.bucket, case.limits.block_size)
        ring = torch.full((RING, layout.words), POISON, dtype=torch.int32, device=where)
        counter = torch.tensor([case.counter], dtype=torch.int32, device=where)
        count = len(case.active)
        sampled = _poisoned_words(case.sampled[:count], case.limits.max_slots, where)
        nan = _poisoned_words(case.nan[:count], case.limits.max_slots, where)
        run(slots, step, sampled, nan, ring, counter, case.limits.block_size)
        for column in fields(SlotTensors):
            actual, wanted = getattr(slots, column.name).cpu(), getattr(expected_slots, column.name)
            assert torch.equal(actual, wanted), f"{run.__name__}: {column.name}"
        records = [[POISON] * layout.words for _ in range(RING)]
        records[case.counter % RING][: layout.base_words] = expected_record
        assert ring.tolist() == records, f"{run.__name__}: ring"
        assert counter.item() == counter_after, f"{run.__name__}: counter"


def _poisoned_words(values: tuple[int, ...], size: int, device: str) -> torch.Tensor:
    return torch.tensor([*values, *[POISON] * (size - len(values))], dtype=torch.int32, device=device)


def _expected_update(case: StepCase) -> tuple[SlotTensors, list[int], int]:
    after = case.slot_tensors()
    outcomes = [(-1, FinishCode.RUNNING, -1)] * case.limits.max_slots
    for index, slot in enumerate(case.active):
        outcomes[slot] = _run_slot(case, after, slot, case.sampled[index], bool(case.nan[index]))
    header = [
        case.counter,
        len(case.active),
        int(bool((after.query_lens > 0).any()) or bool(after.parked.any())),
        int(case.overflows),
        int(any(finish == FinishCode.NAN for _, finish, _ in outcomes)),
        case.last_delta,
        0,
        0,
    ]
    columns = [int(outcome[part]) for part in range(3) for outcome in outcomes]
    following = case.counter + 1
    return after, header + columns, following - 2**32 if following == 2**31 else following


def _run_slot(case: StepCase, after: SlotTensors, index: int, token: int, is_nan: bool) -> tuple[int, FinishCode, int]:
    slot = case.slots[index]
    computed = slot.seq_len + slot.query_len
    after.seq_lens[index], after.query_lens[index], after.parked[index] = computed, 0, 0
    if computed != slot.num_tokens:
        return 0, FinishCode.RUNNING, -1
    if is_nan:
        return 0, FinishCode.NAN, -1
    after.token_ids[index, slot.num_tokens] = token
    after.num_tokens[index] = slot.num_tokens + 1
    output = after.token_ids[index, slot.prompt_len : slot.num_tokens + 1].tolist()
    completes = any(output[-len(sequence) :] == list(sequence) for sequence in slot.stop_sequences)
    if (token in slot.stop_ids or completes) and slot.num_tokens >= slot.min_len:
        return 1, FinishCode.STOP, token
    if slot.num_tokens + 1 >= slot.max_len:
        return 1, FinishCode.LENGTH, token
    if computed >= slot.num_blocks * case.limits.block_size:
        after.parked[index] = 1
        return 1, FinishCode.PARKED, token
    after.query_lens[index] = 1
    return 1, FinishCode.RUNNING, token


# -- apply


@dataclass(frozen=True)
class DeltaCase:
    """What one batch does to one slot."""

    slot: int
    admission: Admission | None = None
    progress: tuple[int, int] = (0, 0)  # of the admission: seq_len, num_tokens
    armed: tuple[int, int] | None = None  # first token, count
    blocks: tuple[int, int] | None = None  # first block, count
    released: bool = False


@dataclass(frozen=True)
class ApplyCase:
    """A batch of deltas over the slots of a step case."""

    state: StepCase
    deltas: tuple[DeltaCase, ...] = ()
    step: int = 5

    def staging(self) -> torch.Tensor:
        limits = self.state.limits
        batch = SlotDeltas(limits)
        for delta in self.deltas:
            if delta.released:
                batch.release(delta.slot)
            if delta.admission is not None:
                assert batch.has_room_for(delta.admission)
                batch.admit(delta.slot, delta.admission, *delta.progress)
            if delta.armed is not None:
                first, count = delta.armed
                batch.arm(delta.slot, first, as_words([(delta.slot + first + n) % VOCABULARY for n in range(count)]))
            if delta.blocks is not None:
                first, count = delta.blocks
                batch.supply(delta.slot, first, range(200 + first, 200 + first + count))
        words = torch.full((limits.staging_words,), POISON, dtype=torch.int32)
        batch.pack(words.numpy(), self.step)
        return words


_biases = st.dictionaries(st.integers(0, 2**31 - 1), st.floats(width=32, allow_nan=False), max_size=5).map(
    lambda biases: tuple(biases.items())
)
_admissions = st.builds(
    Admission,
    max_len=st.integers(1, 30),
    min_len=st.integers(0, 9),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 1, 50]),
    top_p=st.sampled_from([1.0, 0.9, 0.1]),
    seed=st.integers(0, 2**63 - 1) | st.sampled_from([2**31, 2**32 - 1, 2**32, 2**63 - 1]),
    stop_ids=st.just(()),
    prompt_len=st.integers(0, 9),
    log_min_p=st.sampled_from([float("-inf"), -0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    biases=st.just(())
    | st.dictionaries(st.integers(0, 2**31 - 1), st.floats(width=32, allow_nan=False), max_size=5).map(
        lambda biases: tuple(biases.items())
    ),
    stop_sequences=_sequences.map(tuple),
)


@st.composite
def apply_cases(draw: st.DrawFn) -> ApplyCase:
    """Batches of every combination of admit, arm, supply and release, over slots in every state."""
    state = draw(step_cases())
    limits = state.limits
    order = draw(st.permutations(range(limits.max_slots)))
    chosen = order[: draw(st.integers(0, limits.max_slots))]
    budget, with_lists = limits.max_rows, 2
    deltas = []
    for slot in chosen:
        delta = DeltaCase(slot, released=draw(st.integers(0, 3)) == 0)
        if draw(st.booleans()):
            stops = tuple(draw(st.lists(st.integers(0, VOCABULARY), max_size=limits.max_stop_ids)))
            progress = (draw(st.integers(0, 3)), draw(st.integers(1, 9)))
            delta = replace(delta, admission=replace(draw(_admissions), stop_ids=stops), progress=progress)
            if with_lists == 0:
                delta = replace(delta, admission=replace(delta.admission, biases=(), stop_sequences=()))
            elif delta.admission.biases or delta.admission.stop_sequences:
                with_lists -= 1
        if draw(st.booleans()):
            first = draw(st.integers(0, limits.max_tokens - 1))
            count = min(draw(st.integers(1, limits.max_tokens - first)), budget)
            budget -= count
            delta = replace(delta, armed=(first, count))
        if draw(st.booleans()):
            held = 0 if delta.admission is not None else state.slots[slot].num_blocks
            if held < limits.max_blocks:
                delta = replace(delta, blocks=(held, draw(st.integers(1, min(limits.max_blocks - held, 3)))))
        deltas.append(delta)
    return ApplyCase(state, tuple(deltas), step=draw(st.sampled_from([0, 2**31 - 1, 2**31, 2**32 - 1, 2**32])))


LONG_APPLY = ApplyCase(LONG_STEP, (DeltaCase(2, armed=(11, 370)), DeltaCase(1, armed=(0, 300), blocks=(2, 4))))


def check_apply(case: ApplyCase, device: str | None) -> None:
    """The kernel on `device` (None: no kernel) and the reference change the slots as expected, and nothing else."""
    expected = _expected_slots(case)
    kernel = [(apply_deltas_triton, device)] if device else []
    for run, where in (*kernel, (apply_deltas_reference, "cpu")):
        slots = case.state.slot_tensors(where)
        run(case.staging().to(where), slots, case.state.limits.block_size)
        for column in fields(SlotTensors):
            actual, wanted = getattr(slots, column.name).cpu(), getattr(expected, column.name)
            assert torch.equal(actual, wanted), f"{run.__name__}: {column.name}"


def _expected_slots(case: ApplyCase) -> SlotTensors:
    slots, size = case.state.slot_tensors(), case.state.limits.block_size
    low = case.step % 2**32
    slots.last_delta[0] = low - 2**32 if low >= 2**31 else low
    for delta in case.deltas:
        index = delta.slot
        if delta.admission is not None:
            _admit(slots, index, delta.admission, *delta.progress)
        if delta.blocks is not None:
            first, count = delta.blocks
            slots.block_tables[index, first : first + count] = torch.arange(200 + first, 200 + first + count).int()
            slots.num_blocks[index] = first + count
            if slots.parked[index] and int(slots.seq_lens[index]) < (first + count) * size:
                slots.parked[index], slots.query_lens[index] = 0, 1
        if delta.armed is not None:
            first, count = delta.armed
            tokens = [(index + first + n) % VOCABULARY for n in range(count)]
            slots.token_ids[index, first : first + count] = torch.tensor(tokens, dtype=torch.int32)
            slots.query_lens[index] = count
        if delta.released and delta.admission is None:  # a release cannot cancel what the new owner brings
            slots.query_lens[index] = slots.parked[index] = 0
    return slots


def _admit(slots: SlotTensors, index: int, admission: Admission, seq_len: int, num_tokens: int) -> None:
    for name in (
        "prompt_len", "max_len", "min_len", "temperature", "top_k", "top_p", "log_min_p", "seed",
        "repetition_penalty", "presence_penalty", "frequency_penalty",
    ):  # fmt: skip
        getattr(slots, name)[index] = getattr(admission, name)
    slots.bias_ids[index] = -1
    for entry, (token, value) in enumerate(admission.biases):
        slots.bias_ids[index, entry], slots.bias_values[index, entry] = token, value
    put_sequences(slots, index, admission.stop_sequences)
    slots.seq_lens[index], slots.num_tokens[index] = seq_len, num_tokens
    slots.stop_ids[index] = -1
    for entry, token in enumerate(admission.stop_ids):
        slots.stop_ids[index, entry] = token
    slots.num_blocks[index] = slots.parked[index] = slots.query_lens[index] = 0


def check_flags(flags: int, device: str) -> None:
    """Kernel and reference agree on every combination of flags, also on those that SlotDeltas never packs."""
    limits = make_limits(max_slots=3)
    parked = SlotCase(seq_len=8, num_tokens=9, num_blocks=1, parked=1)
    running = SlotCase(query_len=1, seq_len=9, num_tokens=10, num_blocks=2)
    state = StepCase(limits, (running, parked, running), rows=3, bucket=3)
    admission = Admission(20, 2, 0.5, 3, 0.25, 2**63 - 1, (7,))
    deltas = [DeltaCase(slot, admission, progress=(0, 4), armed=(1, 3), blocks=(1, 2)) for slot in (1, 2)]
    words = ApplyCase(state, tuple(deltas)).staging()
    words[HEADER_WORDS + 1 :: limits.entry_words][:2] = flags
    outcomes = []
    for run, where in ((apply_deltas_triton, device), (apply_deltas_reference, "cpu")):
        slots = state.slot_tensors(where)
        run(words.to(where), slots, limits.block_size)
        query_len = 0 if flags & RELEASE else 3 if flags & ARM else None
        for slot, revived in ((1, 1), (2, 1)):
            idle = 0 if flags & ADMIT else revived
            assert slots.query_lens[slot] == (idle if query_len is None else query_len), run.__name__
            assert slots.parked[slot] == 0
        outcomes.append([tensor.cpu() for tensor in slots.all()])
    assert all(map(torch.equal, *outcomes))


def slots_on(tensors: SlotTensors, device: str) -> SlotTensors:
    """The same slots there."""
    sizes = {
        "tokens": tensors.token_ids.shape[1],
        "blocks": tensors.block_tables.shape[1],
        "stop_ids": tensors.stop_ids.shape[1],
        "biases": tensors.bias_ids.shape[1],
        "stop_sequences": tensors.stop_sequences.shape[1],
        "stop_sequence_tokens": tensors.stop_sequences.shape[2],
    }
    copies = SlotTensors.allocate(len(tensors.query_lens), torch.device(device), **sizes)
    for copy, tensor in zip(copies.all(), tensors.all(), strict=True):
        copy.copy_(tensor)
    return copies
