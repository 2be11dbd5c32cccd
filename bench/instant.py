"""An engine whose device takes no time: what is left is what the host costs."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from graphexec import EngineConfig, ExecutionBackend, StepHandle, StepPlan, StepProgram, StepResult
from graphexec.backends import BackendStats, Progress
from graphexec.capture.buckets import BucketTable, default_ladder
from graphexec.capture.manifest import Manifest
from graphexec.controller import Controller
from graphexec.engine import Engine
from graphexec.engine.assemble import Assembly
from graphexec.engine.resolve import ResolvedConfig
from graphexec.kernels.delta_layout import ADMIT, ARM, HEADER_WORDS, RELEASE, word_of
from graphexec.plan import FinishCode, Int32Array
from graphexec.rings import RING_SLOTS
from graphexec.slots import SlotLimits

__all__ = ["InstantBackend", "instant_engine"]


class _InstantHandle(StepHandle):
    def __init__(self, result: StepResult, controller: Controller) -> None:
        self.step = result.step
        self._result = result
        self._controller = controller

    def done(self) -> bool:
        return True

    def result(self, timeout_s: float | None = None) -> StepResult:
        self._controller.observe(self._result)
        return self._result


class InstantBackend(ExecutionBackend):
    """Packs deltas and predicts buckets as the real backends do; an armed slot yields token 1 until its length ends it.

    A prompt is taken as computed in the step of its admission.
    """

    def __init__(self, limits: SlotLimits) -> None:
        self._limits = limits
        self._controller = Controller(limits.max_slots, BucketTable(default_ladder(limits.max_slots)))
        self._staging = np.zeros((RING_SLOTS, limits.staging_words), dtype=np.int32)
        self._runs = np.zeros(limits.max_slots, dtype=bool)
        self._left = np.zeros(limits.max_slots, dtype=np.int64)
        self._tokens = np.ones((limits.max_slots, 1), dtype=np.int32)
        self._step = 0
        self._device_s = 0.0

    def prepare(self, program: StepProgram) -> None:
        pass

    def warmup(self, progress: Progress | None = None) -> Manifest:
        return Manifest.of(torch.device("cpu"), [], {})

    def submit(self, plan: StepPlan) -> StepHandle:
        step = self._step
        if plan.delta is not None:
            words = self._staging[step % RING_SLOTS]
            plan.delta.pack(words, step)
            self._controller.arm(step, plan.delta.armed)
        bound = self._controller.next_bound()
        if bound:
            self._controller.bucket_for(bound)
        started = time.perf_counter()
        result = self._run(plan.delta is not None)
        self._device_s += time.perf_counter() - started
        return _InstantHandle(result, self._controller)

    def _run(self, has_delta: bool) -> StepResult:
        """What the device does, which takes the host no time: see `wait_us`."""
        step = self._step
        self._step += 1
        if has_delta:
            self._apply(self._staging[step % RING_SLOTS])
        counts = np.where(self._runs, np.int32(1), np.int32(-1))
        real = int(np.count_nonzero(self._runs))
        self._left -= self._runs
        ends = self._runs & (self._left <= 0)
        self._runs &= ~ends
        finish = np.where(ends, np.int32(FinishCode.LENGTH), np.int32(FinishCode.RUNNING))
        return StepResult(step, real, real > 0, counts, finish, self._tokens, None)

    def _apply(self, words: Int32Array) -> None:
        entries = words[HEADER_WORDS : HEADER_WORDS + words[0] * self._limits.entry_words]
        entries = entries.reshape(-1, self._limits.entry_words)
        flags, slots = entries[:, word_of("flags")], entries[:, word_of("slot")]
        admitted = flags & ADMIT != 0
        lengths = entries[admitted, word_of("max_len")] - entries[admitted, word_of("num_tokens")]
        self._left[slots[admitted]] = lengths
        self._runs[slots[flags & (ADMIT | ARM) != 0]] = True
        self._runs[slots[flags & RELEASE != 0]] = False

    @property
    def wait_us(self) -> float:
        return self._device_s * 1e6

    def stats(self) -> BackendStats:
        return BackendStats(self._controller.stats(), self._step, {"decode": "off", "prefill": "off"})

    def enqueue(self, work: Callable[[], None]) -> None:
        work()

    def close(self) -> None:
        pass


def instant_engine(
    max_num_seqs: int,
    max_model_len: int = 1 << 20,
    depth: int = 1,
    prefix_caching: bool = False,
    num_blocks: int = 1 << 22,
) -> Engine:
    """An engine with `max_num_seqs` slots on an instant device."""
    limits = SlotLimits(max_num_seqs, max_model_len, 4096 + max_num_seqs, 16, 16)
    resolved = ResolvedConfig(torch.device("cpu"), torch.float32, max_model_len, 4096, "off", None, {})
    backend = InstantBackend(limits)
    parts = Assembly(
        resolved=resolved,
        backend=backend,
        program=None,  # type: ignore[arg-type]  # nothing asks an instant device for its program
        manifest=backend.warmup(),
        limits=limits,
        num_blocks=num_blocks,
        vocab_size=32000,
        eos_token_ids=(),
        tokenizer=None,
    )
    config = EngineConfig(max_num_seqs=max_num_seqs, prefix_caching=prefix_caching, overlap_depth=depth)
    return Engine(config, parts=parts)
