"""The pipeline: its fences, what each failure leaves behind, and records that belong to their own step."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch

from graphexec.capture.buckets import BucketTable, Ladders
from graphexec.capture.traffic import Traffic
from graphexec.deltas import SlotDeltas
from graphexec.engine.generation import Generation
from graphexec.engine.params import SamplingParams
from graphexec.engine.request import Request
from graphexec.engine.scheduling.blocks import BlockAllocator
from graphexec.engine.scheduling.scheduler import Scheduler
from graphexec.errors import BucketOverflowError, ConfigError, DeviceError, PipelineFull, StepTimeout
from graphexec.plan import Delta, FinishCode, GraphKey, StepPlan
from graphexec.rings import RING_SLOTS
from tests.support.instant_program import (
    DECODE,
    PATIENCE_S,
    STOP_TOKEN,
    Gate,
    LyingDelta,
    Rig,
    admission_plan,
    admit,
    small_limits,
    tokens_of,
)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


@pytest.fixture
def hasty() -> Iterator[Rig]:
    """A pipeline that gives up soon."""
    rig = Rig(timeout_s=0.05)
    yield rig
    rig.close()


# -- fences


def test_f1_the_copy_waits_until_the_step_has_written_its_record(rig: Rig) -> None:
    gate = rig.program.hold(1)
    rig.admit({0: 10})
    handle = rig.submit()
    assert gate.reached.wait(PATIENCE_S)
    assert not rig.copy.drain(0.05)
    gate.open()
    assert tokens_of(handle.result()) == {0: 12}


def test_f2_the_host_waits_until_the_copy_has_landed(rig: Rig) -> None:
    gate = Gate()
    rig.copy.run(gate)
    handle = rig.admit({0: 10})
    assert rig.compute.drain(PATIENCE_S)
    with pytest.raises(StepTimeout):
        handle.result(timeout_s=0.05)
    gate.open()
    assert tokens_of(handle.result()) == {0: 11}


def test_f3_submit_refuses_to_overwrite_a_record_that_was_not_collected(rig: Rig) -> None:
    handles = [rig.admit({0: 10}), *(rig.submit() for _ in range(RING_SLOTS - 1))]
    rig.drain()  # every copy has landed, and that is not enough
    with pytest.raises(PipelineFull, match="Step 8 needs the ring slot of step 0"):
        rig.submit()
    assert tokens_of(handles[0].result()) == {0: 11}
    handles.append(rig.submit())
    rig.drain()
    assert [tokens_of(handle.result())[0] for handle in handles] == list(range(11, 11 + RING_SLOTS + 1))


def test_f4_a_staging_slot_is_not_refilled_while_its_delta_waits_behind_a_running_step(rig: Rig) -> None:
    """Refused submits use up staging slots too, so that the output ring alone would not protect them."""
    gate = rig.program.hold(0)
    first = rig.submit()
    second = rig.admit({0: 10})
    refusing = _Refusing(rig)
    for _ in range(RING_SLOTS - 1):
        with pytest.raises(_RefusalError):
            rig.pipeline.submit(admission_plan(rig.limits, {1: 20}), refusing)
    with pytest.raises(PipelineFull, match="staging"):
        rig.admit({2: 30})
    gate.open()
    assert first.result().real_bsz == 0
    assert tokens_of(second.result()) == {0: 11}
    assert tokens_of(rig.admit({2: 30}).result()) == {0: 12, 2: 31}


def test_f4_a_staging_slot_is_not_refilled_while_it_is_being_read(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event recorded before the application, rather than behind it, would retire the slot too early."""
    gate, apply = Gate(), rig.program.apply

    def slow_apply(staging: torch.Tensor) -> None:
        gate()
        apply(staging)

    monkeypatch.setattr(rig.program, "apply", slow_apply)
    first = rig.admit({0: 10})
    assert gate.reached.wait(PATIENCE_S)
    refusing = _Refusing(rig)
    for _ in range(RING_SLOTS - 1):
        with pytest.raises(_RefusalError):
            rig.pipeline.submit(admission_plan(rig.limits, {1: 20}), refusing)
    with pytest.raises(PipelineFull, match="staging"):
        rig.admit({2: 30})
    gate.open()
    assert tokens_of(first.result()) == {0: 11}


def test_f5_a_slot_gets_a_new_owner_only_after_its_last_step_was_collected() -> None:
    limits = small_limits(max_slots=2)
    scheduler = Scheduler(limits, BlockAllocator(64), limits.max_rows, lookahead=3)
    aborted, staying, waiting = (_generation(name) for name in ("aborted", "staying", "waiting"))
    scheduler.add(aborted)
    scheduler.add(staying)
    first = scheduler.schedule(0, collected=-1)
    assert first is not None
    assert scheduler.schedule(1, collected=-1) is not None
    freed = first.owners.index(aborted)
    scheduler.abort(aborted)
    scheduler.add(waiting)
    assert scheduler.schedule(2, collected=-1) is not None  # carries the release; steps 0 and 1 ran the old owner
    for step, collected in ((3, -1), (4, 0)):
        scheduled = scheduler.schedule(step, collected)
        assert scheduled is not None
        assert waiting not in scheduled.owners
        assert scheduled.owners[freed] is None
    scheduled = scheduler.schedule(5, collected=1)
    assert scheduled is not None
    assert scheduled.owners[freed] is waiting


def test_f7_close_drains_both_streams_before_it_frees_anything(rig: Rig) -> None:
    step, copy = rig.program.hold(0), Gate()
    rig.copy.run(copy)
    rig.admit({0: 10})
    assert step.reached.wait(PATIENCE_S)
    closing = threading.Thread(target=rig.pipeline.close)
    closing.start()
    for gate in (step, copy):
        closing.join(0.05)
        assert closing.is_alive()
        assert rig.runtime.freed == []
        gate.open()
    closing.join(PATIENCE_S)
    assert rig.runtime.freed == ["event"] * (3 * RING_SLOTS) + ["stream"] * 2
    assert rig.pipeline.drained


def test_f7_close_waits_for_work_behind_which_there_is_no_copy(rig: Rig) -> None:
    """A submit that failed halfway leaves a delta on the compute stream, and nothing on the other."""
    gate = Gate()
    rig.compute.run(gate)
    with pytest.raises(ValueError, match="^$"):
        rig.pipeline.submit(admission_plan(rig.limits, {0: 10}), _BreakingHalfway(rig, "step", ValueError))
    closing = threading.Thread(target=rig.pipeline.close)
    closing.start()
    closing.join(0.05)
    assert rig.runtime.freed == []
    gate.open()
    closing.join(PATIENCE_S)
    assert "stream" in rig.runtime.freed


def test_f7_a_pipeline_that_does_not_drain_is_never_freed() -> None:
    hasty, gate = Rig(timeout_s=0.05), Gate()
    hasty.compute.run(gate)  # a worker that holds nothing of the pipeline, as a device does not
    hasty.pipeline.close()
    assert not hasty.pipeline.drained  # or the backend would free its graphs under a running step
    assert hasty.runtime.freed == []
    kept = weakref.ref(hasty.program)
    del hasty.pipeline, hasty.launcher, hasty.program
    gc.collect()
    assert kept() is not None
    gate.open()


def test_f8_changes_of_one_slot_become_one_delta(rig: Rig) -> None:
    deltas = SlotDeltas(rig.limits)
    deltas.release(0)
    admit(deltas, 0, 40, blocks=1)
    deltas.supply(0, 1, [9])
    assert len(deltas) == 1
    assert tokens_of(rig.submit(StepPlan("plain", deltas)).result()) == {0: 41}


def test_host_writes_for_the_next_step_do_not_overtake_the_running_step(rig: Rig) -> None:
    """SGLang 26380, mini-sglang 67: the next batch was written while the forward still read the last one."""
    rig.admit({0: 10, 1: 20}).result()
    gate = rig.program.hold(1)
    running = rig.submit()
    assert gate.reached.wait(PATIENCE_S)
    deltas = admit(SlotDeltas(rig.limits), 0, 70)
    deltas.release(1)
    following = rig.submit(StepPlan("plain", deltas))
    assert not rig.compute.drain(0.05)
    gate.open()
    assert tokens_of(running.result()) == {0: 12, 1: 22}
    assert tokens_of(following.result()) == {0: 71}


# -- records


@pytest.mark.parametrize("depth", range(RING_SLOTS))
def test_every_depth_gives_the_same_records(rig: Rig, depth: int) -> None:
    rig.program.mischief.stops = {4: [1]}
    plans = [admission_plan(rig.limits, {0: 10, 1: 20}), *[DECODE] * 3, admission_plan(rig.limits, {2: 30})]
    plans += [DECODE] * 15
    results, in_flight = [], deque()
    for plan in plans:
        in_flight.append(rig.submit(plan))
        if len(in_flight) > depth:
            results.append(in_flight.popleft().result())
    results += [handle.result() for handle in in_flight]
    for step, result in enumerate(results):
        expected = {0: 11 + step}
        if step <= 4:
            expected[1] = 21 + step if step < 4 else STOP_TOKEN
        if step >= 4:
            expected[2] = 27 + step
        assert tokens_of(result) == expected
        assert (result.step, result.real_bsz) == (step, len(expected))
        assert result.finish[1] == (FinishCode.STOP if step == 4 else FinishCode.RUNNING)


def test_a_record_comes_from_its_own_slot_and_never_from_live_state(rig: Rig) -> None:
    """FastDeploy 7221 and 7788: the current batch's counts were read for the previous batch's output."""
    rig.program.mischief.stops = {0: [0, 1, 2], 2: [3]}
    handles = [rig.admit({0: 10, 1: 20, 2: 30, 3: 40}), rig.submit(), rig.submit(), rig.submit()]
    rig.drain()
    results = [handle.result() for handle in handles]
    assert [result.real_bsz for result in results] == [4, 1, 1, 0]
    assert [result.any_running for result in results] == [True, True, False, False]
    assert [tokens_of(result) for result in results] == [
        dict.fromkeys((0, 1, 2), STOP_TOKEN) | {3: 41},
        {3: 42},
        {3: STOP_TOKEN},
        {},
    ]


def test_results_can_be_taken_in_any_order(rig: Rig) -> None:
    handles = [rig.admit({0: 10}), rig.submit(), rig.submit(), rig.submit()]
    for step in (2, 0, 3, 1):
        assert tokens_of(handles[step].result()) == {0: 11 + step}
    assert rig.pipeline.controller.next_bound() == 1


def test_a_result_can_be_asked_for_again(rig: Rig) -> None:
    handle = rig.admit({0: 10})
    assert handle.result() is handle.result()


def test_a_result_is_not_changed_by_later_steps(rig: Rig) -> None:
    results = [rig.admit({0: 10}).result()]
    results += [rig.submit().result() for _ in range(2 * RING_SLOTS)]
    assert [tokens_of(result)[0] for result in results] == list(range(11, 12 + 2 * RING_SLOTS))


def test_extra_words_come_with_the_variants_that_have_them(rig: Rig) -> None:
    assert rig.admit({1: 10, 3: 20}).result().extra is None
    extra = rig.submit(StepPlan("doubled")).result().extra
    assert extra is not None
    assert extra[:2].tolist() == [24, 44]


def test_a_late_stop_delivers_no_extra_token(rig: Rig) -> None:
    rig.program.mischief.stops = {1: [0]}
    handles = [rig.admit({0: 10}), *(rig.submit() for _ in range(4))]
    assert [tokens_of(handle.result()) for handle in handles] == [{0: 11}, {0: STOP_TOKEN}, {}, {}, {}]


def test_all_slots_run_at_once(rig: Rig) -> None:
    handle = rig.admit({0: 10, 1: 20, 2: 30, 3: 40})
    assert handle.key == GraphKey("prefill", 16, 4, "plain")
    assert handle.result().real_bsz == 4
    again = rig.submit()
    assert again.key == GraphKey("decode", 4, 4, "plain")
    assert tokens_of(again.result()) == {0: 12, 1: 22, 2: 32, 3: 42}


def test_an_empty_step_is_legal_and_looks_up_no_bucket(rig: Rig) -> None:
    handle = rig.submit()
    assert handle.key == GraphKey("idle", 0, 0, "plain")
    result = handle.result()
    assert (result.real_bsz, result.any_running) == (0, False)
    assert (result.num_tokens == -1).all()


@pytest.mark.parametrize("start", [2**31 - 2, 2**31 + 5, 2**32 - 2])
def test_the_step_number_may_outgrow_its_word(rig: Rig, start: int) -> None:
    rig.pipeline._next_step = start  # nothing public can run that long
    rig.pipeline.io.counter.fill_(start - 2**32 if start >= 2**31 else start)
    for offset in range(5):
        handle = rig.admit({offset % 4: 10 * offset})
        assert handle.step == start + offset
        assert tokens_of(handle.result())[offset % 4] == 10 * offset + 1


# -- failures


def test_a_record_with_another_step_number_is_refused(rig: Rig) -> None:
    rig.program.mischief.wrong_numbers = {1: 77}
    rig.admit({0: 10}).result()
    handle = rig.submit()
    with pytest.raises(DeviceError, match="record of step 1 carries step 77"):
        handle.result()
    with pytest.raises(DeviceError, match="takes no more steps"):
        rig.submit()


def test_a_delta_that_did_not_reach_the_device_is_noticed(rig: Rig) -> None:
    rig.launcher.apply = lambda slot: lambda: None
    handle = rig.admit({0: 10})
    with pytest.raises(DeviceError, match="expected delta 0"):
        handle.result()


def test_an_overflow_names_its_step_and_runs_nobody(rig: Rig) -> None:
    deltas = SlotDeltas(rig.limits)
    for slot in range(3):
        admit(deltas, slot, 10)
    handle = rig.submit(StepPlan("plain", LyingDelta(deltas, armed=(0,))))
    assert handle.bound == 1
    with pytest.raises(BucketOverflowError, match="Step 0 had more rows or slots than its decode step, bucket 1"):
        handle.result()
    assert (rig.program.state_of_slots.slots.seq_lens == 0).all()


def test_an_exception_in_a_step_is_kept_and_raised_at_the_next_call(rig: Rig) -> None:
    rig.program.mischief.failures = {1: ValueError("no such token")}
    first, second = rig.admit({0: 10}), rig.submit()
    rig.drain()
    with pytest.raises(DeviceError, match="ValueError: no such token"):
        second.result()
    with pytest.raises(DeviceError):
        first.result()
    with pytest.raises(DeviceError):
        rig.submit()


def test_a_timeout_names_step_bucket_and_last_fence(rig: Rig) -> None:
    rig.admit({0: 10, 1: 20}).result()
    gate = rig.program.hold(1)
    handle = rig.submit()
    with pytest.raises(StepTimeout) as raised:
        handle.result(timeout_s=0.05)
    message = str(raised.value)
    assert "Step 1 (decode step, bucket 2, 2 rows, plain)" in message
    assert "0.05 s" in message
    assert "Last fence passed: none" in message
    gate.open()
    assert tokens_of(handle.result()) == {0: 12, 1: 22}, "the call can be repeated"


def test_f7_after_a_timeout_nothing_is_freed_while_the_step_still_runs() -> None:
    rig = Rig(timeout_s=1.0)
    gate = rig.program.hold(0)
    handle = rig.admit({0: 10})
    with pytest.raises(StepTimeout):
        handle.result()
    started = time.perf_counter()
    rig.pipeline.close()
    assert time.perf_counter() - started < 0.5, "it has waited in vain, and does not wait again"
    assert rig.runtime.freed == []
    assert not rig.pipeline.drained
    gate.open()


def test_f7_a_result_that_was_polled_in_vain_neither_hurries_close_nor_pins_anything() -> None:
    rig = Rig()
    gate = rig.program.hold(0)
    handle = rig.admit({0: 10})
    with pytest.raises(StepTimeout):
        handle.result(timeout_s=0.01)
    threading.Timer(0.3, gate.open).start()
    rig.pipeline.close()
    assert rig.pipeline.drained
    assert rig.runtime.freed.count("stream") == 2
    program, pipeline = weakref.ref(rig.program), weakref.ref(rig.pipeline)
    del handle, rig.pipeline, rig.launcher, rig.program
    gc.collect()
    assert pipeline() is None
    assert program() is None


@pytest.mark.parametrize("late", ["compute", "copy"])
def test_f7_a_pipeline_that_is_dropped_frees_nothing_before_its_streams_have_drained(late: str) -> None:
    rig, gate = Rig(), Gate()
    rig.runtime.streams[late].run(gate)
    handle = rig.admit({0: 10})
    assert gate.reached.wait(PATIENCE_S)
    freed_early: list[str] = []

    def let_it_land() -> None:
        freed_early.extend(rig.runtime.freed)
        gate.open()

    threading.Timer(0.2, let_it_land).start()
    del handle, rig.pipeline, rig.launcher
    gc.collect()
    assert freed_early == []
    assert rig.runtime.freed == ["event"] * (3 * RING_SLOTS) + ["stream"] * 2


def test_f7_a_pipeline_whose_last_reference_goes_in_a_worker_is_freed_all_the_same() -> None:
    """A stream cannot wait for itself, and the garbage collector runs in whatever thread allocates."""
    rig = Rig()
    runtime, held = rig.runtime, [rig.pipeline]
    rig.compute.run(held.clear)
    del rig.pipeline, rig.launcher
    deadline = time.monotonic() + PATIENCE_S
    while runtime.freed.count("stream") < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert runtime.freed == ["event"] * (3 * RING_SLOTS) + ["stream"] * 2


def test_a_handle_says_whether_its_record_has_arrived(rig: Rig) -> None:
    gate = rig.program.hold(0)
    handle = rig.admit({0: 10})
    assert not handle.done()
    gate.open()
    rig.drain()
    assert handle.done()
    assert tokens_of(handle.result()) == {0: 11}
    for _ in range(2 * RING_SLOTS):
        rig.submit().result()
    gate = rig.program.hold(2 * RING_SLOTS + 1)
    rig.submit()  # in whose ring slot, one of the later steps, nothing has arrived
    assert handle.done()
    gate.open()


def test_a_step_that_was_not_collected_before_the_pipeline_was_closed_says_so(rig: Rig) -> None:
    """Its events are gone: to ask them would be a use after free."""
    handle = rig.admit({0: 10})
    rig.pipeline.close()
    for ask in (handle.done, handle.result):
        with pytest.raises(DeviceError, match="closed before this step was collected"):
            ask()


def test_a_timeout_in_the_copy_says_that_the_step_itself_is_done(rig: Rig) -> None:
    gate = Gate()
    rig.copy.run(gate)
    handle = rig.admit({0: 10})
    assert rig.compute.drain(PATIENCE_S)
    with pytest.raises(StepTimeout, match=r"Last fence passed: done \(F1\)"):
        handle.result(timeout_s=0.05)
    gate.open()


def test_a_full_pipeline_stays_usable(rig: Rig) -> None:
    gate = rig.program.hold(0)
    handles = [rig.admit({0: 10}), *(rig.submit() for _ in range(RING_SLOTS - 1))]
    for _ in range(3):
        with pytest.raises(PipelineFull):
            rig.admit({1: 50})
    gate.open()
    for step, handle in enumerate(handles):
        assert tokens_of(handle.result()) == {0: 11 + step}
    assert tokens_of(rig.admit({1: 50}).result()) == {0: 19, 1: 51}


@pytest.mark.parametrize("fails_in", ["pack", "apply", "step"])
def test_an_exception_before_anything_was_enqueued_leaves_the_pipeline_usable(rig: Rig, fails_in: str) -> None:
    rig.admit({0: 10}).result()
    plan = admission_plan(rig.limits, {1: 20})
    if fails_in == "pack":
        plan = StepPlan("plain", _Unpackable())
    for _ in range(2 * RING_SLOTS):
        with pytest.raises(_RefusalError):
            rig.pipeline.submit(plan, _Refusing(rig, fails_in))
    handle = rig.admit({1: 20})
    assert handle.step == 1
    assert tokens_of(handle.result()) == {0: 12, 1: 21}


@pytest.mark.parametrize("fails_in", ["apply", "step"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_halfway_through_submit_closes_the_pipeline(
    rig: Rig, fails_in: str, error: type[BaseException]
) -> None:
    earlier = rig.admit({0: 10})
    with pytest.raises(error):
        rig.pipeline.submit(admission_plan(rig.limits, {1: 20}), _BreakingHalfway(rig, fails_in, error))
    for _ in range(2):
        with pytest.raises(DeviceError, match="takes no more steps") as raised:
            rig.submit()
        assert isinstance(raised.value.__cause__, error)
    assert tokens_of(earlier.result()) == {0: 11}


def test_a_closed_pipeline_takes_no_steps_and_can_be_closed_again(hasty: Rig) -> None:
    hasty.admit({0: 10}).result(PATIENCE_S)
    hasty.pipeline.close()
    freed = list(hasty.runtime.freed)
    hasty.pipeline.close()
    assert hasty.runtime.freed == freed
    assert hasty.pipeline.drained
    with pytest.raises(DeviceError, match="closed"):
        hasty.submit()


def test_a_pipeline_with_a_failed_step_can_be_closed(rig: Rig) -> None:
    rig.program.mischief.failures = {0: ValueError("no such token")}
    rig.admit({0: 10})
    rig.pipeline.close()
    assert rig.runtime.freed.count("stream") == 2


def test_streams_that_do_not_drain_are_an_error(hasty: Rig) -> None:
    gate = hasty.program.hold(0)
    hasty.admit({0: 10})
    with pytest.raises(StepTimeout, match="did not drain"):
        hasty.pipeline.synchronize()
    gate.open()
    assert not hasty.pipeline.drained


# -- shapes


@pytest.mark.parametrize(
    ("bound", "chunks", "expected"),
    [
        (0, (0, 0), GraphKey("idle", 0, 0, "plain")),
        (1, (0, 0), GraphKey("decode", 1, 1, "plain")),
        (3, (0, 0), GraphKey("decode", 4, 4, "plain")),
        (5, (0, 0), GraphKey("decode", 6, 6, "plain")),  # off the ladder: all slots
        (1, (1, 16), GraphKey("prefill", 16, 1, "plain")),
        (2, (2, 16), GraphKey("mixed", 16, 2, "plain")),  # chunks alone, but more than the smallest size
        (2, (1, 16), GraphKey("mixed", 32, 2, "plain")),
        (3, (2, 2), GraphKey("decode", 4, 4, "plain")),  # chunks of one token are rows like any other
        (3, (1, 15), GraphKey("mixed", 32, 4, "plain")),  # 15 rows of the chunk, and 2 that decode
        (6, (2, 40), GraphKey("mixed", 44, 6, "plain")),  # off the ladder: as many rows as needed
    ],
)
def test_a_step_is_shaped_by_its_bound_and_its_chunks(bound: int, chunks: tuple[int, int], expected: GraphKey) -> None:
    rig = Rig(max_slots=6)
    sizes = BucketTable((1, 2, 4))
    rig.pipeline.ladders = Ladders(slots=sizes, rows=BucketTable((16, 32)), chunk_slots=sizes)
    assert rig.pipeline.shape(StepPlan("plain", _Chunks(*chunks)), bound) == expected
    rig.close()


def test_a_variant_of_chunks_alone_never_asks_for_a_captured_decode_step(rig: Rig) -> None:
    """A chunk of one token is a row like any other, but no graph serves it in such a variant."""
    rig.program.variants, rig.program.chunk_variants = ("plain",), ("doubled",)
    assert rig.pipeline.shape(StepPlan("plain", _Chunks(1, 1)), 1).phase == "decode"
    assert rig.pipeline.shape(StepPlan("doubled", _Chunks(1, 1)), 1).phase == "prefill"
    with pytest.raises(ConfigError, match="no variant 'doubled'"):
        rig.submit(StepPlan("doubled"))
    rig.close()


# -- traffic


def test_steps_are_counted_by_what_they_were_launched_for_and_only_if_they_were(rig: Rig) -> None:
    rig.submit()  # idle
    rig.admit({0: 10, 2: 30}).result()  # two chunks of two tokens
    with pytest.raises(_RefusalError):
        rig.pipeline.submit(admission_plan(rig.limits, {1: 20}), _Refusing(rig))
    for _ in range(2):
        rig.submit().result()
    # The first one was launched for the slot, too, whose admission was refused.
    assert rig.pipeline.traffic.traffic() == Traffic({3: 1, 2: 1}, {(16, 4): 1})


class _RefusalError(Exception):
    pass


@dataclass
class _Refusing:
    """A launcher that refuses while it chooses, when nothing has been enqueued."""

    rig: Rig
    fails_in: str = "step"

    def apply(self, staging_slot: int) -> object:
        if self.fails_in == "apply":
            raise _RefusalError
        return self.rig.launcher.apply(staging_slot)

    def step(self, key: GraphKey, plan: StepPlan) -> object:
        raise _RefusalError


@dataclass
class _BreakingHalfway:
    """A launcher whose work fails while it is being enqueued."""

    rig: Rig
    fails_in: str
    error: type[BaseException]

    def apply(self, staging_slot: int) -> object:
        return self._fail if self.fails_in == "apply" else self.rig.launcher.apply(staging_slot)

    def step(self, key: GraphKey, plan: StepPlan) -> object:
        return self._fail if self.fails_in == "step" else self.rig.launcher.step(key, plan)

    def _fail(self) -> None:
        raise self.error


@dataclass(frozen=True)
class _Chunks(Delta):
    """Says that it has so many chunks, of so many rows together."""

    slots: int
    rows: int
    armed: Sequence[int] = ()

    @property
    def chunk_slots(self) -> int:
        return self.slots

    @property
    def chunk_rows(self) -> int:
        return self.rows

    def pack(self, words: object, step: int) -> None:
        raise _RefusalError


class _Unpackable(Delta):
    armed = (1,)

    def pack(self, words: object, step: int) -> None:
        raise _RefusalError


def _generation(name: str) -> Generation:
    return Generation(Request(name, (1, 2, 3), SamplingParams(), stop_ids=(), seed=0, max_len=40))
