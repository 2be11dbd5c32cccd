"""The frozen-number check on real graphs: a planted leak is named, and what the project captures has none."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from examples.collatz import Collatz
from graphexec import BackendConfig, CaptureError, EngineConfig, GraphKey, check_frozen, create_runtime
from graphexec.backends import keys_of, ladders_of
from graphexec.capture.frozen import FrozenCheck
from graphexec.config import CompileMode
from graphexec.engine.assemble import assemble

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")
KEY = GraphKey("decode", 4, 4, "plain")
NUMBERS = 1 << 20


class Leaky(Collatz):
    """The example with something more in its step, which may read a number that each `exercise` draws anew."""

    def __init__(self, plant: Callable[[Leaky], object]) -> None:
        super().__init__(CUDA)
        self.plant = plant
        self.numbers = torch.zeros(NUMBERS, dtype=torch.int32, device=CUDA)
        self.drawn: list[int] = [0]

    def exercise(self, key: GraphKey, generator: torch.Generator) -> None:
        super().exercise(key, generator)
        self.drawn.append(1024 * int(torch.randint(1, NUMBERS // 1024, (1,), generator=generator)))

    def step(self, key: GraphKey) -> None:
        super().step(key)
        self.plant(self)


def check(program: Collatz) -> FrozenCheck:
    (found,) = check_frozen(program, BackendConfig(), create_runtime(CUDA), [KEY])
    print(found)
    return found


def test_a_number_that_is_passed_to_a_kernel_is_named_with_kernel_and_argument() -> None:
    program = Leaky(lambda program: program.numbers.add_(program.drawn[-1]))
    found = check(program)
    (leak,) = found.leaks
    values = dict.fromkeys(program.drawn[1:])
    assert len(values) == 2
    assert "elementwise_kernel" in leak
    assert "argument 1: bytes 0 to 3 of " in leak  # of (int number of elements, functor, pointers)
    assert leak.endswith("hold " + " or ".join(map(str, values)))
    with pytest.raises(CaptureError, match="graph of the decode step, bucket 4.*elementwise_kernel"):
        found.raise_for_leaks()


def test_a_grid_that_follows_a_number_is_named_with_its_kernel() -> None:
    found = check(Leaky(lambda program: program.numbers[: program.drawn[-1]].add_(1)))
    assert any("elementwise_kernel" in leak and "is launched with grid" in leak for leak in found.leaks)
    assert any("elementwise_kernel" in leak and "argument 0: bytes 0 to 3 of 4" in leak for leak in found.leaks)


def test_a_fill_that_follows_a_number_is_named() -> None:
    found = check(Leaky(lambda program: program.numbers[: program.drawn[-1]].zero_()))
    assert found.leaks


def test_a_launch_that_follows_a_number_is_named() -> None:
    def plant(program: Leaky) -> None:
        if program.drawn[-1] == program.drawn[1]:
            program.numbers.cos()

    found = check(Leaky(plant))
    assert len(found.leaks) == 1
    assert found.leaks[0].startswith("captures have ")


def test_the_example_has_no_leak_and_is_left_as_it_was() -> None:
    program = Collatz(CUDA)
    program.value[:3] = torch.tensor([5, 6, 7], dtype=torch.int32)
    found = check(program)
    assert found.leaks == ()
    assert found.checked > 0
    assert program.value[:4].tolist() == [5, 6, 7, 0]


def test_a_number_on_the_device_is_no_leak() -> None:
    """Temporaries of other captures lie elsewhere: addresses are told from numbers."""
    found = check(Leaky(lambda program: program.numbers.add_(program.numbers.cumsum(0)).add_(1)))
    assert found.leaks == ()


@pytest.mark.parametrize("mode", ["off", "layer"])
def test_the_decoder_has_no_leak(mode: CompileMode) -> None:
    backend = BackendConfig(name="eager")
    config = EngineConfig(
        model="tiny-random", device="cuda", compile=mode, max_num_seqs=4, max_model_len=64, num_kv_blocks=40,
        backend=backend,
    )  # fmt: skip
    parts = assemble(config, None)
    parts.backend.close()
    every = keys_of(backend, parts.program, ladders_of(backend, parts.program))
    keys = list({(key.phase, key.variant): key for key in reversed(every)}.values())
    assert {key.phase for key in keys} == {"decode", "mixed", "prefill"}
    for found in check_frozen(parts.program, backend, create_runtime(CUDA), keys):
        print(json.dumps({"key": str(found.key), "checked": found.checked, "noise": len(found.noise)}))
        print(*dict.fromkeys(found.unchecked), *found.noise, sep="\n")
        assert found.leaks == ()
        assert found.checked > len(found.unchecked)


def test_two_captures_of_a_step_have_one_fingerprint_and_another_order_of_work_has_another() -> None:
    from graphexec.capture.graph_set import GraphSet

    runtime = create_runtime(CUDA)
    compute, side = runtime.stream("compute"), torch.cuda.Stream()
    graphs = GraphSet(runtime, compute)
    first, second = (torch.zeros(64, device=CUDA) for _ in range(2))
    torch.cuda.synchronize()

    def chain() -> None:
        first.add_(1)
        second.add_(1)

    def fork() -> None:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        first.add_(1)
        with torch.cuda.stream(side):
            second.add_(1)
        main.wait_stream(side)

    try:
        described = [graphs.capture_unkeyed(work).describe() for work in (chain, chain, fork)]
    finally:
        assert compute.drain(10)
        graphs.close()
    assert described[0] == described[1]
    assert described[0].launches == described[2].launches
    assert described[0].fingerprint != described[2].fingerprint
