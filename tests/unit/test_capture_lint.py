"""The lint finds on the CPU what a capture on CUDA would refuse; the bundled programs have none of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from examples.collatz import Collatz
from graphexec import (
    BackendConfig,
    CaptureError,
    EngineConfig,
    GraphKey,
    StepPlan,
    check_capturable,
    eager_break,
    running_step,
)
from graphexec.capture.lint import capture_lint
from graphexec.config import CaptureMode
from graphexec.engine.assemble import assemble

VALUES = torch.tensor([3, 0, 2])


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda: VALUES[0].item(), "_local_scalar_dense brings values to the host"),
        (lambda: int(VALUES[0]), "brings values to the host"),
        (lambda: "odd" if VALUES[0] else "even", "brings values to the host"),
        (lambda: VALUES.tolist(), r"Tensor.tolist brings values to the host"),
        (lambda: VALUES.numpy(), r"Tensor.numpy brings values to the host"),
        (lambda: VALUES.cpu(), r"Tensor.cpu brings values to the host"),
        (lambda: torch.equal(VALUES, VALUES), "brings values to the host"),
        (lambda: VALUES.nonzero(), "nonzero has a result whose size depends on values"),
        (lambda: VALUES[VALUES > 0], "index has a result whose size depends on values"),
        (lambda: VALUES.masked_select(VALUES > 0), "size depends on values"),
        (lambda: VALUES.unique(), "size depends on values"),
        (lambda: VALUES.repeat_interleave(VALUES), "size depends on values"),
        (lambda: torch.rand(3), "random numbers of torch's generators"),
        (lambda: torch.empty(3).normal_(), "random numbers of torch's generators"),
    ],
)
def test_what_a_capture_would_refuse_is_refused_with_its_line(operation: Callable[[], object], message: str) -> None:
    with capture_lint(), pytest.raises(CaptureError, match=f"{message}.*test_capture_lint.py"):
        operation()
    operation()  # outside of the lint it is nobody's business


def test_what_a_capture_takes_is_taken() -> None:
    with capture_lint():
        target = torch.zeros(4)
        target[:3].copy_(VALUES)
        target[VALUES] = 1.0
        target[target > 0] = 2.0  # a single value: masked_fill
        target.index_add_(0, VALUES.clamp(max=2), torch.ones(3))
        torch.where(target > 1, target, 0).sum()
        VALUES.repeat_interleave(VALUES, output_size=5)
    assert target.max() > 2


class Changed(Collatz):
    """The example with something more in its step."""

    def __init__(self, change: Callable[[Changed], None]) -> None:
        super().__init__(torch.device("cpu"))
        self.change = change

    def step(self, key: GraphKey) -> None:
        super().step(key)
        self.change(self)


def rebind(program: Changed) -> None:
    program.value = program.value + 0


def read(program: Changed) -> None:
    if program.value.sum() > 0:
        program.value.add_(0)


def test_the_example_can_be_captured() -> None:
    assert {key.phase for key in check_capturable(Collatz(torch.device("cpu")))} == {"decode"}


@pytest.mark.parametrize(
    ("change", "message"),
    [(read, "decode step, bucket 2.*brings values to the host.*in read"), (rebind, r"replaces state\(\)\[0\]")],
)
def test_a_leak_in_a_program_is_found_without_a_gpu(change: Callable[[Changed], None], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        check_capturable(Changed(change))


def test_the_decoder_can_be_captured(tmp_path: Path) -> None:
    config = EngineConfig(model="tiny-random", device="cpu", max_num_seqs=4, max_model_len=64, num_kv_blocks=40)
    parts = assemble(config, None)
    parts.backend.close()
    keys = check_capturable(parts.program)
    assert {key.phase for key in keys} == {"decode", "prefill", "mixed"}
    assert {key.variant for key in keys} == {"greedy", "sampled", "shaped", "logprobs"}


def test_the_hosts_part_of_a_step_may_read_what_it_likes() -> None:
    class Planned(Collatz):
        def before_launch(self, key: GraphKey, plan: StepPlan) -> None:
            self.plan = self.value.tolist()

    program = Planned(torch.device("cpu"))
    assert check_capturable(program)
    assert len(program.plan) == len(program.value)


@eager_break(optional=True)
def _look_at_the_plan() -> None:
    assert running_step().plan.variant == "plain"


@pytest.mark.parametrize("decode", [None, "full", "piecewise"])
def test_code_that_a_graph_would_hold_may_not_ask_for_the_plan(decode: CaptureMode | None) -> None:
    program = Changed(lambda program: _look_at_the_plan())
    config = BackendConfig(decode=decode)
    if decode == "piecewise":
        assert check_capturable(program, config)
    else:
        with pytest.raises(CaptureError, match="cannot be captured: running_step.*plan is that of one submitted step"):
            check_capturable(program, config)
