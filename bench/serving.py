"""Serving: requests that come when they come, of varied lengths, and how long their users wait.

    python -m bench.serving --shape qwen3-0.6b --rate 10,40,80 --at-once 512 --json PATH

Open loop: arrivals are drawn beforehand with a seed, and do not wait for the system. The time to the first token counts
from the arrival, so waiting in a queue is in it. `bench.peers.vllm.serving` puts vLLM under the same arrivals; nothing
of graphexec is imported here before it is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from bench.method import integers, seconds_since_start
from bench.provenance import provenance, write_results
from bench.shapes import SHAPES, Shape, engine_config, write_config

if TYPE_CHECKING:
    from graphexec import Engine

__all__ = ["Arrival", "Graphexec", "Server", "arguments_for", "draw_arrivals", "run", "serve"]

Record = dict[str, object]

PROMPTS = (16, 300, 2000)
"""Tokens of the shortest, the median and the longest prompt; log-normal between."""
OUTPUTS = (8, 100, 500)
SPREAD = 0.9
"""Standard deviation of the logarithms."""
LONGEST = PROMPTS[-1] + OUTPUTS[-1]
SLOTS = 256
SECONDS = 8.0
"""Length of a run in which requests arrive."""
HIGHEST_TTFT_S = 1.0
"""A system is loaded beyond its capacity when the 99th percentile of the time to the first token exceeds this."""


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes, seconds from the start, and what it asks for."""

    at_s: float
    prompt: list[int]
    tokens: int


class Server(Protocol):
    """A system that takes requests while it generates.

    Attributes:
        name: with its version.
        settings: what was configured, for the file.
    """

    name: str
    settings: dict[str, object]

    def add(self, request: int, prompt: list[int], tokens: int) -> None:
        """Takes a request for exactly `tokens` greedy tokens."""

    def step(self) -> list[tuple[int, int]]:
        """Runs on, and returns the requests that have new tokens on the host, and how many."""


def draw_arrivals(rate: float, count: int, shape: Shape, seed: int = 0) -> list[Arrival]:
    """`count` requests with exponential gaps at `rate` a second; all at once if it is infinite.

    All lengths shrink alike for a shape that has no positions for them.
    """
    random = np.random.default_rng(seed)
    scale = min(1.0, shape.most_positions / LONGEST)

    def lengths(shortest: int, median: int, longest: int) -> list[int]:
        drawn = random.lognormal(math.log(median), SPREAD, count)
        return [max(1, int(scale * each)) for each in np.clip(drawn, shortest, longest)]

    prompts, outputs = lengths(*PROMPTS), lengths(*OUTPUTS)
    gaps = random.exponential(1 / rate, count) if math.isfinite(rate) else np.zeros(count)
    ids = [random.integers(0, min(30000, shape.vocab_size), length).tolist() for length in prompts]
    return [Arrival(*each) for each in zip(np.cumsum(gaps).tolist(), ids, outputs, strict=True)]


def serve(server: Server, arrivals: Sequence[Arrival]) -> Record:
    """Puts `server` under `arrivals` and returns what the users saw.

    Raises:
        RuntimeError: a request got another number of tokens than it asked for.
    """
    came: list[list[float]] = [[] for _ in arrivals]
    added = unfinished = 0
    started = time.perf_counter()
    while added < len(arrivals) or unfinished:
        now = time.perf_counter() - started
        while added < len(arrivals) and arrivals[added].at_s <= now:
            server.add(added, arrivals[added].prompt, arrivals[added].tokens)
            added, unfinished = added + 1, unfinished + 1
        if not unfinished:
            time.sleep(max(0.0, arrivals[added].at_s - (time.perf_counter() - started)))
            continue
        for request, count in server.step():
            before, wanted = len(came[request]), arrivals[request].tokens
            came[request] += [time.perf_counter() - started] * count
            unfinished -= before < wanted <= before + count
    seconds = time.perf_counter() - started
    wrong = [index for index, times in enumerate(came) if len(times) != arrivals[index].tokens]
    if wrong:
        raise RuntimeError(f"Requests {wrong[:5]} did not get the tokens that they asked for.")
    first = [times[0] - arrival.at_s for times, arrival in zip(came, arrivals, strict=True)]
    between = np.concatenate([np.diff(times) for times in came])
    return {
        "requests": len(arrivals),
        "seconds": seconds,
        "tokens_per_s": sum(map(len, came)) / seconds,
        "ttft_ms": _summary(first),
        "itl_ms": _summary(between),
    }


def _summary(seconds: Sequence[float] | np.ndarray) -> dict[str, float]:
    in_ms = np.asarray(seconds) * 1e3
    p50, p90, p99 = np.percentile(in_ms, [50, 90, 99]).tolist()
    return {"mean": float(in_ms.mean()), "p50": p50, "p90": p90, "p99": p99, "max": float(in_ms.max())}


class Graphexec:
    """graphexec's engine in this process, and the loop around it that its users write."""

    def __init__(self, shape: Shape, folder: Path, settings: dict[str, object], device: str = "auto") -> None:
        from graphexec import BackendConfig, Engine

        longest = min(LONGEST, shape.most_positions)
        config = engine_config(
            shape, write_config(shape, folder), BackendConfig(), largest_batch=SLOTS, device=device,
            max_model_len=longest, kv_tokens=SLOTS * longest // 2,
        )  # fmt: skip
        self.engine: Engine = Engine(config.model_copy(update=settings))
        self.name = "graphexec"
        self.settings: dict[str, object] = {"max_num_seqs": config.max_num_seqs, **settings}
        self._requests: dict[str, int] = {}
        self._tokens: dict[str, int] = {}

    def add(self, request: int, prompt: list[int], tokens: int) -> None:
        from graphexec import SamplingParams

        name = self.engine.add_request(prompt, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True))
        self._requests[name], self._tokens[name] = request, 0

    def step(self) -> list[tuple[int, int]]:
        news = []
        for output in self.engine.step():
            count = len(output.token_ids)
            news.append((self._requests[output.request_id], count - self._tokens[output.request_id]))
            self._tokens[output.request_id] = count
        return news


def arguments_for(module: str, description: str) -> argparse.ArgumentParser:
    """The words that every system's command line takes."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--rate", type=integers, default=(10, 40), help="requests a second, one run each")
    parser.add_argument("--at-once", type=int, default=512, help="requests of the run in which all come at once")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="length of a run")
    parser.add_argument("--minutes", type=float, default=5.0, help="after so long no further run is begun")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser


def run(server: Server, given: argparse.Namespace, command: list[str]) -> int:
    """Every run of a command line, with one beforehand that warms up; the exit code.

    Rates ascend, and end with the first that is beyond the system's capacity.
    """
    shape = SHAPES[given.shape]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: Record = provenance(command, device) | {
        "system": server.name,
        "shape": shape.name,
        "settings": server.settings,
        "prompts": PROMPTS,
        "outputs": OUTPUTS,
        "startup_s": seconds_since_start(),
    }
    began = time.perf_counter()
    runs: list[Record] = []
    skipped: list[float] = []
    results |= {"runs": runs, "skipped": skipped}
    serve(server, draw_arrivals(math.inf, min(64, 2 * given.at_once), shape, seed=1))
    rates: list[float] = [math.inf, *sorted(given.rate)]
    for rate in rates:
        if time.perf_counter() - began > 60 * given.minutes:
            skipped.append(rate)
            continue
        count = given.at_once if math.isinf(rate) else max(2, round(rate * given.seconds))
        record: Record = {"rate": None if math.isinf(rate) else rate}
        record |= serve(server, draw_arrivals(rate, count, shape))
        runs.append(record)
        print(_line(server.name, record), flush=True)
        if given.json is not None:
            write_results(given.json, results)
        ttft = record["ttft_ms"]
        assert isinstance(ttft, dict)
        if rate != math.inf and ttft["p99"] > 1e3 * HIGHEST_TTFT_S:
            break
    return 0


def _line(name: str, record: Record) -> str:
    ttft, itl = record["ttft_ms"], record["itl_ms"]
    assert isinstance(ttft, dict)
    assert isinstance(itl, dict)
    load = "all at once" if record["rate"] is None else f"{record['rate']} a second"
    return (
        f"{name}, {record['requests']} requests, {load}: {record['tokens_per_s']:.0f} tokens/s, first token "
        f"p50 {ttft['p50']:.2f} p90 {ttft['p90']:.2f} p99 {ttft['p99']:.2f} ms, between tokens mean {itl['mean']:.3f} "
        f"p50 {itl['p50']:.3f} p90 {itl['p90']:.3f} p99 {itl['p99']:.3f} ms"
    )


def main(arguments: list[str]) -> int:
    parser = arguments_for("bench.serving", (__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--depth", type=int, default=1, help="overlap_depth")
    parser.add_argument("--chunk", type=int, help="max_chunk_tokens")
    parser.add_argument(
        "--trace-out", type=Path, help="file for the sizes of the steps, for `graphexec warmup --trace`"
    )
    given = parser.parse_args(arguments)
    settings: dict[str, object] = {"overlap_depth": given.depth}
    if given.chunk is not None:
        settings["max_chunk_tokens"] = given.chunk
    with tempfile.TemporaryDirectory() as folder:
        server = Graphexec(SHAPES[given.shape], Path(folder), settings, given.device)
        try:
            code = run(server, given, ["python", "-m", "bench.serving", *arguments])
            stats = server.engine.stats()
            padding = stats.launched_rows / max(stats.rows, 1) - 1
            print(f"{stats.steps} steps, {stats.replays} as graphs, eager: {stats.eager_steps}, {stats.preemptions}")
            print(f"{stats.rows} rows and {padding:.1%} of padding")
            if given.json is not None:
                counts = {"steps": stats.steps, "replays": stats.replays, "eager": stats.eager_steps}
                counts |= {"rows": stats.rows, "launched_rows": stats.launched_rows}
                write_results(given.json, json.loads(given.json.read_text()) | {"counts": counts})
            if given.trace_out is not None:
                stats.traffic.write(given.trace_out)
        finally:
            server.engine.close()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
