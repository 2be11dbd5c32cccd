"""An engine whose device takes no time: what is left is what the host costs."""

from __future__ import annotations

import numpy as np
import torch

from graphexec import BackendConfig, EngineConfig, ExecutionBackend, StepHandle, StepPlan, StepProgram, StepResult
from graphexec.backends import BackendStats, Progress
from graphexec.capture.buckets import BucketTable, default_ladder
from graphexec.capture.manifest import Manifest
from graphexec.controller import Controller
from graphexec.engine import Engine
from graphexec.engine.assemble import Assembly
from graphexec.engine.resolve import ResolvedConfig
from graphexec.kernels.apply import ADMIT, ARM, ENTRY_FIELDS, HEADER_WORDS, RELEASE
from graphexec.rings import RING_SLOTS
from graphexec.slots import SlotLimits

__all__ = ["InstantBackend", "instant_engine"]


class _InstantHandle(StepHandle):
    def __init__(self, result: StepResult, controller: Controller) -> None:
        self.step = result.step
        self._result = result
        self._controller = controller

    def result(self, timeout_s: float | None = None) -> StepResult:
        self._controller.observe(self._result)
        return self._result


class InstantBackend(ExecutionBackend):
    """Packs deltas and predicts buckets as the real backends do; every armed slot then yields token 1 for ever."""

    def __init__(self, limits: SlotLimits) -> None:
        self._limits = limits
        self._controller = Controller(limits.max_slots, BucketTable(default_ladder(limits.max_slots)))
        self._staging = np.zeros((RING_SLOTS, limits.staging_words), dtype=np.int32)
        self._runs = np.zeros(limits.max_slots, dtype=bool)
        self._finish = np.zeros(limits.max_slots, dtype=np.int32)
        self._tokens = np.ones((limits.max_slots, 1), dtype=np.int32)
        self._step = 0

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
            entries = words[HEADER_WORDS : HEADER_WORDS + words[0] * self._limits.entry_words]
            entries = entries.reshape(-1, ENTRY_FIELDS + self._limits.max_stop_ids)
            self._runs[entries[entries[:, 1] & (ADMIT | ARM) != 0, 0]] = True
            self._runs[entries[entries[:, 1] & RELEASE != 0, 0]] = False
        if self._controller.next_bound():
            self._controller.next_bucket()
        self._step += 1
        counts = np.where(self._runs, np.int32(1), np.int32(-1))
        real = int(np.count_nonzero(self._runs))
        result = StepResult(step, real, real > 0, counts, self._finish, self._tokens, None)
        return _InstantHandle(result, self._controller)

    @property
    def wait_us(self) -> float:
        return 0.0

    def stats(self) -> BackendStats:
        return BackendStats(self._controller.stats(), self._step)

    def close(self) -> None:
        pass


def instant_engine(max_num_seqs: int, max_model_len: int = 1 << 20, depth: int = 1) -> Engine:
    """An engine with `max_num_seqs` slots on an instant device; its requests never end by themselves."""
    limits = SlotLimits(max_num_seqs, max_model_len, 4096 + max_num_seqs, 16, 16)
    resolved = ResolvedConfig(torch.device("cpu"), torch.float32, max_model_len, 4096, "off", None, {})
    backend = InstantBackend(limits)
    parts = Assembly(
        resolved=resolved,
        backend=backend,
        program=None,  # type: ignore[arg-type]  # nothing asks an instant device for its program
        manifest=backend.warmup(),
        limits=limits,
        num_blocks=1 << 22,
        vocab_size=32000,
        eos_token_ids=(),
        tokenizer=None,
    )
    config = EngineConfig(max_num_seqs=max_num_seqs, prefix_caching=False, backend=BackendConfig(overlap_depth=depth))
    return Engine(config, parts=parts)
