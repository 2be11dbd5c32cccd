"""Measures a start in fresh processes, by compile mode: with empty compile caches (cold) and with full ones (warm).

    python -m bench.startup --shape qwen3-0.6b --compile layer,model,off --json PATH      (from the repository's root)

Every start is a process of its own: import, load, compile, size the KV cache, capture the whole ladder ("ready"), then
one request's first token. Then it times decode steps, so that one file says what a mode costs and what it gives.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from bench.load import timed_generate
from bench.method import STARTED, TOKENS, integers, measure_slope, random_prompts, seconds_since_start
from bench.provenance import provenance, write_results
from bench.shapes import SHAPES, engine_config, write_config
from graphexec import BackendConfig, Engine
from graphexec.config import CompileMode, Device

__all__ = ["METHOD", "Start", "starts"]

Row = dict[str, object]

METHOD = {
    "cold": "TORCHINDUCTOR_CACHE_DIR, TRITON_CACHE_DIR and CUDA_CACHE_PATH are new, empty folders; warm: those that "
    "the cold start of the same mode has filled. Python's bytecode (in a folder of PYTHONPYCACHEPREFIX, since some "
    "machines keep none) and the files of the libraries are cached before the first start, by a process that only "
    "imports.",
    "imported_s": "from just before the process is started to the end of its imports.",
    "ready_s": "to an engine that has captured the whole ladder for every sampler variant.",
    "first_token_s": "to the first token of a first request, on the host.",
    "compile_s": "seconds that torch spent in torch.compile, as it counts them itself; Triton's own kernels excluded.",
    "decode_step_ms": "as in bench.decode, over the engine's own ladder; in the warm start.",
    "saved_s": "cold ready_s - warm ready_s of the same mode: what the compile caches save.",
}
_CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "cuda"}
_IMPORTS = (
    "import torch._inductor.compile_fx, torch._inductor.async_compile, torch._inductor.scheduler, graphexec.engine\n"
    "import transformers.models.qwen3.modeling_qwen3, transformers.models.auto.modeling_auto"
)


@dataclass(frozen=True)
class Start:
    """One start to measure; travels to its process as command-line words.

    Attributes:
        batches: sizes to time decode steps at; none for a start alone.
        verify: whether the warm-up compares every graph with the eager step.
    """

    shape: str
    compile: CompileMode
    device: Device = "auto"
    batches: tuple[int, ...] = ()
    tokens: tuple[int, int] = TOKENS
    repeats: int = 3
    verify: bool | None = None

    def words(self) -> list[str]:
        words = ["--inside", "--shape", self.shape, "--compile", self.compile, "--device", self.device]
        words += ["--tokens", ",".join(map(str, self.tokens)), "--repeats", str(self.repeats)]
        words += ["--batch", ",".join(map(str, self.batches))] if self.batches else ["--no-steps"]
        return words if self.verify is None else [*words, "--verify" if self.verify else "--no-verify"]

    def run(self) -> Row:
        """Starts an engine in this process. The caller has noted in the environment when the process was started."""
        imported = seconds_since_start()
        shape = SHAPES[self.shape]
        with tempfile.TemporaryDirectory() as folder:
            config = engine_config(
                shape,
                write_config(shape, Path(folder) / shape.name),
                BackendConfig(verify=self.verify),
                device=self.device,
                compile=self.compile,
            ).model_copy(update={"num_kv_blocks": None})  # measured, as it is by default: that is part of a start
            with Engine(config) as engine:
                ready = seconds_since_start()
                timed_generate(engine, random_prompts(1, shape.prompt_tokens, shape.vocab_size), 1)
                row: Row = {"imported_s": imported, "ready_s": ready, "first_token_s": seconds_since_start()}
                row |= {
                    "stages_s": engine.startup_s,
                    "compile_s": _compile_seconds(),
                    "graphs": len(engine.manifest.graphs),
                    "warmup_s": sum(graph.warmup_s for graph in engine.manifest.graphs),
                    "capture_s": engine.manifest.capture_s,
                    "pool_mib": engine.manifest.pool_bytes / 2**20,
                }
                row["steps"] = [self._step(engine, batch) for batch in self.batches]
        return row

    def _step(self, engine: Engine, batch: int) -> Row:
        shape = SHAPES[self.shape]
        prompts = random_prompts(batch, shape.prompt_tokens, shape.vocab_size)
        slope = measure_slope(lambda tokens: timed_generate(engine, prompts, tokens), self.tokens, self.repeats)
        return {"batch": batch, "decode_step_ms": slope.step_ms, "samples": slope.samples()}


def starts(
    start: Start, cold_starts: int, warm_starts: int, limit_s: float, environment: Mapping[str, str] | None = None
) -> list[Row]:
    """Rows of a mode's cold starts, each with caches of its own, and then its warm ones, over the last of these.

    `environment` is that of the processes, None for this one's.

    Raises:
        RuntimeError: a process failed.
        subprocess.TimeoutExpired: it took more than `limit_s` seconds.
    """
    alone = Start(start.shape, start.compile, start.device, verify=start.verify)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(cold_starts):
            caches = Path(folder) / str(index)
            rows.append({"compile": start.compile, "cache": "cold", **_fresh(alone, caches, limit_s, environment)})
        for index in range(warm_starts):
            last = start if index == warm_starts - 1 else alone
            rows.append({"compile": start.compile, "cache": "warm", **_fresh(last, caches, limit_s, environment)})
    return rows


def _fresh(start: Start, caches: Path, limit_s: float, environment: Mapping[str, str] | None) -> Row:
    own = os.environ if environment is None else environment
    environment = {**own, **{name: str(caches / folder) for name, folder in _CACHES.items()}}
    command = [sys.executable, "-m", "bench.startup", *start.words()]
    began = time.time()
    done = subprocess.run(
        command, env=environment | {STARTED: repr(began)}, stdout=subprocess.PIPE, text=True, timeout=limit_s
    )
    if done.returncode != 0:
        raise RuntimeError(f"The process of a start with compile={start.compile} ended with code {done.returncode}.")
    row = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(row, dict)
    return row


def _compile_seconds() -> float | None:
    """torch's own account of its compilations; None where it keeps none."""
    from torch._dynamo import utils

    return getattr(utils, "calculate_time_spent", dict)().get("total_wall_time")


def measure(given: argparse.Namespace, command: list[str]) -> Row:
    """Every mode, cold and warm. A mode that fails is recorded, and the rest goes on."""
    device = torch.device("cuda" if given.device != "cpu" and torch.cuda.is_available() else "cpu")
    rows: list[Row] = []
    errors: list[Row] = []
    skipped: list[str] = []
    began = time.monotonic()
    results = provenance(command, device) | {
        "system": "graphexec",
        "shape": given.shape,
        "method": METHOD,
        "startup": rows,
        "skipped": skipped,
        "errors": errors,
    }
    with _cached_bytecode() as environment:
        for mode in given.compile:
            if given.minutes is not None and time.monotonic() - began > given.minutes * 60:
                skipped.append(f"compile={mode}")
                continue
            print(f"[{time.monotonic() - began:6.1f} s] compile={mode}", file=sys.stderr, flush=True)
            start = Start(given.shape, mode, given.device, given.batch, given.tokens, given.repeats, given.verify)
            try:
                rows += starts(start, given.cold, given.warm, given.limit, environment)
            except (RuntimeError, subprocess.TimeoutExpired) as failure:
                errors.append({"part": f"compile={mode}", "error": str(failure)})
            results["saved_s"] = _saved(rows)
            if given.json is not None:
                write_results(given.json, results)
    return results


@contextmanager
def _cached_bytecode() -> Iterator[dict[str, str]]:
    """The environment of processes that find the bytecode of what they import."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as folder:
        environment["PYTHONPYCACHEPREFIX"] = folder
        subprocess.run([sys.executable, "-c", _IMPORTS], check=True, env=environment)
        yield environment


def _saved(rows: list[Row]) -> dict[str, float]:
    def ready(mode: object, cache: str) -> float:
        return statistics.median(
            float(str(row["ready_s"])) for row in rows if (row["compile"], row["cache"]) == (mode, cache)
        )

    return {
        str(mode): ready(mode, "cold") - ready(mode, "warm") for mode in dict.fromkeys(row["compile"] for row in rows)
    }


def _modes(text: str) -> tuple[str, ...]:
    modes = tuple(text.split(","))
    unknown = [mode for mode in modes if mode not in get_args(CompileMode)]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(get_args(CompileMode))}")
    return modes


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.startup", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--compile", type=_modes, default=("layer", "model", "off"))
    parser.add_argument("--device", choices=get_args(Device), default="auto")
    parser.add_argument("--batch", type=integers, default=(1, 64, 256), help="sizes to time decode steps at")
    parser.add_argument("--no-steps", dest="batch", action="store_const", const=(), help="time no decode steps")
    parser.add_argument("--tokens", type=integers, default=TOKENS, help="of a short and of a long run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each length")
    parser.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, help="compare every graph with the eager step"
    )
    parser.add_argument("--cold", type=int, default=1, help="cold starts of each mode")
    parser.add_argument("--warm", type=int, default=1, help="warm starts of each mode")
    parser.add_argument("--limit", type=float, default=180, help="seconds for one process")
    parser.add_argument("--minutes", type=float, help="after so long no further mode is begun")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.cold < 1 or given.warm < 1:
        parser.error("a warm start needs the caches of a cold one: --cold and --warm are at least 1")
    return given


def main(arguments: list[str]) -> int:
    given = _parse(arguments)
    if given.inside:
        start = Start(
            given.shape, given.compile[0], given.device, given.batch, given.tokens, given.repeats, given.verify
        )
        print(json.dumps(start.run()))
        return 0
    results = measure(given, ["python", "-m", "bench.startup", *arguments])
    print(table(results))
    return 1 if results["errors"] else 0


def table(results: Row) -> str:
    """The figures of a results file as text, a start in each line."""
    rows = results["startup"]
    assert isinstance(rows, list)
    names = ("imported_s", "ready_s", "first_token_s", "compile_s", "warmup_s", "capture_s")
    lines = []
    for row in rows:
        figures = ", ".join(f"{name} {row[name]:.3g}" for name in names if row[name] is not None)
        steps = "".join(f"; batch {step['batch']}: {step['decode_step_ms']:.4g} ms" for step in row["steps"])
        lines.append(f"{row['compile']}, {row['cache']}: {figures}{steps}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
