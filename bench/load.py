"""The load that engines are measured under: random prompts of one length, greedy, to a fixed number of tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from bench.method import random_prompts
from graphexec import Engine, SamplingParams

__all__ = ["Window", "greedy", "random_prompts", "steady_decode", "timed_generate", "window"]

_SETTLING_STEPS = 8  # more than the deepest pipeline


def greedy(tokens: int) -> SamplingParams:
    """Exactly `tokens` output tokens, the likeliest each time."""
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def timed_generate(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, list[list[int]]]:
    """Seconds that `generate` took, and what it gave.

    Raises:
        RuntimeError: a request did not get its tokens.
    """
    started = time.perf_counter()
    outputs = engine.generate(list(prompts), greedy(tokens))
    seconds = time.perf_counter() - started
    given = [output.token_ids for output in outputs]
    short = next((output for output, ids in zip(outputs, given, strict=True) if len(ids) != tokens), None)
    if short is not None:
        raise RuntimeError(f"A request ended after {len(short.token_ids)} of {tokens} tokens: {short.error or short}.")
    return seconds, given


@contextmanager
def steady_decode(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> Iterator[None]:
    """Within the block every request decodes in every step; afterwards they run to their end.

    The block may take `tokens` steps less those of the prompts and `_SETTLING_STEPS`.

    Raises:
        RuntimeError: the requests ended before all of them decoded.
    """
    params = greedy(tokens)
    for prompt in prompts:
        engine.add_request(list(prompt), params)
    while len(engine.step()) < len(prompts) and engine.has_unfinished():
        pass  # until a step is collected that has outputs for all: no prompt is left
    for _ in range(_SETTLING_STEPS):
        outputs = engine.step()
    if len(outputs) < len(prompts):
        raise RuntimeError(f"{len(prompts)} requests never decoded together for long: more tokens are needed.")
    try:
        yield
    finally:
        while engine.has_unfinished():
            engine.step()


@dataclass(frozen=True)
class Window:
    """Some steps of steady decode.

    Attributes:
        steps: how many.
        host_us: host time a step on the step loop's thread, waits excluded, microseconds (`Engine.stats`).
        wait_us: time a step that the loop waited for the device, microseconds.
        step_us: time from step to step, microseconds.
    """

    steps: int
    host_us: float
    wait_us: float
    step_us: float


def window(engine: Engine, batch: int, steps: int) -> Window:
    """Measures `steps` steps between two points of a run in which `batch` requests decode.

    Raises:
        RuntimeError: they were not steps of that kind.
    """
    before, started = engine.stats(), time.perf_counter()
    for _ in range(steps):
        engine.step()
    seconds, after = time.perf_counter() - started, engine.stats()
    if after.steps - before.steps != steps or after.real_slots - before.real_slots != batch * steps:
        raise RuntimeError(
            f"{after.steps - before.steps} steps ran {after.real_slots - before.real_slots} slots in a window that was "
            f"to have {steps} steps of {batch}: the requests are too short for it."
        )
    return Window(
        steps,
        (after.host_us - before.host_us) / steps,
        (after.wait_us - before.wait_us) / steps,
        seconds * 1e6 / steps,
    )
