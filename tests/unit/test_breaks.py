"""Eager breaks: where they cut, what they are told, and that no step goes without its host's part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, cast

import pytest
import torch

from graphexec import CaptureError, ConfigError, GraphexecError, RunningStep, eager_break, running_step
from graphexec.backends import ExecutionBackend, create_backend
from graphexec.capture.lint import capture_lint
from graphexec.config import BackendConfig
from graphexec.plan import GraphKey, StepPlan
from graphexec.runtime import CpuRuntime, Stream
from graphexec.runtime.breaks import BreakCall, Cuts, EagerBreak, cutting, running
from tests.support.instant_program import (
    DECODE,
    PATIENCE_S,
    HostNumber,
    InlineRuntime,
    InstantProgram,
    WatchedRuntime,
    admission_plan,
    small_limits,
    tokens_of,
)

STEP = RunningStep(GraphKey("decode", 2, 2, "plain"), StepPlan("plain"), "the host")


@eager_break
def double(source: torch.Tensor, target: torch.Tensor) -> None:
    torch.mul(source, 2, out=target)


@eager_break(writes=("target",))
def add_total(source: torch.Tensor, target: torch.Tensor, times: int) -> None:
    """Reads the device: no graph holds that."""
    target.add_(int(source.sum()) * times)


@eager_break(optional=True)
def optional(calls: list[str]) -> None:
    calls.append("optional")


# -- the mark


def test_outside_of_a_capture_a_break_is_an_ordinary_call() -> None:
    target = torch.zeros(3)
    double(torch.ones(3), target)
    add_total(torch.ones(3), target, 2)
    assert target.tolist() == [8, 8, 8]
    assert double.__name__ == "double"


@pytest.mark.parametrize(
    ("cuts", "cut"), [(Cuts.NONE, []), (Cuts.MARKED, ["double"]), (Cuts.ALL, ["double", "optional"])]
)
def test_a_capture_cuts_at_the_breaks_that_it_honours(cuts: Cuts, cut: list[str]) -> None:
    met: list[BreakCall] = []
    calls: list[str] = []
    target = torch.zeros(1)
    with cutting(met.append, cuts):
        double(torch.ones(1), target)
        optional(calls)
    assert [call.function.__name__ for call in met] == cut
    assert bool(target == 0) is ("double" in cut)
    assert calls == ([] if "optional" in cut else ["optional"])


def test_a_break_that_returns_something_is_refused() -> None:
    @eager_break
    def wrong(source: torch.Tensor) -> None:
        return source + 1  # type: ignore[return-value]  # what is refused

    with pytest.raises(CaptureError, match="wrong returns something.*Take an output tensor"):
        wrong(torch.ones(1))


def test_a_break_that_returns_something_is_refused_by_the_lint_and_in_a_replay_too() -> None:
    @eager_break
    def wrong(source: torch.Tensor) -> None:
        return source + 1  # type: ignore[return-value]  # what is refused

    with capture_lint(Cuts.MARKED), pytest.raises(CaptureError, match="wrong returns something"):
        wrong(torch.ones(1))
    graph = CpuRuntime().capture(lambda: wrong(torch.ones(1)), cast(Stream, None), None, Cuts.MARKED)
    with pytest.raises(CaptureError, match="wrong returns something"):
        graph.replay(STEP)


def test_replays_make_the_call_that_a_break_prepared() -> None:
    made: list[str] = []

    @eager_break
    def load(names: list[str]) -> None:
        names.append("ordinary")

    @load.prepare
    def _(names: list[str]) -> Callable[[], None]:
        return lambda: names.append("prepared")

    load(made)
    CpuRuntime().capture(lambda: load(made), cast(Stream, None), None, Cuts.MARKED).replay(STEP)
    assert made == ["ordinary", "prepared"]


def test_of_a_replay_only_its_breaks_are_told_the_step() -> None:
    """Everything else was captured: it would repeat what it was told then."""
    told: list[RunningStep] = []

    @eager_break
    def ask() -> None:
        told.append(running_step())

    def work() -> None:
        told.append(running_step())
        ask()

    later = RunningStep(STEP.key, StepPlan("plain"), None)
    with running(STEP):
        graph = CpuRuntime().capture(work, cast(Stream, None), None, Cuts.MARKED)
    graph.replay(later)
    assert told == [STEP, later]
    assert graph.breaks == 1


def test_two_breaks_of_one_name_are_two_operators() -> None:
    def make(factor: int) -> EagerBreak:
        @eager_break(writes=("target",))
        def scale(source: torch.Tensor, target: torch.Tensor) -> None:
            torch.mul(source, factor, out=target)

        return scale

    twice, thrice = make(2), make(3)

    def model(hidden: torch.Tensor) -> torch.Tensor:
        out, other = torch.empty_like(hidden), torch.empty_like(hidden)
        twice(hidden, out)
        thrice(out, other)
        return other

    assert torch.compile(model, backend="aot_eager", fullgraph=True)(torch.ones(2)).tolist() == [6, 6]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: eager_break(_Holder.attend), "attend is a method.*running_step...host"),
        (lambda: eager_break(writes="out")(_scale), "writes='out' of _scale must be a list of its parameters: x, out"),
        (lambda: eager_break(writes=["nope"])(_scale), "writes=.'nope'. of _scale must be a list.*x, out"),
        (lambda: eager_break("out"), "by name"),
    ],
)
def test_a_mark_that_cannot_work_is_refused_where_it_stands(make: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


class _Holder:
    def attend(self, out: torch.Tensor) -> None: ...


def _scale(x: torch.Tensor, out: torch.Tensor) -> None: ...


def test_outside_of_a_step_there_is_no_running_step() -> None:
    with pytest.raises(CaptureError, match="No step is running"):
        running_step()
    with running(STEP):
        assert running_step() is STEP


def test_compiled_code_keeps_a_break_that_names_what_it_writes() -> None:
    def model(hidden: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        add_total(hidden * 2, out, 3)
        return out + 1

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == model(torch.ones(2)).tolist() == [13, 13]
    met: list[BreakCall] = []
    with cutting(met.append, Cuts.MARKED):
        compiled(torch.ones(2))
    (call,) = met
    source, _, times = call.arguments
    assert isinstance(source, torch.Tensor)
    assert source.tolist() == [2, 2]
    assert times == 3


def test_the_lint_lets_breaks_read_the_device_where_a_capture_would_cut() -> None:
    with capture_lint(Cuts.MARKED):
        add_total(torch.ones(1), torch.zeros(1), 1)
        with pytest.raises(CaptureError, match="brings values to the host"):
            torch.ones(1).item()
    with capture_lint(), pytest.raises(CaptureError, match="brings values to the host"):
        add_total(torch.ones(1), torch.zeros(1), 1)


# -- in a backend


@dataclass
class Planner:
    """The host object of a program: what its steps were told."""

    seen: list[RunningStep] = field(default_factory=list)
    planned: list[tuple[GraphKey, StepPlan]] = field(default_factory=list)
    number: HostNumber = field(default_factory=HostNumber)


class PlannedProgram(InstantProgram):
    """Meets an eager break in every step, which adds the planner's number to its tokens."""

    def __init__(self, runtime: WatchedRuntime) -> None:
        super().__init__(small_limits(), runtime)
        self.host = Planner()

    def step(self, key: GraphKey) -> None:
        _plan_tokens(self.offset)
        super().step(key)


@eager_break
def _plan_tokens(offset: HostNumber) -> None:
    step = running_step()
    assert isinstance(step.host, Planner)
    step.host.seen.append(step)
    offset.value = step.host.number.value


class HookedProgram(PlannedProgram):
    """Plans ahead of every launch, too."""

    fails = False

    def before_launch(self, key: GraphKey, plan: StepPlan) -> None:
        if self.fails:
            raise ValueError("no plan")
        assert isinstance(self.host, Planner)
        self.host.planned.append((key, plan))


Mode = Literal["full", "piecewise", "off"]
Make = Callable[..., tuple[ExecutionBackend, PlannedProgram]]


@pytest.fixture
def make() -> Iterator[Make]:
    opened: list[tuple[ExecutionBackend, InstantProgram]] = []

    def make(
        decode: Mode | None = None,
        program_type: type[PlannedProgram] = PlannedProgram,
        runtime: WatchedRuntime | None = None,
        name: str = "cudagraph",
        **settings: object,
    ) -> tuple[ExecutionBackend, PlannedProgram]:
        runtime = runtime or WatchedRuntime()
        program = program_type(runtime)
        given = {"name": name, "decode": decode, "prefill": "off"} | settings
        backend = create_backend(BackendConfig(**given), runtime)
        backend.prepare(program)
        opened.append((backend, program))
        return backend, program

    yield make
    for backend, program in opened:
        program.open_gates()
        backend.close()


def planner_of(program: PlannedProgram) -> Planner:
    assert isinstance(program.host, Planner)
    return program.host


@pytest.mark.parametrize("decode", [None, "piecewise", "off"])
def test_a_break_is_told_its_own_steps_plan_with_steps_in_flight(make: Make, decode: Mode | None) -> None:
    backend, program = make(decode)
    backend.warmup()
    planner = planner_of(program)
    planner.seen.clear()
    gate = program.hold(0)
    plans = [admission_plan(program.limits, {0: 10}), StepPlan("plain"), StepPlan("doubled"), StepPlan("plain")]
    handles = [backend.submit(plan) for plan in plans]
    gate.open()
    for handle in handles:
        handle.result(PATIENCE_S)
    assert [id(step.plan) for step in planner.seen] == [id(plan) for plan in plans]
    assert [step.key.variant for step in planner.seen] == ["plain", "plain", "doubled", "plain"]
    assert all(step.host is planner for step in planner.seen)


@pytest.mark.parametrize("decode", [None, "piecewise", "full"])
def test_pieces_are_told_the_plan_and_nothing_in_a_whole_graph_may_ask_for_it(make: Make, decode: Mode | None) -> None:
    backend, program = make(decode, verify=False)
    backend.warmup()
    planner_of(program).number.value = 1
    planner_of(program).seen.clear()
    backend.submit(admission_plan(program.limits, {0: 10}))  # a chunk of two tokens, which runs eagerly
    assert tokens_of(backend.submit(DECODE).result(PATIENCE_S)) == {0: 14}
    if decode == "full":
        with pytest.raises(CaptureError, match="plan is that of one submitted step, and this code is captured"):
            _ = planner_of(program).seen[-1].plan
    else:
        assert planner_of(program).seen[-1].plan is DECODE
    assert backend.stats().modes == {"decode": "full" if decode == "full" else "piecewise", "prefill": "off"}


def test_a_program_without_breaks_has_whole_graphs_by_default(make: Make) -> None:
    runtime = WatchedRuntime()
    program = InstantProgram(small_limits(), runtime)
    backend = create_backend(BackendConfig(verify=True, prefill="off"), runtime)
    try:
        backend.prepare(program)
        manifest = backend.warmup()
        assert {graph.pieces for graph in manifest.graphs} == {1}
        assert backend.stats().modes == {"decode": "full", "prefill": "off"}
    finally:
        backend.close()


def test_the_manifest_counts_the_pieces_of_verified_graphs_and_times_them(make: Make) -> None:
    backend, _ = make(verify=True, measure=True)
    manifest = backend.warmup()
    assert {graph.pieces for graph in manifest.graphs} == {2}
    for graph in manifest.graphs:
        assert graph.replay_us is not None
        assert graph.launch_us is not None
        assert 0 < graph.launch_us <= graph.replay_us


def test_an_unknown_mode_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="decode='piecewize' is not possible.*'full', 'piecewise' or 'off'"):
        BackendConfig(decode="piecewize")  # type: ignore[arg-type]  # what is refused


# -- the host's part of a step


@pytest.mark.parametrize("name", ["cudagraph", "eager"])
@pytest.mark.parametrize("decode", ["full", "piecewise", "off"])
def test_the_host_plans_before_each_launch_and_behind_the_delta(make: Make, decode: Mode, name: str) -> None:
    backend, program = make(decode, HookedProgram, name=name)
    backend.warmup()
    planner = planner_of(program)
    assert {plan.delta for _, plan in planner.planned} <= {None}, "a warm-up has no delta"
    assert bool(planner.planned) is (decode != "off"), "it plans what it runs"
    planner.planned.clear()
    plans = [admission_plan(program.limits, {0: 10, 1: 20}), StepPlan("plain"), StepPlan("doubled")]
    for plan in plans:
        backend.submit(plan)
    backend.submit(DECODE).result(PATIENCE_S)
    assert [id(plan) for _, plan in planner.planned] == [id(plan) for plan in (*plans, DECODE)]
    assert [key.phase for key, _ in planner.planned] == ["prefill", "decode", "decode", "decode"]


def test_a_capture_in_the_midst_of_serving_plans_for_the_coming_step_behind_its_delta(make: Make) -> None:
    backend, program = make(None, HookedProgram, prefill="piecewise", prefill_sizes=(2,), lazy_capture=True)
    backend.warmup()
    planner = planner_of(program)
    plan = admission_plan(program.limits, {0: 10, 1: 20, 2: 30})  # of six rows, which no graph has
    planner.planned.clear()
    planner.seen.clear()
    program.ran.clear()
    rehearsed: list[int] = []
    program.on_step = lambda key: rehearsed.append(int((program.state_of_slots.slots.query_lens > 0).sum()))
    result = backend.submit(plan).result(PATIENCE_S)
    assert [id(each) for _, each in planner.planned] == [id(plan)] * 2, "once for the capture, once for the step"
    assert [id(step.plan) for step in planner.seen] == [id(plan)] * 2
    assert rehearsed == [3, 3], "the capture's rehearsal sees the slots that the delta admits"
    assert tokens_of(result) == {0: 11, 1: 21, 2: 31}


def test_a_plan_that_fails_breaks_the_pipeline_and_not_the_next_one(make: Make) -> None:
    backend, program = make("full", HookedProgram, runtime=InlineRuntime())
    assert isinstance(program, HookedProgram)
    backend.warmup()
    program.fails = True
    with pytest.raises(ValueError, match="no plan"):
        backend.submit(admission_plan(program.limits, {0: 10}))
    program.fails = False
    with pytest.raises(GraphexecError):
        backend.submit(DECODE)
    backend.prepare(program)
    backend.warmup()
    assert tokens_of(backend.submit(admission_plan(program.limits, {0: 10})).result(PATIENCE_S)) == {0: 11}


@pytest.mark.parametrize("name", ["cudagraph", "eager"])
def test_work_of_ones_own_runs_between_the_steps_around_it(make: Make, name: str) -> None:
    backend, program = make("full", name=name)
    backend.warmup()
    program.ran.clear()
    seen: list[int] = []
    gate = program.hold(1)
    backend.submit(admission_plan(program.limits, {0: 10}))
    backend.submit(DECODE)
    backend.enqueue(lambda: seen.append(len(program.ran)))
    last = backend.submit(DECODE)
    assert seen == [], "it waits for the step in front of it"
    gate.open()
    last.result(PATIENCE_S)
    assert seen == [2]
    assert len(program.ran) == 3
