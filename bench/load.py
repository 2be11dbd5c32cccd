"""The load that engines are measured under: random prompts of one length, greedy, to a fixed number of tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from bench.method import random_prompts
from graphexec import Engine, RequestError, RequestOutput, SamplingParams

__all__ = ["Timed", "Window", "greedy", "random_prompts", "steady_decode", "timed_generate", "window"]

_SETTLING_STEPS = 8  # more than the deepest pipeline


def greedy(tokens: int) -> SamplingParams:
    """Exactly `tokens` output tokens, the likeliest each time."""
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


@dataclass(frozen=True)
class Timed:
    """A run of some prompts together.

    Attributes:
        seconds: from before the first request is added until the last token of the last one is there.
        decode_seconds: of them, those after the last prompt was computed: after the first step was collected in which
            every request has an output. None if there is no such step before the run's end.
        token_ids: what each prompt got, in their order.
    """

    seconds: float
    decode_seconds: float | None
    token_ids: list[list[int]]


def timed_generate(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> Timed:
    """Runs the prompts to their end in an engine that has nothing else to do, as `Engine.generate` does.

    The clock of `decode_seconds` starts with as many steps in flight in a short run as in a long one, and both end with
    none: the slope between them is of decode steps alone.

    Raises:
        RuntimeError: a request did not get its tokens.
    """
    params = greedy(tokens)
    last: dict[str, RequestOutput] = {}
    all_decode: float | None = None
    started = time.perf_counter()
    try:
        request_ids = [engine.add_request(prompt, params) for prompt in prompts]
    except RequestError as refusal:
        _run_out(engine)
        raise RuntimeError(f"A request was refused: {refusal}") from refusal
    while engine.has_unfinished():
        outputs = engine.step()
        if all_decode is None and _go_on_together(outputs, len(prompts)):
            all_decode = time.perf_counter()
        for output in outputs:
            if output.finished:
                last[output.request_id] = output
    ended = time.perf_counter()
    given = [last[request_id].token_ids for request_id in request_ids]
    for request_id, ids in zip(request_ids, given, strict=True):
        if len(ids) != tokens:
            short = last[request_id]
            raise RuntimeError(f"A request ended after {len(ids)} of {tokens} tokens: {short.error or short}.")
    return Timed(ended - started, None if all_decode is None else ended - all_decode, given)


def _go_on_together(outputs: Sequence[RequestOutput], batch: int) -> bool:
    """Whether these are one step's outputs for every request, and more steps are to come.

    The call that ends a run may collect several steps: as many outputs then need not be of one step, nor of all.
    """
    one_each = len(outputs) == batch == len({each.request_id for each in outputs})
    return one_each and not all(each.finished for each in outputs)


def _run_out(engine: Engine) -> None:
    while engine.has_unfinished():
        engine.step()


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
        _run_out(engine)


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
