"""The rings: a slot comes back only once it has retired (F1 to F4)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from graphexec.errors import PipelineFull
from graphexec.plan import RecordLayout
from graphexec.rings import RING_SLOTS, OutputRing, StagingRing
from graphexec.runtime.cpu import CpuStream
from tests.support.instant_program import PATIENCE_S, Gate, WatchedRuntime

LAYOUT = RecordLayout(max_slots=2, extra_words=3)


@pytest.fixture
def runtime() -> WatchedRuntime:
    return WatchedRuntime()


@pytest.fixture
def compute(runtime: WatchedRuntime) -> Iterator[CpuStream]:
    stream = runtime.stream("compute")
    yield stream
    stream.close()


@pytest.fixture
def copy(runtime: WatchedRuntime) -> Iterator[CpuStream]:
    stream = runtime.stream("copy")
    yield stream
    stream.close()


@pytest.fixture
def ring(runtime: WatchedRuntime) -> OutputRing:
    return OutputRing(runtime, LAYOUT)


def write(ring: OutputRing, step: int, compute: CpuStream, gate: Gate | None = None) -> None:
    """A step that fills its record with its number."""

    def work() -> None:
        if gate is not None:
            gate()
        ring.device[step % RING_SLOTS].fill_(step)

    compute.run(work)


def test_f1_the_copy_does_not_read_a_record_before_the_step_wrote_it(
    ring: OutputRing, compute: CpuStream, copy: CpuStream
) -> None:
    gate = Gate()
    ring.acquire(3)
    write(ring, 3, compute, gate)
    ring.copy_out(3, compute, copy, LAYOUT.words)
    assert not copy.drain(0.05)
    assert ring.fences(3) == (False, False)
    gate.open()
    assert ring.wait(3, PATIENCE_S)
    assert (ring.read(3, LAYOUT.words) == 3).all()


def test_f2_the_host_does_not_read_a_record_before_its_copy_landed(
    ring: OutputRing, compute: CpuStream, copy: CpuStream
) -> None:
    gate = Gate()
    ring.acquire(3)
    write(ring, 3, compute)
    copy.run(gate)
    ring.copy_out(3, compute, copy, LAYOUT.words)
    assert compute.drain(PATIENCE_S)
    assert not ring.wait(3, 0.05)
    assert ring.fences(3) == (True, False)
    gate.open()
    assert ring.wait(3, PATIENCE_S)
    assert (ring.read(3, LAYOUT.words) == 3).all()


def test_f3_a_slot_retires_when_it_was_read_and_not_when_its_copy_landed(
    ring: OutputRing, compute: CpuStream, copy: CpuStream
) -> None:
    for step in range(RING_SLOTS):
        ring.acquire(step)
        write(ring, step, compute)
        ring.copy_out(step, compute, copy, LAYOUT.words)
    assert copy.drain(PATIENCE_S)
    with pytest.raises(PipelineFull, match="Step 8 needs the ring slot of step 0"):
        ring.acquire(RING_SLOTS)
    assert (ring.read(1, LAYOUT.words) == 1).all()
    with pytest.raises(PipelineFull):
        ring.acquire(RING_SLOTS)  # another slot is free, and not this one
    assert (ring.read(0, LAYOUT.words) == 0).all()
    ring.acquire(RING_SLOTS)


def test_a_record_that_was_read_is_not_touched_by_later_steps(
    ring: OutputRing, compute: CpuStream, copy: CpuStream
) -> None:
    ring.acquire(0)
    write(ring, 0, compute)
    ring.copy_out(0, compute, copy, LAYOUT.words)
    assert ring.wait(0, PATIENCE_S)
    record = ring.read(0, LAYOUT.words)
    ring.acquire(RING_SLOTS)
    write(ring, RING_SLOTS, compute)
    ring.copy_out(RING_SLOTS, compute, copy, LAYOUT.words)
    assert ring.wait(RING_SLOTS, PATIENCE_S)
    assert (record == 0).all()


def test_extra_words_are_copied_only_for_a_variant_that_has_them(
    ring: OutputRing, compute: CpuStream, copy: CpuStream
) -> None:
    for step, words in ((1, LAYOUT.base_words), (2, LAYOUT.words)):
        ring.acquire(step)
        write(ring, step, compute)
        ring.copy_out(step, compute, copy, words)
        assert ring.wait(step, PATIENCE_S)
        extra = ring.read(step, LAYOUT.words)[LAYOUT.base_words :]
        assert (extra == (step if words == LAYOUT.words else 0)).all()


def test_a_slot_that_was_given_back_can_be_taken_again(ring: OutputRing) -> None:
    ring.acquire(4)
    with pytest.raises(PipelineFull):
        ring.acquire(4)
    ring.release(4)
    ring.acquire(4)


def test_f4_a_staging_slot_is_not_refilled_before_the_device_read_it(
    runtime: WatchedRuntime, compute: CpuStream
) -> None:
    staging, gate = StagingRing(runtime, words=5), Gate()
    arrived: list[torch.Tensor] = []
    compute.run(gate)
    for number in range(RING_SLOTS):
        slot, words = staging.acquire()
        words[:] = number
        compute.run(lambda slot=slot: arrived.append(staging.on_device(slot).clone()))
        staging.retire_behind(slot, compute)
    with pytest.raises(PipelineFull, match="8 staging slots"):
        staging.acquire()
    gate.open()
    assert compute.drain(PATIENCE_S)
    slot, words = staging.acquire()
    words[:] = 99
    assert slot == 0
    assert [int(tensor[0]) for tensor in arrived] == list(range(RING_SLOTS))


def test_the_host_writes_into_the_memory_that_the_device_reads(runtime: WatchedRuntime) -> None:
    staging = StagingRing(runtime, words=3)
    slot, words = staging.acquire()
    words[:] = (1, 2, 3)
    assert staging.on_device(slot).tolist() == [1, 2, 3]
    assert words.dtype == np.int32


def test_closing_frees_every_event(runtime: WatchedRuntime, ring: OutputRing) -> None:
    staging = StagingRing(runtime, words=3)
    ring.close()
    staging.close()
    assert runtime.freed == ["event"] * (3 * RING_SLOTS)
