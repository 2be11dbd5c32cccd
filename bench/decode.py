"""Measures the whole engine in steady decode: step time, host time, overhead over bare replays, bubbles, captures.

    python -m bench.decode --shape qwen3-0.6b --batch 1,64,256 --depth 0,1 --json PATH     (from the repository's root)
    python -m bench.decode --prompt 1000,8000 --kv-gib 75 --depth 1                        long contexts

Random weights, random prompts, greedy; the tokens of every timed run are compared with an eager run that is padded
alike. One model serves all measurements; each batch, depth and prompt length gets a backend of its own, with one decode
bucket and one prefill bucket. What fails is recorded, and the rest goes on; the file is rewritten after every part.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from bench.load import random_prompts, steady_decode, timed_generate, window
from bench.method import Slope
from bench.plan import Plan, parse
from bench.provenance import provenance, write_results
from bench.replay import Contexts, hand_written_loop, inside, replay_back_to_back
from bench.report import METHOD, Row, capture_summary, succeeded, table
from bench.shapes import engine_config, write_config
from bench.trace import device_spans, step_gaps
from graphexec import BackendConfig, Engine, EngineConfig, create_backend, create_runtime
from graphexec.engine.assemble import Assembly, assemble

__all__ = ["measure"]


Save = Callable[[Row], None]


def measure(plan: Plan, command: list[str], save: Save = lambda results: None) -> Row:
    """Runs the plan and returns what goes into the file; `save` gets the same, as far as it is, after each part."""
    run = _Run(plan, save)
    with tempfile.TemporaryDirectory() as folder:
        run.everything(Path(folder) / plan.shape.name, command)
    return run.results


class _Run:
    """The parts of a measurement, over one loaded model."""

    def __init__(self, plan: Plan, save: Save) -> None:
        self._plan = plan
        self._save = save
        self._started = time.perf_counter()
        self._rows: list[Row] = []
        self._skipped: list[str] = plan.too_large()
        self._errors: list[Row] = []
        self._eager: dict[tuple[int, int], list[list[int]]] = {}
        self._eager_rows: list[Row] = []
        self._captures: Row = {}
        self.results: Row = {
            "system": "graphexec",
            "handicap": None,
            "decode": self._rows,
            "eager": self._eager_rows,
            "capture": self._captures,
            "skipped": self._skipped,
            "errors": self._errors,
        }

    def everything(self, folder: Path, command: list[str]) -> None:
        plan = self._plan
        largest = max(plan.batches)
        first = BackendConfig(name="eager", capture_sizes=(largest,))
        self._config = engine_config(
            plan.shape,
            write_config(plan.shape, folder),
            first,
            largest_batch=largest,
            device=plan.device,
            compile=plan.compile,
            max_model_len=plan.max_model_len,
            kv_tokens=max(plan.kv_tokens(*load) for load in plan.loads()),
        )
        started = time.perf_counter()
        self._parts: Assembly = assemble(self._config, None)  # loads, and compiles by running steps eagerly
        self._parts.backend.close()
        resolved = self._parts.resolved
        self._is_cuda = resolved.device.type == "cuda"
        self.results |= provenance(command, resolved.device) | {
            "shape": plan.shape.name,
            "plan": plan.as_dict(),
            "engine": self._config.model_dump(mode="json", exclude={"backend", "model"})
            | {"compile": resolved.compile, "dtype": str(resolved.dtype)},
            "method": METHOD,
            "load_and_compile_s": time.perf_counter() - started,
        }
        self._save(self.results)
        for depth in plan.depths:
            for batch, prompt in plan.loads():
                part = partial(self._decode, batch, prompt, depth)
                self._try(f"batch {batch}, prompts of {prompt}, depth {depth}", part)
            if plan.captures and depth == plan.depths[0]:  # before the other depths, which can best be spared
                for name, verify in (("first", False), ("again", False), ("verified", True)):
                    self._try(f"capture of the ladder, {name}", partial(self._capture, name, verify))
        self.results["seconds"] = time.perf_counter() - self._started
        self._save(self.results)

    def _try(self, name: str, part: Callable[[], None]) -> None:
        """Runs a part unless the time is up; one that fails is recorded, and the rest goes on."""
        minutes = self._plan.minutes
        if minutes is not None and time.perf_counter() - self._started > minutes * 60:
            self._skipped.append(name)
        else:
            print(f"[{time.perf_counter() - self._started:6.1f} s] {name}", file=sys.stderr, flush=True)
            try:
                part()
            except Exception as failure:
                traceback.print_exc()
                self._errors.append({"part": name, "error": f"{type(failure).__name__}: {failure}"})
        self._save(self.results)

    @contextmanager
    def _engine(self, name: str, batch: int, depth: int) -> Iterator[Engine]:
        """An engine over the loaded model with one decode bucket; prompts run eagerly, padded alike."""
        backend = BackendConfig(
            name=name,
            capture_sizes=(batch,),
            prefill_sizes=(self._parts.limits.max_rows,),
            prefill="off",
            verify=False,
        )
        config = self._config.model_copy(update={"overlap_depth": depth, "backend": backend})
        with _engine_over(self._parts, config) as engine:
            yield engine
            missed = engine.stats().eager_steps.get("no graph", 0)
            if missed:
                raise RuntimeError(f"{missed} steps had no graph in a measurement of graphs.")

    def _decode(self, batch: int, prompt: int, depth: int) -> None:
        plan = self._plan
        short, long = plan.tokens_for(batch, prompt)
        prompts = random_prompts(batch, prompt, plan.shape.vocab_size)
        expected = self._eager_tokens(batch, prompt, prompts)
        contexts = Contexts(batch, prompt + short - 1, prompt + long)
        row: Row = {"batch": batch, "prompt_tokens": prompt, "tokens": (short, long), "depth": depth}
        self._rows.append(row)
        with self._engine("cudagraph", batch, depth) as engine:
            timed_generate(engine, prompts, max(short // 2, 2))  # warm
            whole: tuple[list[float], list[float]] = ([], [])
            phases: tuple[list[float | None], list[float | None]] = ([], [])
            bare: list[float] = []
            differing: list[int] = []
            for _ in range(plan.repeats):
                for tokens, seconds, decode_seconds in zip((short, long), whole, phases, strict=True):
                    timed = timed_generate(engine, prompts, tokens)
                    seconds.append(timed.seconds)
                    decode_seconds.append(timed.decode_seconds)
                    differing.append(_differing(timed.token_ids, expected))
                bare.append(replay_back_to_back(inside(engine), contexts, long - short)[0])
            slope, phase = Slope((short, long), *whole), _phase_slope((short, long), *phases)
            bare_ms = statistics.median(bare)
            row |= {
                "decode_step_ms": slope.step_ms,
                "bare_replay_ms": bare_ms,
                "overhead": slope.step_ms / bare_ms,
                "tokens_per_s": batch / slope.step_ms * 1e3,
                "runs_with_other_tokens_than_eager": sum(count > 0 for count in differing),
            }
            samples: Row = {**slope.samples()}
            if phase is not None:
                row |= {"decode_phase_ms": phase.step_ms, "decode_phase_overhead": phase.step_ms / bare_ms}
                samples |= phase.samples("decode")
            row["samples"] = samples | {"bare_replay_ms": bare, "requests_with_other_tokens_than_eager": differing}
            self._save(self.results)
            load = f"batch {batch}, prompts of {prompt}, depth {depth}"
            self._try(f"windows of {load}", partial(self._windows, row, engine, prompts))
            if self._is_cuda and plan.traced_steps:
                self._try(f"trace of {load}", partial(self._trace, row, engine, prompts))
            if self._is_cuda and depth == plan.depths[0]:
                self._try(f"hand-written loop, {load}", partial(self._hand_written, row, engine, contexts))

    def _eager_tokens(self, batch: int, prompt: int, prompts: list[list[int]]) -> list[list[int]]:
        """What the timed runs must give; the eager backend's own step comes out on the way."""
        if (batch, prompt) not in self._eager:
            short, long = self._plan.tokens_for(batch, prompt)
            with self._engine("eager", batch, depth=1) as engine:
                timed_generate(engine, prompts, 2)
                runs = [timed_generate(engine, prompts, tokens) for tokens in (short, long)]
            self._eager[batch, prompt] = runs[1].token_ids
            slope = Slope((short, long), *([run.seconds] for run in runs))
            phase = _phase_slope((short, long), *([run.decode_seconds] for run in runs))
            row: Row = {"batch": batch, "prompt_tokens": prompt, "decode_step_ms": slope.step_ms}
            if phase is not None:
                row["decode_phase_ms"] = phase.step_ms
            row["samples"] = slope.samples() | (phase.samples("decode") if phase is not None else {})
            self._eager_rows.append(row)
        return self._eager[batch, prompt]

    def _windows(self, row: Row, engine: Engine, prompts: list[list[int]]) -> None:
        plan = self._plan
        steps = (plan.tokens[1] - plan.tokens[0]) // (2 * plan.repeats)
        with steady_decode(engine, prompts, plan.tokens_for(len(prompts), len(prompts[0]))[1]):
            windows = [window(engine, len(prompts), steps) for _ in range(plan.repeats)]
        for name in ("host_us", "wait_us", "step_us"):
            row[name] = statistics.median(getattr(each, name) for each in windows)
        row["windows"] = [asdict(each) for each in windows]

    def _trace(self, row: Row, engine: Engine, prompts: list[list[int]]) -> None:
        plan = self._plan
        count = min(plan.traced_steps, (plan.tokens[1] - plan.tokens[0]) // 2)  # those in which every request decodes

        def steps() -> None:
            for _ in range(count):
                engine.step()

        with steady_decode(engine, prompts, plan.tokens_for(len(prompts), len(prompts[0]))[1]):
            spans = device_spans(steps)
        row |= step_gaps(spans).as_dict()

    def _hand_written(self, row: Row, engine: Engine, contexts: Contexts) -> None:
        parts, steps = inside(engine), self._plan.tokens[1] - self._plan.tokens[0]
        replayed = replay_back_to_back(parts, contexts, steps)[1]  # over the KV that the loops find, too
        loops = [hand_written_loop(parts, contexts, steps) for _ in range(self._plan.repeats)]
        row["hand_written_samples_ms"] = [milliseconds for milliseconds, _ in loops]
        row["hand_written_ms"] = statistics.median(milliseconds for milliseconds, _ in loops)
        row["hand_written_tokens_are_the_replays"] = all(torch.equal(tokens, replayed) for _, tokens in loops)

    def _capture(self, name: str, verify: bool) -> None:
        """Warms a backend up for the whole ladder, and throws it away."""
        if self._is_cuda:
            torch.cuda.empty_cache()
        runtime, program = create_runtime(self._parts.resolved.device), self._parts.program
        backend = create_backend(BackendConfig(verify=verify, prefill="off", variants=program.variants), runtime)
        try:
            backend.prepare(program)
            used = runtime.used()
            started = time.perf_counter()
            manifest = backend.warmup()
            seconds = time.perf_counter() - started
            taken_mib = (runtime.used() - used) / 2**20
        finally:
            backend.close()
        self._captures[name] = {"wall_s": seconds, "device_mib": taken_mib, **capture_summary(manifest)}


@contextmanager
def _engine_over(parts: Assembly, config: EngineConfig) -> Iterator[Engine]:
    """An engine over the loaded model of `parts` with a new backend. The backend before it must be closed."""
    executor = create_backend(config.backend, create_runtime(parts.resolved.device))
    try:
        executor.prepare(parts.program)
        manifest = executor.warmup()
        parts = replace(parts, backend=executor, manifest=manifest)
        engine = Engine(config, parts=parts)
    except BaseException:
        executor.close()
        raise
    with engine:
        yield engine


def _phase_slope(
    tokens: tuple[int, int], short_s: Sequence[float | None], long_s: Sequence[float | None]
) -> Slope | None:
    """The slope of `decode_seconds`; None where those of a run are not known."""
    known = ([seconds for seconds in each if seconds is not None] for each in (short_s, long_s))
    return None if None in (*short_s, *long_s) else Slope(tokens, *known)


def _differing(given: list[list[int]], expected: list[list[int]]) -> int:
    """Requests whose tokens are not the beginning of those expected."""
    return sum(own != other[: len(own)] for own, other in zip(given, expected, strict=True))


def main(arguments: list[str]) -> int:
    plan, path = parse(arguments, __doc__.splitlines()[0])

    def save(results: Row) -> None:
        if path is not None:
            write_results(path, results)

    results = measure(plan, ["python", "-m", "bench.decode", *arguments], save)
    print(table(results))
    return 0 if succeeded(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
