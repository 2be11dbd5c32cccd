"""Measures a peer as bench.decode measures graphexec, and writes the same shape of file.

A peer is handed prompts and gives tokens; everything between is in its step, as it is in graphexec's.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from bench.method import (
    BATCHES,
    TOKENS,
    Slope,
    integers,
    lengths_for,
    measure_slope,
    random_prompts,
    seconds_since_start,
)
from bench.provenance import provenance, write_results
from bench.shapes import SHAPES, Shape
from bench.trace import device_spans, kernel_ns

__all__ = ["Load", "Peer", "Results", "arguments_for", "load_of", "measure_peer", "run_peer"]

Results = dict[str, object]

_METHOD = {
    "decode_step_ms": "(median seconds of the long runs - median of the short ones) / difference in tokens. A run "
    "takes all prompts at once and ends when the last token of the last request is on the host. Greedy; stop tokens "
    "are ignored.",
    "busy_ms": "time a decode step in which at least one kernel runs: slope between two traced runs.",
    "startup_s": "from the start of the process, imports included, to a peer that takes requests.",
}


@dataclass(frozen=True)
class Load:
    """What a peer is measured under.

    Attributes:
        batches: requests that decode together.
        prompts: lengths of the prompts, tokens.
        tokens: output tokens of a short and of a long run, at least; see `tokens_for`.
        repeats: runs of each length.
        traced: whether to trace two runs for `busy_ms`; needs a GPU.
        device: "cpu" or "cuda".
        minutes: after so long no further row is begun.
    """

    shape: Shape
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    tokens: tuple[int, int] = TOKENS
    repeats: int = 3
    traced: bool = False
    device: str = "cuda"
    minutes: float | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and its output."""
        return max(prompt + self.tokens_for(batch, prompt)[1] for prompt in self.prompts for batch in self.batches)

    def tokens_for(self, batch: int, prompt: int) -> tuple[int, int]:
        """Output tokens of a short and of a long run with so many prompts of this length."""
        return lengths_for(self.tokens, batch, prompt, self.shape.max_num_batched_tokens)


class Peer(Protocol):
    """A system that generates tokens.

    Attributes:
        name: with its version.
        handicap: what keeps it from its best on this machine or in this load, in a sentence; None if nothing does.
        settings: what was configured, for the file.
    """

    name: str
    handicap: str | None
    settings: dict[str, object]

    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """Exactly `tokens` greedy tokens for each prompt, in order, on the host."""


def arguments_for(module: str, description: str) -> argparse.ArgumentParser:
    """The words that every peer's command line takes."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--batch", type=integers, default=BATCHES, help="requests that decode together")
    parser.add_argument("--prompt", type=integers, default=(), help="tokens of the prompts; the shape's own by default")
    parser.add_argument("--tokens", type=integers, default=TOKENS, help="of a short and of a long run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each length")
    parser.add_argument("--traced", action="store_true", help="trace two runs more, for busy_ms")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--minutes", type=float, help="after so long no further row is begun")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser


def load_of(given: argparse.Namespace) -> Load:
    shape = SHAPES[given.shape]
    prompts = given.prompt or (shape.prompt_tokens,)
    names = ("tokens", "repeats", "traced", "device", "minutes")
    return Load(shape, given.batch, prompts, **{name: getattr(given, name) for name in names})


def run_peer(load: Load, make: Callable[[Load], Peer], command: list[str], path: Path | None) -> int:
    """Measures, writes the file after every row, prints the rows; the exit code."""

    def save(results: Results) -> None:
        if path is not None:
            write_results(path, results)

    results = measure_peer(load, make, command, save)
    rows, errors = results["decode"], results["errors"]
    assert isinstance(rows, list)
    for row in rows:
        load_of_row = f"batch {row['batch']}, prompts of {row['prompt_tokens']}"
        print(f"{results['system']}: {load_of_row}: {row['decode_step_ms']:.4g} ms")
    return 1 if errors or not rows else 0


def measure_peer(
    load: Load, make: Callable[[Load], Peer], command: list[str], save: Callable[[Results], None]
) -> Results:
    """Starts the peer and measures every row. One that fails is recorded, and the rest goes on."""
    began = time.perf_counter()
    peer = make(load)
    rows: list[Results] = []
    skipped: list[str] = []
    errors: list[Results] = []
    results = provenance(command, torch.device(load.device)) | {
        "system": peer.name,
        "handicap": peer.handicap,
        "shape": load.shape.name,
        "plan": asdict(load) | {"shape": load.shape.name},
        "settings": peer.settings,
        "method": _METHOD,
        "startup_s": seconds_since_start(),
        "decode": rows,
        "skipped": skipped,
        "errors": errors,
    }
    save(results)
    for prompt in load.prompts:
        for batch in load.batches:
            name = f"batch {batch}, prompts of {prompt}"
            if load.minutes is not None and time.perf_counter() - began > load.minutes * 60:
                skipped.append(name)
            else:
                print(f"[{time.perf_counter() - began:6.1f} s] {peer.name}: {name}", file=sys.stderr, flush=True)
                try:
                    rows.append(_row(peer, load, batch, prompt))
                except Exception as failure:
                    traceback.print_exc()
                    errors.append({"part": name, "error": f"{type(failure).__name__}: {failure}"})
            save(results)
    results["seconds"] = time.perf_counter() - began
    save(results)
    return results


def _row(peer: Peer, load: Load, batch: int, prompt: int) -> Results:
    prompts = random_prompts(batch, prompt, load.shape.vocab_size)

    def run(tokens: int) -> None:
        given = peer.generate(prompts, tokens)
        wrong = [len(ids) for ids in given if len(ids) != tokens]
        if len(given) != batch or wrong:
            raise RuntimeError(
                f"{len(given)} of {batch} requests have outputs; lengths other than {tokens}: {wrong[:4]}."
            )

    tokens = load.tokens_for(batch, prompt)
    slope = measure_slope(run, tokens, load.repeats)
    row: Results = {
        "batch": batch,
        "prompt_tokens": prompt,
        "tokens": tokens,
        "decode_step_ms": slope.step_ms,
        "tokens_per_s": batch / slope.step_ms * 1e3,
        "samples": slope.samples(),
    }
    if load.traced:
        lengths = tokens[0], (tokens[0] + tokens[1]) // 2  # the trace of a long run is long, too
        short, long = (kernel_ns(device_spans(lambda tokens=tokens: run(tokens))) / 1e9 for tokens in lengths)
        row["busy_ms"] = Slope(lengths, [short], [long]).step_ms
    return row
