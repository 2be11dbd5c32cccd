"""The two backends: what a warm-up leaves behind, which graph serves a step, and nothing that happens in silence."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from examples.collatz import Collatz
from graphexec.backends import BackendStats, ExecutionBackend, create_backend
from graphexec.config import BackendConfig
from graphexec.deltas import SlotDeltas, as_words
from graphexec.errors import CaptureError, ConfigError, DeviceError, GraphexecError
from graphexec.plan import GraphKey, RecordLayout, StepPlan, StepResult
from graphexec.rings import RING_SLOTS
from graphexec.runtime import CpuRuntime
from tests.support.instant_program import (
    DECODE,
    PATIENCE_S,
    STOP_TOKEN,
    Gate,
    InlineRuntime,
    InstantProgram,
    WatchedRuntime,
    admission_plan,
    admit,
    small_limits,
    tokens_of,
)


@dataclass
class Bench:
    """A prepared backend with its program and runtime."""

    backend: ExecutionBackend
    program: InstantProgram
    runtime: WatchedRuntime

    def run(self, plan: StepPlan = DECODE) -> StepResult:
        return self.backend.submit(plan).result(PATIENCE_S)

    def admit(self, tokens: dict[int, int]) -> StepResult:
        return self.run(admission_plan(self.program.limits, tokens))

    @property
    def stats(self) -> BackendStats:
        return self.backend.stats()

    @property
    def eager_steps(self) -> dict[str, int]:
        return self.stats.controller.eager_steps


Make = Callable[..., Bench]
BOTH = ("plain", "doubled")


def merge(program: InstantProgram) -> None:
    program.mixed_variants = {"plain": "doubled"}


@pytest.fixture
def make() -> Iterator[Make]:
    benches: list[Bench] = []

    def make(
        name: str = "cudagraph",
        runtime: WatchedRuntime | None = None,
        before: Callable[[InstantProgram], None] = lambda program: None,
        **settings: object,
    ) -> Bench:
        runtime = runtime or WatchedRuntime()
        program = InstantProgram(small_limits(), runtime)
        before(program)
        given = {"name": name, "verify": True, "prefill": "off"} | settings
        backend = create_backend(BackendConfig(**given), runtime)
        backend.prepare(program)
        benches.append(Bench(backend, program, runtime))
        return benches[-1]

    yield make
    for bench in benches:
        bench.program.open_gates()
        bench.backend.close()


def everything(program: InstantProgram) -> list[torch.Tensor]:
    return [*program.state(), program.io.ring, program.io.counter]


def fill(program: InstantProgram) -> list[torch.Tensor]:
    """Gives slots, records and counter values of their own, and returns copies."""
    for number, tensor in enumerate(everything(program)):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) % 3 + number)
    return [tensor.clone() for tensor in everything(program)]


# -- warm-up


@pytest.mark.parametrize("name", ["cudagraph", "eager"])
def test_a_warm_up_leaves_slots_counter_and_records_as_they_were(make: Make, name: str) -> None:
    bench = make(name)
    before = fill(bench.program)
    bench.backend.warmup()
    assert bench.program.ran, "the warm-up ran steps"
    assert all(map(torch.equal, before, everything(bench.program)))


def test_a_failed_warm_up_leaves_them_as_they_were_too(make: Make) -> None:
    bench = make()
    before = fill(bench.program)
    bench.program.on_capture = refuse(2, RuntimeError("not permitted"))
    with pytest.raises(CaptureError):
        bench.backend.warmup()
    assert all(map(torch.equal, before, everything(bench.program)))


def test_steps_after_a_warm_up_start_at_number_zero(make: Make) -> None:
    bench = make()
    bench.backend.warmup()
    result = bench.admit({0: 10})
    assert (result.step, tokens_of(result)) == (0, {0: 11})
    assert bench.stats.controller.steps == 1


def test_every_size_and_variant_is_captured_the_largest_first(make: Make) -> None:
    bench = make(capture_sizes=(1, 4, 2))
    seen: list[tuple[int, int, GraphKey]] = []
    manifest = bench.backend.warmup(lambda done, total, key: seen.append((done, total, key)))
    keys = [GraphKey("decode", size, size, variant) for size in (4, 2, 1) for variant in ("plain", "doubled")]
    assert bench.program.captured == keys
    assert [graph.key for graph in manifest.graphs] == keys
    assert all(graph.verified for graph in manifest.graphs)
    assert seen == [(index + 1, 6, key) for index, key in enumerate(keys)]
    assert manifest.missing == {}


def test_garbage_collection_is_frozen_while_graphs_are_captured(make: Make) -> None:
    bench = make()
    frozen: list[bool] = []
    bench.program.on_capture = lambda key: frozen.append(not gc.isenabled() and gc.get_freeze_count() > 0)
    bench.backend.warmup()
    assert frozen
    assert all(frozen)
    assert gc.isenabled()


def test_a_failing_capture_names_the_bucket_and_what_was_captured_before_still_works(make: Make) -> None:
    bench = make(capture_sizes=(2, 4))
    cause = RuntimeError("not permitted")
    bench.program.on_capture = refuse(2, cause)
    with pytest.raises(CaptureError, match="bucket 2.*RuntimeError: not permitted") as raised:
        bench.backend.warmup()
    assert raised.value.__cause__ is cause
    bench.admit({0: 10, 1: 20, 2: 30})
    assert tokens_of(bench.run()) == {0: 12, 1: 22, 2: 32}
    assert bench.stats.replays == 1


def test_out_of_memory_keeps_what_fits_and_reports_what_is_missing(make: Make) -> None:
    bench = make(capture_sizes=(2, 4))
    bench.program.on_capture = refuse(4, torch.OutOfMemoryError("no memory"))
    manifest = bench.backend.warmup()
    assert [graph.key.bucket for graph in manifest.graphs] == [2, 2]
    assert manifest.missing == {
        f"decode step, bucket 4, 4 rows, {variant}": "out of memory" for variant in ("plain", "doubled")
    }
    bench.admit({0: 10, 1: 20})
    assert tokens_of(bench.run()) == {0: 12, 1: 22}
    bench.admit({2: 30})
    assert tokens_of(bench.run()) == {0: 14, 1: 24, 2: 32}
    assert bench.stats.replays == 1
    assert bench.eager_steps == {"prefill off": 2, "no graph": 1}


@pytest.mark.parametrize("fails_at", [1, 2], ids=["in the step before the capture", "in the verification"])
def test_out_of_memory_beside_a_capture_leaves_that_graph_out_too(make: Make, fails_at: int) -> None:
    bench = make(runtime=InlineRuntime(), capture_sizes=(2, 4))
    runs: list[GraphKey] = []

    def run_out(key: GraphKey) -> None:
        runs.append(key)
        if key.phase == "decode" and key.bucket == 4 and runs.count(key) == fails_at:
            raise torch.OutOfMemoryError("no memory")

    bench.program.on_step = run_out
    manifest = bench.backend.warmup()
    assert [graph.key.bucket for graph in manifest.graphs] == [2, 2]
    assert set(manifest.missing.values()) == {"out of memory"}
    assert len(manifest.missing) == 2
    bench.program.on_step = lambda key: None
    bench.admit({0: 10, 1: 20, 2: 30})
    assert tokens_of(bench.run()) == {0: 12, 1: 22, 2: 32}
    assert bench.eager_steps == {"prefill off": 1, "no graph": 1}


def test_a_capture_size_above_the_slots_is_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"capture_sizes has \[8\]"):
        make(capture_sizes=(8,))
    with pytest.raises(ConfigError, match="prefill_sizes"):
        make(prefill_sizes=(65,))


# -- verification


def test_verification_catches_a_host_number_that_was_frozen_into_a_graph(make: Make) -> None:
    """transformers 45323, vLLM 27114: the number was right while capturing, and wrong for ever after."""
    bench = make()
    bench.program.redraws_offset = True
    bench.runtime.frozen = [bench.program.offset]
    with pytest.raises(CaptureError, match="bucket 4.*computes something else.*host number"):
        bench.backend.warmup()


def test_without_verification_such_a_graph_goes_unnoticed(make: Make) -> None:
    bench = make(verify=False)
    bench.program.redraws_offset = True
    bench.runtime.frozen = [bench.program.offset]
    manifest = bench.backend.warmup()
    assert not any(graph.verified for graph in manifest.graphs)


def test_verification_catches_an_output_that_the_graph_leaves_unwritten(make: Make) -> None:
    """Only poison shows it: the eager step has just left the right values there."""
    bench = make()
    bench.program.writes_output = lambda: not bench.runtime.replaying
    with pytest.raises(CaptureError, match="computes something else"):
        bench.backend.warmup()


def test_verification_catches_an_output_that_nobody_writes(make: Make) -> None:
    """Eager and graph agree, since both leave the poison where it is."""
    bench = make()
    bench.program.writes_output = lambda: False
    with pytest.raises(CaptureError, match="output 0 .* unwritten"):
        bench.backend.warmup()


class _BreaksTheContract(Collatz):
    """Does what `fault` says wrong, in every step alike: eager and graph agree."""

    def __init__(self, fault: str) -> None:
        super().__init__(torch.device("cpu"))
        self.fault = fault

    def step(self, key: GraphKey) -> None:
        row = int(self.io.counter) % len(self.io.ring)
        before = self.io.ring[row].clone()
        super().step(key)
        if self.fault == "never counts":
            self.io.counter.sub_(1)
        if self.fault == "writes no record":
            self.io.ring[row] = before
        if self.fault == "wrong number":
            self.io.ring[row, 0] += 5
        if self.fault == "wrong real_bsz":
            self.io.ring[row, 1] += 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("never counts", "add one to the counter"),
        ("writes no record", "write its record"),
        ("wrong number", "word 0 of its record"),
        ("wrong real_bsz", "real_bsz"),
    ],
)
def test_verification_catches_a_program_that_breaks_the_contract_of_records(fault: str, message: str) -> None:
    backend = create_backend(BackendConfig(verify=True), CpuRuntime())
    backend.prepare(_BreaksTheContract(fault))
    with pytest.raises(CaptureError, match=f"breaks the contract of a step.*{message}"):
        backend.warmup()
    backend.close()


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (random.random, "random"),
        (lambda: float(np.random.rand()), "numpy.random"),  # what programs of others do
        (lambda: float(torch.rand(1)), "torch's generator of the CPU"),
    ],
)
def test_a_program_that_draws_from_a_generator_of_the_host_is_told_that_it_cannot_be_verified(
    make: Make, draw: Callable[[], float], name: str
) -> None:
    bench = make()

    def draw_the_next_tokens(key: GraphKey) -> None:
        bench.program.offset.value = int(draw() * 2**30)

    bench.program.on_step = draw_the_next_tokens
    with pytest.raises(CaptureError, match=f"bucket 4.*draws from {name}, on the host.*cannot be verified by compar"):
        bench.backend.warmup()
    bench.program.on_step = lambda key: None
    bench.program.offset.value = 0
    assert tokens_of(bench.admit({0: 10})) == {0: 11}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda program: delattr(program, "staging_words"), "InstantProgram has no staging_words"),
        (
            lambda program: setattr(program, "max_rows", 3),
            "max_rows=3 of the program is less than max_slots . rows_per_slot = 4",
        ),
        (lambda program: setattr(program, "record", RecordLayout(2)), "record is made for 2 slots, and max_slots is 4"),
    ],
)
def test_a_program_that_lacks_what_it_must_have_is_refused_by_name(
    spoil: Callable[[InstantProgram], None], message: str
) -> None:
    runtime = WatchedRuntime()
    program = InstantProgram(small_limits(), runtime)
    spoil(program)
    with pytest.raises(ConfigError, match=message):
        create_backend(BackendConfig(), runtime).prepare(program)


def test_draws_that_change_no_result_are_nobodys_business(make: Make) -> None:
    """Another thread may draw while an engine starts."""
    bench = make()
    bench.program.on_step = lambda key: random.random() and None
    assert all(graph.verified for graph in bench.backend.warmup().graphs)


def test_a_variant_that_the_program_does_not_have_is_refused(make: Make) -> None:
    bench = make()
    with pytest.raises(ConfigError, match="no variant 'wlak'. Known: plain, doubled"):
        bench.backend.submit(StepPlan("wlak"))
    assert tokens_of(bench.admit({0: 10})) == {0: 11}


def test_a_failed_verification_leaves_the_process_usable(make: Make) -> None:
    bench = make()
    bench.program.writes_output = lambda: not bench.runtime.replaying
    with pytest.raises(CaptureError):
        bench.backend.warmup()
    bench.program.writes_output = lambda: True
    assert tokens_of(bench.admit({0: 10})) == {0: 11}


# -- steps


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("name", ["cudagraph", "eager"])
def test_backends_and_depths_give_the_same_tokens(make: Make, name: str, depth: int) -> None:
    bench = make(name)
    bench.backend.warmup()
    bench.program.mischief.stops = {3: [1]}
    limits = bench.program.limits
    plans = [admission_plan(limits, {0: 10, 1: 20}), DECODE, DECODE, DECODE, admission_plan(limits, {3: 30}), DECODE]
    in_flight, results = deque(), []
    for plan in [*plans, *[DECODE] * 6]:
        in_flight.append(bench.backend.submit(plan))
        if len(in_flight) > depth:
            results.append(in_flight.popleft().result())
    results += [handle.result() for handle in in_flight]
    assert [tokens_of(result) for result in results[:6]] == [
        {0: 11, 1: 21},
        {0: 12, 1: 22},
        {0: 13, 1: 23},
        {0: 14, 1: STOP_TOKEN},
        {0: 15, 3: 31},
        {0: 16, 3: 32},
    ]
    assert bench.stats.replays == (10 if name == "cudagraph" else 0)


def test_an_unfinished_prompt_yields_no_token_until_its_last_chunk(make: Make) -> None:
    bench = make()
    bench.backend.warmup()
    deltas = admit(SlotDeltas(bench.program.limits), 0, 10, prompt=3)
    assert bench.run(StepPlan("plain", deltas)).num_tokens[0] == 0
    rest = SlotDeltas(bench.program.limits)
    rest.arm(0, 2, as_words([60]))
    assert tokens_of(bench.run(StepPlan("plain", rest))) == {0: 61}
    assert bench.eager_steps == {"prefill off": 1}, "a chunk of one token is a row like any other, and has a graph"


def test_a_parked_slot_resumes_with_nothing_lost(make: Make) -> None:
    bench = make()
    bench.backend.warmup()
    tokens = [tokens_of(bench.run(admission_plan(bench.program.limits, {0: 10}, blocks=1)))]
    tokens += [tokens_of(bench.run()) for _ in range(8)]
    assert tokens[6:] == [{0: 17}, {}, {}], "eight positions fill the block"
    supply = SlotDeltas(bench.program.limits)
    supply.supply(0, 1, [9])
    assert tokens_of(bench.run(StepPlan("plain", supply))) == {0: 18}
    assert tokens_of(bench.run()) == {0: 19}


def test_after_the_warm_up_nothing_is_captured_any_more(make: Make) -> None:
    bench = make(capture_sizes=(2,))
    bench.backend.warmup()
    captured = list(bench.program.captured)
    bench.admit({0: 10, 1: 20, 2: 30})
    for _ in range(3):
        bench.run()
    assert bench.program.captured == captured
    assert bench.eager_steps == {"prefill off": 1, "no graph": 3}


def test_every_eager_fallback_is_counted_with_its_reason(make: Make) -> None:
    bench = make(capture_sizes=(1,))
    bench.backend.warmup()
    bench.run()
    bench.admit({0: 10})
    bench.run()
    bench.admit({1: 20})
    bench.run()
    assert bench.eager_steps == {"idle": 1, "prefill off": 2, "no graph": 1}
    assert bench.stats.replays == 1


def test_the_eager_backend_says_so(make: Make) -> None:
    bench = make("eager")
    bench.backend.warmup()
    bench.run()
    bench.admit({0: 10})
    bench.run()
    assert bench.eager_steps == {"idle": 1, "eager backend": 2}
    assert bench.stats.replays == 0


def test_strict_refuses_a_step_without_a_graph_and_goes_on(make: Make) -> None:
    bench = make(capture_sizes=(2, 4), strict=True, lazy_capture=True)
    bench.backend.warmup()
    bench.run()  # idle steps have no graph by design, and those of a phase that is off
    bench.backend._graphs.discard(GraphKey("decode", 4, 4, "plain"))
    bench.program.on_capture = refuse(4, RuntimeError("not permitted"))
    bench.admit({0: 10, 1: 20})
    bench.admit({2: 30})
    with pytest.raises(CaptureError, match="bucket 4.*strict=true.*capture_sizes"):
        bench.run()
    release = SlotDeltas(bench.program.limits)
    release.release(1)
    with pytest.raises(CaptureError):  # the host cannot know yet that the release makes room
        bench.run(StepPlan("plain", release))
    assert "no graph" not in bench.eager_steps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capture_sizes": (2,)}, "capture_sizes ends at 2.*up to 4"),
        ({"prefill_sizes": (32,)}, "prefill_sizes ends at 32.*up to 64"),
        ({"prefill_slots": (2,)}, "prefill_slots ends at 2.*up to 4"),
    ],
)
def test_strict_refuses_a_ladder_that_leaves_a_step_out(
    make: Make, settings: dict[str, object], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=f"{message}.*strict=true"):
        make(strict=True, prefill="full", **settings)
    make(strict=True, prefill="full", lazy_capture=True, **settings)
    make(prefill="full", **settings)
    assert "captured on first use" in caplog.messages[0]
    assert "run eagerly" in caplog.messages[1]


def test_a_phase_that_is_off_has_no_gaps_and_no_graphs(make: Make) -> None:
    bench = make(decode="off", prefill="off", capture_sizes=(2,), strict=True)
    assert bench.backend.warmup().graphs == ()
    bench.admit({0: 10})
    bench.run()
    assert bench.eager_steps == {"prefill off": 1, "decode off": 1}


# -- steps with prompt chunks


def test_steps_with_prompt_chunks_are_captured_before_the_others(make: Make) -> None:
    bench = make(capture_sizes=(4,), prefill="full", prefill_sizes=(2, 32, 64), prefill_slots=(1, 4))
    manifest = bench.backend.warmup()
    shapes = [
        *(("mixed", rows, slots) for rows in (64, 32) for slots in (4, 1)),
        *(("mixed", 2, 2), ("mixed", 2, 1)),  # never more slots than rows
        *(("prefill", rows, 1) for rows in (64, 32, 2)),
    ]
    shapes.sort(key=lambda shape: (-shape[1], -shape[2], shape[0] == "mixed"))
    keys = [GraphKey(*shape, variant) for shape in [*shapes, ("decode", 4, 4)] for variant in BOTH]
    assert [graph.key for graph in manifest.graphs] == keys
    bench.admit({0: 10, 1: 20})
    bench.run()
    assert bench.eager_steps == {}
    assert bench.stats.replays == 2


def test_a_variant_that_serves_another_in_steps_with_prompt_chunks_saves_its_graphs(make: Make) -> None:
    bench = make(prefill="full", runtime=InlineRuntime(), before=merge)
    manifest = bench.backend.warmup()
    assert {graph.key.variant for graph in manifest.graphs if graph.key.phase == "mixed"} == {"doubled"}
    assert {graph.key.variant for graph in manifest.graphs if graph.key.phase == "decode"} == set(BOTH)
    bench.admit({0: 10})
    assert bench.eager_steps == {}


def test_variants_that_are_not_wanted_at_the_start_are_captured_on_first_use(make: Make) -> None:
    bench = make(capture_sizes=(4,), prefill="full", variants=("plain",), strict=True)
    manifest = bench.backend.warmup()
    assert {graph.key.variant for graph in manifest.graphs} == {"plain"}
    warm = len(bench.program.captured)
    bench.admit({0: 10})
    for _ in range(2):
        bench.run(StepPlan("doubled"))
    bench.run()
    assert bench.program.captured[warm:] == [GraphKey("decode", 4, 4, "doubled")]
    assert bench.eager_steps == {}


def test_a_variant_at_the_start_that_nobody_knows_is_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"variants has \['tripled'\]; the program has plain, doubled"):
        make(variants=("tripled",))


def test_on_the_cpu_a_warm_up_runs_few_steps(make: Make) -> None:
    """A graph there is the call itself; steps of every size would only take time."""
    bench = make(prefill="full", verify=False)
    ran: list[GraphKey] = []
    bench.program.on_step = ran.append
    manifest = bench.backend.warmup()
    assert len(ran) <= 2 * 2 * 3 < len(manifest.graphs)
    assert max(key.rows for key in ran) <= 32


def test_lazy_capture_captures_a_missing_graph_once_and_disturbs_no_slot(make: Make) -> None:
    bench = make(capture_sizes=(2,), lazy_capture=True)
    bench.backend.warmup()
    bench.admit({0: 10, 1: 20, 2: 30})
    warm = len(bench.program.captured)
    in_flight = [bench.backend.submit(DECODE) for _ in range(3)]
    assert [tokens_of(handle.result()) for handle in in_flight] == [
        {0: 11 + step, 1: 21 + step, 2: 31 + step} for step in (1, 2, 3)
    ]
    assert bench.program.captured[warm:] == [GraphKey("decode", 4, 4, "plain")]
    assert bench.stats.replays == 3


def test_a_lazy_capture_that_was_refused_is_not_tried_again(make: Make) -> None:
    """Each try drains the pipeline, copies the state and warms up: every later step of the shape would pay for it."""
    bench = make(capture_sizes=(2,), lazy_capture=True)
    bench.backend.warmup()
    tried: list[GraphKey] = []

    def refuse_four(key: GraphKey) -> None:
        if key.bucket == 4:
            tried.append(key)
            raise RuntimeError("not permitted")

    bench.program.on_capture = refuse_four
    bench.admit({0: 10, 1: 20, 2: 30})
    assert [tokens_of(bench.run()) for _ in range(3)] == [{0: 11 + n, 1: 21 + n, 2: 31 + n} for n in (1, 2, 3)]
    assert tried == [GraphKey("decode", 4, 4, "plain")]
    assert bench.eager_steps == {"prefill off": 1, "no graph": 3}


def test_padding_and_waiting_are_counted(make: Make) -> None:
    bench = make(capture_sizes=(4,))
    bench.backend.warmup()
    bench.admit({0: 10})
    bench.run()
    controller = bench.stats.controller
    assert (controller.steps, controller.real_slots, controller.predicted_slots) == (2, 2, 2)
    assert controller.padding_slots == 6
    assert bench.backend.wait_us > 0


@pytest.mark.parametrize("name", ["eager", "cudagraph"])
def test_deltas_in_every_slot_of_the_staging_ring_reach_their_steps(make: Make, name: str) -> None:
    bench = make(name)
    bench.backend.warmup()
    for number in range(2 * RING_SLOTS):
        assert tokens_of(bench.admit({number % 4: 10 * number}))[number % 4] == 10 * number + 1


# -- closing


def test_closing_frees_graphs_only_once(make: Make) -> None:
    bench = make()
    manifest = bench.backend.warmup()
    bench.admit({0: 10})
    bench.backend.close()
    graphs = len(manifest.graphs) + RING_SLOTS  # and those that apply deltas
    assert bench.runtime.freed == ["graph"] * graphs + ["event"] * (3 * RING_SLOTS) + ["stream"] * 2
    bench.backend.close()
    assert len(bench.runtime.freed) == 3 * RING_SLOTS + 2 + graphs
    with pytest.raises(DeviceError, match="closed"):
        bench.run()


def test_f7_a_backend_that_does_not_drain_frees_no_graph(make: Make) -> None:
    bench = make(step_timeout_s=0.3)
    bench.backend.warmup()
    gate = bench.program.hold(0)
    bench.backend.submit(admission_plan(bench.program.limits, {0: 10}))
    bench.backend.close()
    assert bench.runtime.freed == []
    gate.open()


def test_f7_graphs_that_the_device_may_still_run_outlive_their_backend() -> None:
    runtime = WatchedRuntime()
    program = InstantProgram(small_limits(), runtime)
    backend = create_backend(BackendConfig(step_timeout_s=0.3), runtime)
    backend.prepare(program)
    backend.warmup()
    gate = Gate()
    runtime.streams["compute"].run(gate)  # a worker that holds nothing of the backend, as a device does not
    backend.close()
    kept = weakref.ref(backend._graphs)
    del backend, program
    gc.collect()
    assert kept() is not None
    gate.open()


def test_f7_a_backend_that_is_dropped_frees_its_graphs_once_the_device_has_done_with_them() -> None:
    runtime = WatchedRuntime()
    program = InstantProgram(small_limits(), runtime)
    backend = create_backend(BackendConfig(), runtime)
    backend.prepare(program)
    manifest = backend.warmup()
    gate = Gate()
    runtime.streams["copy"].run(gate)
    handle = backend.submit(admission_plan(program.limits, {0: 10}))
    freed_early: list[str] = []

    def let_it_land() -> None:
        freed_early.extend(runtime.freed)
        gate.open()

    threading.Timer(0.2, let_it_land).start()
    graphs = weakref.ref(backend._graphs)
    del backend, handle
    gc.collect()
    assert freed_early == []
    assert runtime.freed.count("stream") == 2
    assert runtime.freed.count("graph") == len(manifest.graphs) + RING_SLOTS
    assert graphs() is None


@pytest.mark.parametrize("name", ["cudagraph", "eager"])
def test_preparing_again_leaves_no_thread_behind(make: Make, name: str) -> None:
    bench = make(name)
    threads = threading.active_count()
    for _ in range(3):
        bench.backend.prepare(bench.program)
    assert threading.active_count() == threads
    bench.backend.warmup()
    assert tokens_of(bench.admit({0: 10})) == {0: 11}


@pytest.mark.parametrize("name", ["cudagraph", "eager"])
def test_a_second_backend_takes_a_program_over_whose_deltas_were_another_ones(make: Make, name: str) -> None:
    """The device holds the number of a delta that the second backend knows nothing of."""
    first = make(name)
    first.backend.warmup()
    first.admit({0: 10})
    release = SlotDeltas(first.program.limits)
    release.release(0)
    first.run(StepPlan("plain", release))
    first.backend.close()
    second = create_backend(BackendConfig(name=name), first.runtime)
    second.prepare(first.program)
    second.warmup()
    assert second.submit(DECODE).result(PATIENCE_S).real_bsz == 0
    assert tokens_of(second.submit(admission_plan(first.program.limits, {1: 20})).result(PATIENCE_S)) == {1: 21}
    second.close()


@pytest.mark.parametrize("name", ["cudagraph", "eager"])
def test_a_backend_that_was_never_prepared_can_be_closed(name: str) -> None:
    create_backend(BackendConfig(name=name), WatchedRuntime()).close()


@pytest.mark.parametrize("name", ["cudagraph", "eager"])
def test_a_step_that_fails_in_the_warm_up_is_an_error_with_its_cause(make: Make, name: str) -> None:
    bench = make(name)
    bench.program.mischief.failures = {0: ValueError("no such token")}
    with pytest.raises(GraphexecError, match="no such token"):
        bench.backend.warmup()


def refuse(bucket: int, error: Exception) -> Callable[[GraphKey], None]:
    def on_capture(key: GraphKey) -> None:
        if key.bucket == bucket:
            raise error

    return on_capture
