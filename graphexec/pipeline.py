"""The pipeline: the two streams, the order of work on them, and every fence between host, compute and copy."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Protocol

from graphexec.capture.buckets import Ladders
from graphexec.capture.traffic import TrafficCounter
from graphexec.controller import Controller
from graphexec.errors import BucketOverflowError, ConfigError, DeviceError, GraphexecError, StepTimeout
from graphexec.lifetime import DeviceSide
from graphexec.plan import (
    Delta,
    GraphKey,
    Int32Array,
    RecordLayout,
    StepHandle,
    StepPlan,
    StepProgram,
    StepResult,
)
from graphexec.runtime import Runtime

__all__ = ["Launcher", "Pipeline", "PipelineHandle"]

_STEP_MASK = 0xFFFFFFFF


class Launcher(Protocol):
    """How a backend puts work on the compute stream. What can fail for the host's reasons fails while choosing."""

    def apply(self, staging_slot: int) -> Callable[[], None]:
        """The call that enqueues the application of the delta in a staging slot."""

    def step(self, key: GraphKey, plan: StepPlan) -> Callable[[], None]:
        """The call that enqueues the step of this shape; `plan` is for its eager breaks."""


class PipelineHandle(StepHandle):
    """A step on its way through the pipeline."""

    def __init__(self, pipeline: Pipeline, step: int, key: GraphKey, bound: int, last_delta: int | None) -> None:
        self.step = step
        self.key = key
        self.bound = bound
        self.last_delta = last_delta
        self._pipeline = pipeline
        self._result: StepResult | BucketOverflowError | DeviceError | None = None

    def done(self) -> bool:
        return self._result is not None or self._pipeline.arrived(self)

    def result(self, timeout_s: float | None = None) -> StepResult:
        if self._result is None:
            try:
                self._result = self._pipeline.collect(self, timeout_s)
            except (BucketOverflowError, DeviceError) as failure:  # the ring slot has retired: there is no second read
                self._result = failure
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


class Pipeline:
    """Submits steps ahead of the device and collects their records behind it.

    Depth 1, the default, looks like this (overlap is only a depth: the caller collects step N-depth after it has
    submitted step N):

        host     submit N+1 | collect N (waits for copied[N]) | schedule | submit N+2 | collect N+1 ...
        compute  -- step N ---------------||-- step N+1 ---------------||-- step N+2 ...   queued ahead: no bubble
        copy                 waits done[N] -> copy to host -> copied[N]

    Fences: F1 to F3 in OutputRing, F4 in StagingRing. F8 is the caller's: one delta for a slot in a batch. F7 is that
    of DeviceSide, which also holds when a pipeline is dropped without `close`, or the interpreter ends.
    """

    def __init__(self, runtime: Runtime, program: StepProgram, ladders: Ladders, timeout_s: float) -> None:
        with runtime.activated():
            self.runtime = runtime
            self.device_side = DeviceSide(runtime, program)
            self.compute, self._copy = self.device_side.compute, self.device_side.copy
            self.records, self.staging = self.device_side.records, self.device_side.staging
            self.io = self.device_side.io
            self.controller = Controller(program.max_slots, ladders.slots)
            self.traffic = TrafficCounter(program.max_slots, program.max_rows)
            self.wait_s = 0.0
            self._program = program
            self._plans_on_host = type(program).before_launch is not StepProgram.before_launch
            self.ladders = ladders
            self._timeout_s = timeout_s
            self._next_step = 0
            self._last_delta: int | None = None  # what the device holds until our first one is somebody else's
            self._failure: BaseException | None = None
            self._stuck = self._closed = False
            self._dropped = weakref.finalize(self, self.device_side.release)
            program.bind(self.io)
            runtime.settle()

    def shape(self, plan: StepPlan, bound: int) -> GraphKey:
        """The shape that holds at most `bound` running slots and the chunks of `plan`."""
        if bound == 0:
            return GraphKey("idle", 0, 0, plan.variant)
        program, ladders = self._program, self.ladders
        per_slot = program.rows_per_slot
        chunk_rows, chunk_slots = plan.chunk_rows, plan.chunk_slots
        # Chunks of one token (the end of a prompt, or all of it) are rows like any other.
        short_chunks = per_slot == 1 and chunk_rows == chunk_slots
        if chunk_rows == 0 or (short_chunks and plan.variant in program.variants):
            bucket = self.controller.bucket_for(bound)
            return GraphKey("decode", bucket * per_slot, bucket, plan.variant)
        rows = self._rows(plan, bound)
        shape = ladders.chunk_shape(bound, rows, chunk_slots) or ("mixed", rows, min(program.max_slots, rows))
        return GraphKey(*shape, program.mixed_variants.get(plan.variant, plan.variant))

    def _rows(self, plan: StepPlan, bound: int) -> int:
        """Rows of a step with prompt chunks, before they are padded."""
        return plan.chunk_rows + max(bound - plan.chunk_slots, 0) * self._program.rows_per_slot

    def _count(self, plan: StepPlan, bound: int, key: GraphKey) -> None:
        # By the bound, not by the slots that will have run: a graph is chosen by what the host can know.
        if key.has_chunks and plan.variant not in self._program.chunk_variants:
            self.traffic.count_chunks(bound, self._rows(plan, bound), key.rows)
        elif key.phase == "decode":
            self.traffic.count_decode(bound, bound * self._program.rows_per_slot, key.rows)

    def submit(self, plan: StepPlan, launcher: Launcher) -> PipelineHandle:
        """Enqueues one step and returns at once.

        Raises:
            PipelineFull: a ring has no retired slot; collect a step first.
            ConfigError: the program has no such variant.
            DeviceError: an earlier submit failed halfway, so that host and device no longer agree on the step.
        """
        with self.runtime.activated():
            self._raise_if_broken()
            self._check_variant(plan)
            step = self._next_step
            self.records.acquire(step)
            try:
                apply = self._stage(plan.delta, step, launcher)
                bound = self.controller.next_bound()
                key = self.shape(plan, bound)
                launch = launcher.step(key, plan)
            except BaseException:
                self.records.release(step)
                raise
            try:
                if apply is not None:
                    apply()
                if self._plans_on_host:
                    self.compute.run(partial(self._program.before_launch, key, plan))
                launch()
                self.records.copy_out(step, self.compute, self._copy, self._record_words(key))
            except BaseException as failure:
                self._failure = failure
                raise
            self._next_step = step + 1
            self._count(plan, bound, key)
            return PipelineHandle(self, step, key, bound, self._last_delta)

    def enqueue(self, work: Callable[[], None]) -> None:
        """What `ExecutionBackend.enqueue` does."""
        with self.runtime.activated():
            self._raise_if_broken()
            self.compute.run(work)

    def _check_variant(self, plan: StepPlan) -> None:
        program = self._program
        if plan.variant not in program.variants and not (plan.chunk_rows and plan.variant in program.chunk_variants):
            known = ", ".join((*program.variants, *(program.chunk_variants if plan.chunk_rows else ())))
            raise ConfigError(f"The program has no variant {plan.variant!r}. Known: {known}.")

    def _stage(self, delta: Delta | None, step: int, launcher: Launcher) -> Callable[[], None] | None:
        if delta is None:
            return None
        slot, words = self.staging.acquire()
        delta.pack(words, step)
        self.controller.arm(step, delta.armed)
        apply = launcher.apply(slot)

        def enqueue() -> None:
            apply()
            self.staging.retire_behind(slot, self.compute)  # F4: the host refills the slot after the device read it
            self._last_delta = step

        return enqueue

    def arrived(self, handle: PipelineHandle) -> bool:
        """What `PipelineHandle.done` says of a step that was not collected."""
        self._raise_if_closed()
        return self.records.arrived(handle.step)

    def collect(self, handle: PipelineHandle, timeout_s: float | None) -> StepResult:
        """What `PipelineHandle.result` does. Needs no device to be current: it asks handles and reads host memory."""
        self._raise_if_closed()
        limit = self._timeout_s if timeout_s is None else timeout_s
        started = time.perf_counter()
        landed = self.records.wait(handle.step, limit)
        self.wait_s += time.perf_counter() - started
        self.compute.check()
        self._copy.check()
        if not landed:
            self._raise_timeout(handle, limit)
        words = self.records.read(handle.step, self._record_words(handle.key))
        self._check(words, handle)
        result = _unpack(words, self.records.layout, handle.step)
        self.controller.observe(result)
        self.controller.count(handle.bound, handle.key.bucket, result.real_bsz)
        return result

    def close(self) -> None:
        """Drains both streams, then frees what the device used; what does not drain is never freed (F7)."""
        if self._closed:
            return
        self._closed = True
        self._failure = self._failure or GraphexecError("The pipeline is closed.")
        self._dropped.detach()
        patience = 0.1 if self._stuck else self._timeout_s  # who has waited once in vain does not wait again
        self._stuck = not self.device_side.close(patience)

    @property
    def drained(self) -> bool:
        """Whether what the device used may be freed."""
        return not self._stuck

    def synchronize(self) -> None:
        """Waits for everything enqueued. For warm-up and for closing, never for a step.

        Raises:
            StepTimeout: a stream does not drain.
        """
        if not (self.compute.drain(self._timeout_s) and self._copy.drain(self._timeout_s)):
            self._stuck = True
            raise StepTimeout(f"The streams did not drain within {self._timeout_s} s.")
        self.compute.check()
        self._copy.check()

    def _record_words(self, key: GraphKey) -> int:
        return self.records.layout.base_words + self._program.extra_words.get(key.variant, 0)

    def _raise_if_broken(self) -> None:
        if self._failure is not None:
            raise DeviceError(
                f"The pipeline takes no more steps: {self._failure} Create a new backend."
            ) from self._failure

    def _raise_if_closed(self) -> None:
        if self._closed:  # its events are gone, and so is what the record would be read from
            raise DeviceError("The pipeline was closed before this step was collected.")

    def _check(self, words: Int32Array, handle: PipelineHandle) -> None:
        step, _, _, overflow, _, last_delta = words[:6].tolist()
        wrong_step = (step - handle.step) & _STEP_MASK
        if wrong_step or (handle.last_delta is not None and (last_delta - handle.last_delta) & _STEP_MASK):
            self._failure = DeviceError(
                f"The record of step {handle.step} carries step {step & _STEP_MASK} and delta {last_delta} "
                f"(expected delta {handle.last_delta}): host and device disagree. "
                "Does the step add one to the counter, and does apply() keep the step number that pack() was given?"
            )
            raise self._failure
        if overflow:
            raise BucketOverflowError(
                f"Step {handle.step} had more rows or slots than its {handle.key} holds, and ran none of them. "
                "A change reached the device that its plan did not announce as armed."
            )

    def _raise_timeout(self, handle: PipelineHandle, limit: float) -> None:
        self._stuck = self._stuck or limit >= self._timeout_s  # a shorter limit was the caller's, and says nothing
        done, copied = self.records.fences(handle.step)
        passed = "copied (F2)" if copied else "done (F1)" if done else "none; the step itself is still running"
        raise StepTimeout(
            f"Step {handle.step} ({handle.key}) did not arrive within {limit} s. Last fence passed: {passed}. "
            "Nothing it uses will be freed before it has."
        )


def _unpack(words: Int32Array, layout: RecordLayout, step: int) -> StepResult:
    slots, begin = layout.max_slots, layout.HEADER
    return StepResult(
        step=step,
        real_bsz=int(words[1]),
        any_running=bool(words[2]),
        num_tokens=words[begin : begin + slots],
        finish=words[begin + slots : begin + 2 * slots],
        tokens=words[begin + 2 * slots : layout.base_words].reshape(slots, layout.tokens_per_slot),
        extra=words[layout.base_words :] if len(words) > layout.base_words else None,
    )
