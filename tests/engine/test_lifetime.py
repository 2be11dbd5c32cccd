"""What becomes of an engine that nobody closes: the interpreter ends cleanly, and memory comes back."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from graphexec import SamplingParams
from tests.support.scripts import run_script
from tests.support.symbolic_program import symbolic_engine


@pytest.mark.parametrize(("name", "depth"), [("eager", 1), ("cudagraph", 3)])
def test_a_script_that_ends_with_steps_in_flight_ends_cleanly(name: str, depth: int) -> None:
    done = run_script(device="cpu", name=name, depth=depth)
    assert done.returncode == 0, done.stderr
    assert f"steps in flight: {depth}" in done.stdout


def test_an_engine_that_is_dropped_in_the_middle_of_its_requests_leaves_no_thread_and_nothing_frozen() -> None:
    threads, frozen, thresholds = threading.active_count(), gc.get_freeze_count(), gc.get_threshold()
    engine = symbolic_engine(depth=2)
    engine.add_request([5], SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
    for _ in range(4):
        engine.step()
    kept = weakref.ref(engine)
    del engine
    gc.collect()
    assert kept() is None
    assert threading.active_count() == threads
    assert (gc.get_freeze_count(), gc.get_threshold()) == (frozen, thresholds)
