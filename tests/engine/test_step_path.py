"""The step path: the host touches no device tensor, and waits once for each collected step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graphexec import BackendConfig, Engine, EngineConfig, SamplingParams
from graphexec.runtime import CpuRuntime, Event
from graphexec.runtime.cpu import CpuEvent


class HostOperations(TorchDispatchMode):
    """Lists the tensor operations of this thread. The device's run on the workers, so the host's list stays empty."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class CountingEvent(CpuEvent):
    waits = 0

    def wait(self, timeout_s: float) -> bool:
        type(self).waits += 1
        assert 0 < timeout_s < 1000, "a wait must be bounded"
        return super().wait(timeout_s)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    def counting_event(self: CpuRuntime) -> Event:
        return CountingEvent()

    monkeypatch.setattr(CpuRuntime, "event", counting_event)
    backend = BackendConfig(verify=False)
    with Engine(EngineConfig(device="cpu", max_num_seqs=4, max_model_len=64, backend=backend)) as engine:
        yield engine


# Views of pinned and device memory that copies are addressed by; they read nothing.
VIEWS = {"aten.select.int", "aten.slice.Tensor", "aten.alias.default", "aten.detach.default"}


def test_the_host_computes_and_reads_no_tensor_between_steps(engine: Engine) -> None:
    for length in (3, 9, 4, 30, 2):
        engine.add_request([5] * length, SamplingParams(max_tokens=12, temperature=0.5, logprobs=2))
    with HostOperations() as operations:
        while engine.has_unfinished():
            engine.step()
    assert set(operations.seen) <= VIEWS


def test_a_tensor_read_on_the_host_would_be_seen(engine: Engine) -> None:
    with HostOperations() as operations:
        torch.ones(1).item()
    assert not set(operations.seen) <= VIEWS


@pytest.mark.parametrize("prompts", [1, 3, 6])
def test_each_collected_step_costs_one_bounded_wait(engine: Engine, prompts: int) -> None:
    before = CountingEvent.waits
    engine.generate([[5 + index] * 4 for index in range(prompts)], SamplingParams(max_tokens=10, ignore_eos=True))
    assert CountingEvent.waits - before == engine.stats().steps
