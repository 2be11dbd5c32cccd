"""The frozen data that travels between a host engine and a backend: plans go in, results come out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = [
    "Delta",
    "DeviceIO",
    "FinishCode",
    "FloatArray",
    "GraphKey",
    "Int32Array",
    "Phase",
    "RecordLayout",
    "StepHandle",
    "StepPlan",
    "StepProgram",
    "StepResult",
]

Int32Array = NDArray[np.int32]
FloatArray = NDArray[np.float32] | NDArray[np.float64]
Phase = Literal["idle", "decode", "prefill", "mixed"]


class FinishCode(IntEnum):
    """Why a slot does not run on; a code of its own beside the token, never a special token value."""

    RUNNING = 0
    STOP = 1
    LENGTH = 2
    NAN = 3
    PARKED = 4
    """Not an end: the slot waits for a KV block and resumes when a delta supplies it."""


@dataclass(frozen=True, slots=True)
class GraphKey:
    """Names one captured step. It holds every host number that the step may read.

    Attributes:
        phase: "decode" (every slot computes `rows / bucket` tokens), "prefill" (every slot computes a prompt chunk),
            "mixed" (some do) or "idle".
        rows: launched rows (tokens), padding included.
        bucket: launched slots, padding included.
        variant: one of the program's `variants`, e.g. the sampler's.
    """

    phase: Phase
    rows: int
    bucket: int
    variant: str

    @property
    def has_chunks(self) -> bool:
        """Whether slots may compute more than their share of tokens."""
        return self.phase in ("prefill", "mixed")

    def __str__(self) -> str:
        return f"{self.phase} step, bucket {self.bucket}, {self.rows} rows, {self.variant}"


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """The layout, in int32 words, of the output record of one step.

    `[header | num_tokens [S] | finish [S] | tokens [S, K] | extra]`, with S slots and K tokens a slot.

    Header words: step number (uint32), real_bsz, any_running, overflow, any NaN, step of the last delta, 0, 0.
    `num_tokens` is -1 for a slot that did not run, 0 for one that ran and yields nothing (an unfinished prompt).
    """

    max_slots: int
    tokens_per_slot: int = 1
    extra_words: int = 0

    HEADER = 8

    @property
    def base_words(self) -> int:
        return self.HEADER + self.max_slots * (2 + self.tokens_per_slot)

    @property
    def words(self) -> int:
        return self.base_words + self.extra_words


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step reported, copied out of its ring slot.

    Attributes:
        step: number of the step.
        real_bsz: slots that really ran.
        any_running: whether some slot runs on or is parked.
        num_tokens: `[S]` int32, -1 for a slot that did not run.
        finish: `[S]` int32, a FinishCode each.
        tokens: `[S, K]` int32; the first `num_tokens[slot]` entries of a row are valid.
        extra: the program's own words, or None when its variant has none.
    """

    step: int
    real_bsz: int
    any_running: bool
    num_tokens: Int32Array
    finish: Int32Array
    tokens: Int32Array
    extra: Int32Array | None


class Delta(ABC):
    """Host-to-device changes of one step; at most one for a slot, since two would race in the apply kernel (F8).

    The words of an earlier delta may still stand in what `pack` is given. All zeros must be a delta that changes
    nothing: warm-up applies it.
    """

    @property
    @abstractmethod
    def armed(self) -> Sequence[int]:
        """Slots that may run because of it: admitted, re-armed, resumed or supplied with blocks."""

    @property
    def chunk_slots(self) -> int:
        """Slots that compute a prompt chunk in its step; 0 where the program takes no chunks."""
        return 0

    @property
    def chunk_rows(self) -> int:
        """Rows of those chunks together."""
        return 0

    @abstractmethod
    def pack(self, words: Int32Array, step: int) -> None:
        """Writes itself into `words`, the program's `staging_words` int32s, with the number of the step.

        `apply` keeps that number on the device, and the record of every later step repeats it in its header.
        """


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the next step should do.

    Attributes:
        variant: one of the program's `variants`, or of its `chunk_variants` where there are chunks.
        delta: changes to apply before the step, or None.
    """

    variant: str
    delta: Delta | None = None

    @property
    def chunk_slots(self) -> int:
        """Slots that compute a prompt chunk in this step (0 for a decode step)."""
        return 0 if self.delta is None else self.delta.chunk_slots

    @property
    def chunk_rows(self) -> int:
        """Rows of those chunks together."""
        return 0 if self.delta is None else self.delta.chunk_rows


class StepHandle(ABC):
    """A submitted step.

    Attributes:
        step: its number; a backend counts its steps from 0.
    """

    step: int

    @abstractmethod
    def done(self) -> bool:
        """Whether `result` has something to say at once: its record has reached the host, or failed to. Never blocks.

        Raises:
            DeviceError: the device failed.
        """

    @abstractmethod
    def result(self, timeout_s: float | None = None) -> StepResult:
        """Waits until the record of the step has reached the host, and copies it out; later calls return it again.

        Args:
            timeout_s: seconds to wait; None for the backend's limit.

        Raises:
            StepTimeout: the time is up. The step may still finish; the call can be repeated.
            BucketOverflowError: the step had more slots than it was launched for, and ran none.
            DeviceError: the device failed, or the record is not the one of this step.
        """


@dataclass(frozen=True, slots=True)
class DeviceIO:
    """Device buffers through which a step reports.

    Attributes:
        ring: `[R, words]` int32; a step writes its record into row `counter % R`.
        counter: `[1]` int32, the number of the running step; the step adds one when it has written its record.
    """

    ring: torch.Tensor
    counter: torch.Tensor


class StepProgram(ABC):
    """One step of a batched state machine over fixed device buffers: what a host engine hands to a backend.

    Every method enqueues device work on the current stream and returns; none may read the device. `step` may read no
    host number that can change other than those in its key, since a captured step repeats them for ever.
    """

    max_slots: int
    """S, number of slots."""
    variants: tuple[str, ...]
    """Variants of the step, cheapest first."""
    common_variants: tuple[str, ...] | None = None
    """Those whose graphs should be there before the first step; None for all. The others are captured on first use."""
    mixed_variants: Mapping[str, str] = MappingProxyType({})
    """In a step with prompt chunks, the variant that serves another: graphs are saved where the rows cost anyway."""
    chunk_variants: tuple[str, ...] = ()
    """Further variants, of steps with prompt chunks alone; they always run eagerly."""
    extra_words: Mapping[str, int] = MappingProxyType({})
    """How many of the record's extra words a variant fills, from their first; the others are not copied."""
    record: RecordLayout
    staging_words: int
    """Size of a packed delta, int32 words."""
    max_rows: int
    """Largest number of rows of a step. `max_slots * rows_per_slot` for a program that takes no prompt chunks."""
    rows_per_slot: int = 1
    """Rows that a decoding slot computes in a step."""
    host: object = None
    """What eager breaks find as `running_step().host`, e.g. the planner of an attention library."""

    @abstractmethod
    def bind(self, io: DeviceIO) -> None:
        """Receives the buffers through which steps report: before anything else, and again from another backend."""

    @abstractmethod
    def apply(self, staging: torch.Tensor) -> None:
        """Applies a packed delta, `[staging_words]` int32.

        On CUDA a tensor of the device over pinned memory of the host: each word that is read crosses the bus, so a word
        should be read once, and only where the delta uses it.
        """

    @abstractmethod
    def step(self, key: GraphKey) -> None:
        """Runs one step of this shape: reads the slots, writes them and the record, counts up.

        In the phase "idle" nothing runs (rows and bucket are 0); the record is written all the same.
        """

    def before_launch(self, key: GraphKey, plan: StepPlan) -> None:  # noqa: B027  # most programs have nothing to plan
        """Does the host's part of a step: before every launch, and behind the application of the plan's delta.

        Like `step` it enqueues device work on the current stream, in the order of steps, e.g. a copy into buffers that
        a whole graph reads. On CUDA it is called in the thread that submits, on the CPU in the stream's when its turn
        comes, so what it reads on the host should belong to the plan. In a warm-up it follows `exercise`, with a plan
        that has no delta; for a graph that is captured in the midst of serving it is called once more. Idle steps (no
        rows) have it, too. After an error the pipeline is broken: the delta is on the device, and its step is not.
        """

    @abstractmethod
    def state(self) -> Sequence[torch.Tensor]:
        """Every device tensor that steps change and that must be restored after a warm-up."""

    @abstractmethod
    def exercise(self, key: GraphKey, generator: torch.Generator) -> None:
        """Sets exactly `key.bucket` slots running, on random valid inputs for such a step; `generator` is a CPU one."""

    def spoil(self, key: GraphKey) -> None:  # noqa: B027  # a program without such memory has nothing to do
        """Overwrites what the last step wrote beside its state, its record and `observed`, e.g. into a KV cache.

        Called between an eager step and the replay that is compared with it: a graph that does not write there must
        come to another result.
        """

    def observed(self, key: GraphKey) -> Sequence[torch.Tensor]:
        """Device tensors, beside the state and the record, in which an eager step and its graph must agree."""
        return ()
