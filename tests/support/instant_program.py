"""A step program without a model, and a CPU runtime that shows what backends do to it.

A slot counts: its next token is its last one plus one. The slots, their deltas and their records are the real ones;
what a test steers is when a step ends, and what goes wrong in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from graphexec.backends.stepping import EagerLauncher, open_pipeline
from graphexec.config import BackendConfig
from graphexec.deltas import Admission, SlotDeltas, as_words
from graphexec.kernels.prepare import prepare
from graphexec.kernels.update import update
from graphexec.pipeline import Pipeline, PipelineHandle
from graphexec.plan import Delta, DeviceIO, GraphKey, Int32Array, RecordLayout, StepPlan, StepProgram, StepResult
from graphexec.runtime import CpuRuntime, Stream
from graphexec.runtime.base import Pool
from graphexec.runtime.breaks import Cuts, RunningStep, cutting
from graphexec.runtime.cpu import CpuEvent, CpuGraph, CpuStream
from graphexec.slots import SlotLimits, SlotState

VOCABULARY = 1000
STOP_TOKEN = 999
PATIENCE_S = 10.0
"""Longest that a test waits for what must happen."""


class Gate:
    """Blocks the worker that comes by until it is opened; `reached` says that one has come."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        if not self._open.wait(PATIENCE_S):
            raise RuntimeError("Nobody opened the gate.")

    def open(self) -> None:
        self._open.set()


@dataclass
class HostNumber:
    """A number that a step reads on the host: what a captured step must not do."""

    value: int = 0


class WatchedRuntime(CpuRuntime):
    """The CPU runtime, with a capture that calls the work as CUDA's does, and a log of what is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.streams: dict[str, CpuStream] = {}
        self.freed: list[str] = []
        self.frozen: list[HostNumber] = []
        self.replaying = False
        self._capturing_thread: int | None = None

    @property
    def capturing(self) -> bool:
        """Whether the calling thread is in a capture."""
        return self._capturing_thread == threading.get_ident()

    def stream(self, name: str) -> CpuStream:
        self.streams[name] = super().stream(name)
        return self.streams[name]

    def event(self) -> CpuEvent:
        return _WatchedEvent(self.freed)

    def capture(self, work: Callable[[], None], stream: Stream, pool: Pool, cuts: Cuts = Cuts.NONE) -> CpuGraph:
        self._capturing_thread = threading.get_ident()
        try:
            with cutting(lambda call: None, cuts):
                work()
        finally:
            self._capturing_thread = None
        graph = super().capture(work, stream, pool, cuts)
        return _WatchedGraph(graph, [(number, number.value) for number in self.frozen], self)

    def close_stream(self, stream: Stream) -> None:
        self.freed.append("stream")
        super().close_stream(stream)


class InlineRuntime(WatchedRuntime):
    """Calls on the compute stream run in the host's thread and raise there, as the launching part does on CUDA."""

    def stream(self, name: str) -> CpuStream:
        if name != "compute":
            return super().stream(name)
        self.streams[name] = _InlineStream(name, self)
        return self.streams[name]


class _InlineStream(CpuStream):
    def run(self, work: Callable[[], None]) -> None:
        self.check()
        assert self.drain(PATIENCE_S)
        work()


class _WatchedEvent(CpuEvent):
    def __init__(self, freed: list[str]) -> None:
        super().__init__()
        self._freed = freed

    def close(self) -> None:
        self._freed.append("event")


class _WatchedGraph(CpuGraph):
    """A graph of the CPU runtime that replays with the host numbers of its capture, as a CUDA graph does."""

    def __init__(self, graph: CpuGraph, frozen: list[tuple[HostNumber, int]], runtime: WatchedRuntime) -> None:
        super().__init__(lambda: None, "watched")
        self._graph = graph
        self._frozen = frozen
        self._runtime = runtime

    @property
    def has_breaks(self) -> bool:
        return self._graph.has_breaks

    @property
    def breaks(self) -> int:
        return self._graph.breaks

    def replay(self, step: RunningStep | None = None) -> None:
        current = [number.value for number, _ in self._frozen]
        for number, value in self._frozen:
            number.value = value
        self._runtime.replaying = True
        try:
            self._graph.replay(step)
        finally:
            self._runtime.replaying = False
        for (number, _), value in zip(self._frozen, current, strict=True):
            number.value = value

    def close(self) -> None:
        self._runtime.freed.append("graph")


def small_limits(max_slots: int = 4) -> SlotLimits:
    return SlotLimits(max_slots=max_slots, max_tokens=64, max_rows=64, block_size=8, max_stop_ids=2)


@dataclass
class Mischief:
    """What goes wrong, by number of the step; gates hold the worker before the step has changed anything."""

    gates: dict[int, Gate] = field(default_factory=dict)
    stops: dict[int, Sequence[int]] = field(default_factory=dict)
    nans: dict[int, Sequence[int]] = field(default_factory=dict)
    wrong_numbers: dict[int, int] = field(default_factory=dict)
    failures: dict[int, BaseException] = field(default_factory=dict)


class InstantProgram(StepProgram):
    """Counting slots. The variant "doubled" also reports twice each token, by active slot, as extra words."""

    variants = ("plain", "doubled")

    def __init__(self, limits: SlotLimits, runtime: WatchedRuntime) -> None:
        self.limits = limits
        self.max_slots, self.max_rows = limits.max_slots, limits.max_rows
        self.staging_words = limits.staging_words
        self.record = RecordLayout(limits.max_slots, extra_words=limits.max_slots)
        self.extra_words = {"doubled": limits.max_slots}
        self.state_of_slots = SlotState(limits, runtime.device)
        self.mischief = Mischief()
        self.ran: list[GraphKey] = []
        self.captured: list[GraphKey] = []
        self.on_capture: Callable[[GraphKey], None] = lambda key: None
        self.on_step: Callable[[GraphKey], None] = lambda key: None
        self.offset = HostNumber()
        self.redraws_offset = False
        self.writes_output: Callable[[], bool] = lambda: True
        self.tokens = torch.zeros(limits.max_slots, dtype=torch.int32)
        self._nan = torch.zeros(limits.max_slots, dtype=torch.int32)
        self._runtime = runtime

    def hold(self, step: int) -> Gate:
        """The gate before that step."""
        return self.mischief.gates.setdefault(step, Gate())

    def open_gates(self) -> None:
        for gate in self.mischief.gates.values():
            gate.open()

    def bind(self, io: DeviceIO) -> None:
        self.io = io

    def apply(self, staging: torch.Tensor) -> None:
        if not self._runtime.capturing:
            self.state_of_slots.apply(staging)

    def step(self, key: GraphKey) -> None:
        if self._runtime.capturing:
            self.on_capture(key)
            self.captured.append(key)
            return
        self.on_step(key)
        number = int(self.io.counter) & 0xFFFFFFFF
        if number in self.mischief.gates:
            self.mischief.gates[number]()
        if number in self.mischief.failures:
            raise self.mischief.failures[number]
        self.ran.append(key)
        self._run(key, number)

    def _run(self, key: GraphKey, number: int) -> None:
        slots, step = self.state_of_slots.slots, self.state_of_slots.step
        prepare(slots, step, key.rows, key.bucket, self.limits.block_size)
        last = step.input_ids[step.logit_rows[: key.bucket].long()] if key.rows else step.input_ids[:0]
        if self.writes_output():
            self.tokens[: key.bucket] = (last + 1 + self.offset.value) % (VOCABULARY - 1)
        self._nan.zero_()
        self._mark(self.tokens, self.mischief.stops.get(number, ()), STOP_TOKEN)
        self._mark(self._nan, self.mischief.nans.get(number, ()), 1)
        row = self.io.ring[number % len(self.io.ring)]
        if key.variant == "doubled":
            row[self.record.base_words :] = self.tokens * 2
        update(slots, step, self.tokens, self._nan, self.io.ring, self.io.counter, self.limits.block_size)
        if number in self.mischief.wrong_numbers:
            row[0] = self.mischief.wrong_numbers[number]

    def _mark(self, words: torch.Tensor, slots: Sequence[int], value: int) -> None:
        for slot in slots:
            words[self.state_of_slots.step.active_index[slot]] = value

    def state(self) -> Sequence[torch.Tensor]:
        return self.state_of_slots.slots.all()

    def exercise(self, key: GraphKey, generator: torch.Generator) -> None:
        self.state_of_slots.exercise(key.bucket, key.rows, 64, VOCABULARY, generator)
        if self.redraws_offset:
            self.offset.value += 1

    def observed(self, key: GraphKey) -> Sequence[torch.Tensor]:
        return [self.tokens[: key.bucket]]


def admit(deltas: SlotDeltas, slot: int, token: int, blocks: int = 8, prompt: int = 2) -> SlotDeltas:
    """Gives `slot` a new owner, and runs the first two tokens of its prompt, of which `token` is the second."""
    deltas.admit(
        slot,
        Admission(max_len=60, min_len=0, temperature=0.0, top_k=0, top_p=1.0, seed=0, stop_ids=(STOP_TOKEN,)),
        seq_len=0,
        num_tokens=prompt,
    )
    deltas.arm(slot, 0, as_words([0, token]))
    deltas.supply(slot, 0, range(1 + 8 * slot, 1 + 8 * slot + blocks))
    return deltas


def admission_plan(limits: SlotLimits, tokens: dict[int, int], variant: str = "plain", **changes: int) -> StepPlan:
    """A step that admits slots, each with a prompt of two tokens, the last of which is given."""
    deltas = SlotDeltas(limits)
    for slot, token in tokens.items():
        admit(deltas, slot, token, **changes)
    return StepPlan(variant, deltas)


DECODE = StepPlan("plain")


class Rig:
    """A pipeline over an instant program, without a backend."""

    def __init__(self, max_slots: int = 4, timeout_s: float = PATIENCE_S) -> None:
        self.runtime = WatchedRuntime()
        self.limits = small_limits(max_slots)
        self.program = InstantProgram(self.limits, self.runtime)
        config = BackendConfig(name="eager", step_timeout_s=timeout_s)
        self.pipeline: Pipeline = open_pipeline(config, self.runtime, self.program)
        self.launcher = EagerLauncher(self.program, self.pipeline)

    @property
    def compute(self) -> CpuStream:
        return self.runtime.streams["compute"]

    @property
    def copy(self) -> CpuStream:
        return self.runtime.streams["copy"]

    def submit(self, plan: StepPlan = DECODE) -> PipelineHandle:
        return self.pipeline.submit(plan, self.launcher)

    def admit(self, tokens: dict[int, int], variant: str = "plain", **changes: int) -> PipelineHandle:
        return self.submit(admission_plan(self.limits, tokens, variant, **changes))

    def drain(self) -> None:
        """Waits until everything that was submitted has landed on the host."""
        assert self.compute.drain(PATIENCE_S)
        assert self.copy.drain(PATIENCE_S)

    def close(self) -> None:
        self.program.open_gates()
        self.pipeline.close()


def tokens_of(result: StepResult) -> dict[int, int]:
    """Token of each slot that yielded one."""
    return {slot: int(result.tokens[slot, 0]) for slot in range(len(result.finish)) if result.num_tokens[slot] > 0}


@dataclass(frozen=True)
class LyingDelta(Delta):
    """A delta that arms more slots than it says."""

    deltas: SlotDeltas
    armed: Sequence[int] = ()

    def pack(self, words: Int32Array, step: int) -> None:
        self.deltas.pack(words, step)
