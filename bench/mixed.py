"""Prompts alone, and steps in which prompt chunks run beside decoding requests, on random weights.

    python -m bench.mixed --shape qwen3-0.6b --json bench/results/h200/mixed-qwen3-0.6b.json

Prompts: wall time of a request for one token, the engine otherwise idle. Steps: the time of a replay between two
events, the kernels in it by a trace, and the kernels of the eager step without padding. Gaps: what lies between the
last kernel of a step and the first of the next, while requests decode and prompts keep coming.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench.load import random_prompts
from bench.method import integers
from bench.provenance import provenance, write_results
from bench.shapes import SHAPES, Shape, engine_config, write_config
from bench.trace import Span, device_spans, kernel_ns
from graphexec import BackendConfig, Engine, GraphKey, SamplingParams
from graphexec.backends.cudagraph import CudaGraphBackend

Record = dict[str, object]

LENGTHS = (16, 64, 256, 1000, 2000)
REPLAYS = 15
SLOTS = 272  # 256 that decode, and as many as have chunks beside them
LAST_KERNEL, FIRST_KERNEL, APPLY_KERNEL = "_update", "_prepare", "_apply"
ATTENTION = {"decode attention": ("_decode_kernel",), "chunk attention": ("_prefill_kernel",)}


@dataclass(frozen=True)
class Load:
    """One step: `decodes` slots with `context` tokens each, and a slot for each chunk of a prompt."""

    decodes: int
    context: int
    chunks: tuple[int, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.decodes} decodes behind {self.context}"] if self.decodes else []
        for chunk, count in Counter(self.chunks).items():
            parts.append(f"a chunk of {chunk}" if count == 1 else f"{count} chunks of {chunk}")
        return ", ".join(parts)

    @property
    def slots(self) -> list[tuple[int, int]]:
        """Tokens before the step, and of the step, by slot."""
        return [(self.context, 1)] * self.decodes + [(0, chunk) for chunk in self.chunks]


LOADS = (
    Load(64, 500), Load(64, 500, (256,)), Load(0, 0, (256,)),
    Load(256, 500), Load(0, 0, (1792,)), Load(0, 0, (2048,)), Load(256, 500, (1792,)), Load(256, 500, (256,) * 7),
)  # fmt: skip


class Steps:
    """Steps of given loads, over the slots of an engine that serves nobody meanwhile."""

    def __init__(self, engine: Engine) -> None:
        assert isinstance(engine._backend, CudaGraphBackend)
        self._backend = engine._backend
        self._pipeline, self._graphs = self._backend._prepared()
        self._program = engine._program
        self._state = self._program.state_of_slots.slots

    def measure(self, load: Load, variant: str = "greedy") -> Record:
        """The step as it is served, and its kernels without graph and padding."""
        key, exact = self._keys(load, variant)
        graph = self._graphs.get(key)
        if graph is None:
            return {"load": str(load), "error": f"There is no graph for the {key}."}
        compute = self._pipeline.compute
        with self._pipeline.runtime.activated():
            restore = self._set_up(load)
            timed = [self._time(restore, lambda: compute.launch(graph)) for _ in range(REPLAYS)]
            restore()
            replayed = device_spans(lambda: compute.launch(graph))
            for _ in range(2):
                restore()
                eager = device_spans(lambda: compute.run(partial(self._program.step, exact)))
        return {
            "load": str(load),
            "key": str(key),
            "replay_ms": statistics.median(timed),
            "samples": timed,
            "busy_ms": kernel_ns(replayed) / 1e6,
            "eager_unpadded_busy_ms": kernel_ns(eager) / 1e6,
            "kernels": len(replayed),
            "kernels_ms": _by_name(replayed),
            **{f"{name} ms": _sum_of(replayed, kernels) for name, kernels in ATTENTION.items()},
        }

    def _keys(self, load: Load, variant: str) -> tuple[GraphKey, GraphKey]:
        slots, rows = len(load.slots), sum(tokens for _, tokens in load.slots)
        ladders = self._pipeline.ladders
        if not load.chunks:
            bucket = ladders.slots.fit(slots) or self._program.max_slots
            return GraphKey("decode", bucket, bucket, variant), GraphKey("decode", slots, slots, variant)
        shape = ladders.chunk_shape(slots, rows, len(load.chunks)) or ("mixed", rows, slots)
        served = self._program.mixed_variants.get(variant, variant)
        return GraphKey(*shape, served), GraphKey(shape[0], rows, slots, variant)

    def _set_up(self, load: Load) -> Callable[[], None]:
        """Fills the slots, and returns what fills them again."""
        state, size = self._state, self._program.limits.block_size
        for tensor in state.all():
            tensor.zero_()
        for tensor in (state.stop_ids, state.bias_ids):
            tensor.fill_(-1)
        for tensor in (state.top_p, state.repetition_penalty):
            tensor.fill_(1.0)
        state.log_min_p.fill_(float("-inf"))
        state.max_len.fill_(self._program.limits.max_tokens)
        state.token_ids.random_(0, 256)
        next_block = 1
        for slot, (before, tokens) in enumerate(load.slots):
            blocks = -(-(before + tokens + 1) // size)
            state.query_lens[slot], state.seq_lens[slot], state.num_tokens[slot] = tokens, before, before + tokens
            state.num_blocks[slot] = blocks
            state.block_tables[slot, :blocks] = torch.arange(next_block, next_block + blocks, dtype=torch.int32)
            next_block += blocks
        saved = [tensor.clone() for tensor in state.all()]

        def restore() -> None:
            self._pipeline.compute.run(lambda: [a.copy_(b) for a, b in zip(state.all(), saved, strict=True)])
            self._pipeline.synchronize()

        return restore

    def _time(self, restore: Callable[[], None], launch: Callable[[], None]) -> float:
        """Milliseconds between two events around `launch`, which is enqueued while the device is busy."""
        restore()
        stream = self._pipeline.compute.torch_stream
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000)
            begin.record()
            launch()
            end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)


def prompts_alone(engine: Engine, shape: Shape, length: int, params: SamplingParams, repeats: int) -> Record:
    """Milliseconds from `add_request` to the one output token, of random prompts one after the other."""
    taken = []
    for prompt in random_prompts(repeats + 2, length, shape.vocab_size, seed=length):
        started = time.perf_counter()
        engine.add_request(prompt, params)
        while engine.has_unfinished():
            engine.step()
        taken.append((time.perf_counter() - started) * 1e3)
    return {"prompt_tokens": length, "wall_ms": statistics.median(taken[2:]), "samples": taken[2:]}


def gaps(engine: Engine, shape: Shape, decodes: int, chunk: int, prompts: int) -> Record:
    """Between steps of `decodes` requests into which prompts of `chunk` tokens come, every fourth step one."""
    for prompt in random_prompts(decodes, 64, shape.vocab_size):
        engine.add_request(prompt, SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True))
    for _ in range(12):
        engine.step()
    coming = random_prompts(prompts, chunk, shape.vocab_size, seed=1)

    def serve() -> None:
        for prompt in coming:
            engine.add_request(prompt, SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
            for _ in range(4):
                engine.step()

    spans = sorted((s for s in device_spans(serve) if not s.name.startswith("Mem")), key=lambda span: span.start_ns)
    while engine.has_unfinished():
        engine.step()
    found: dict[str, list[float]] = defaultdict(list)
    applying: dict[str, list[float]] = {"until it begins": [], "of the kernel": [], "until the step begins": []}
    ended: int | None = None
    begun = 0
    for index, span in enumerate(spans):
        if span.name.startswith(FIRST_KERNEL):
            begun = index
            before = spans[index - 1]
            if index and before.name.startswith(APPLY_KERNEL) and ended is not None:
                for part, ns in zip(
                    applying,
                    (before.start_ns - ended, before.end_ns - before.start_ns, span.start_ns - before.end_ns),
                    strict=True,
                ):
                    applying[part].append(ns / 1e3)
        if span.name.startswith(LAST_KERNEL):
            is_mixed = any(each.name.startswith("_prefill_kernel") for each in spans[begun:index])
            if ended is not None:
                found["mixed" if is_mixed else "decode"].append((spans[begun].start_ns - ended) / 1e3)
            ended = span.end_ns
    return {
        "decodes": decodes,
        "chunk": chunk,
        **{
            f"in front of a {kind} step, us": {
                "p50": statistics.median(each), "p90": statistics.quantiles(each, n=10)[-1], "samples": each
            }
            for kind, each in found.items()
        },
        "applying a delta, us": {part: statistics.median(each) for part, each in applying.items() if each},
    }  # fmt: skip


def _by_name(spans: Sequence[Span]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for span in spans:
        total[span.name[:60]] += (span.end_ns - span.start_ns) / 1e6
    return dict(sorted(total.items(), key=lambda item: -item[1])[:12])


def _sum_of(spans: Sequence[Span], kernels: tuple[str, ...]) -> float:
    return sum(span.end_ns - span.start_ns for span in spans if span.name.startswith(kernels)) / 1e6


def bound(steps: dict[str, Record]) -> Record:
    """What 256 decodes and 1,792 prompt rows may take together: a step of 2,048 rows, but for its attention."""
    whole, rows, decode = steps[str(LOADS[5])], steps[str(LOADS[4])], steps[str(LOADS[3])]
    parts = [whole["replay_ms"], whole["chunk attention ms"], rows["chunk attention ms"], decode["decode attention ms"]]
    a, b, c, d = (float(str(part)) for part in parts)
    took = float(str(steps[str(LOADS[6])]["replay_ms"]))
    return {"parts_ms": a - b + c + d, "mixed_ms": took, "quotient": took / (a - b + c + d)}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.mixed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--prompt", type=integers, default=LENGTHS, help="tokens of the prompts alone")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--verify", action="store_true", default=None, help="compare every graph with the eager step")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    shape = SHAPES[given.shape]
    results: Record = provenance(["python", "-m", "bench.mixed", *arguments], torch.device("cuda"))
    results["shape"] = shape.name
    with tempfile.TemporaryDirectory() as folder:
        config = engine_config(
            shape, write_config(shape, Path(folder)), BackendConfig(verify=given.verify), device="cuda",
            largest_batch=SLOTS, max_model_len=2304, kv_tokens=400 * 1024,
        )  # fmt: skip
        started = time.perf_counter()
        with Engine(config) as engine:
            mixed = [graph for graph in engine.manifest.graphs if graph.key.has_chunks]
            results["start_s"] = time.perf_counter() - started
            results["ladder"] = {
                "graphs": len(mixed),
                "warmup_s": sum(graph.warmup_s for graph in mixed),
                "capture_s": sum(graph.capture_s for graph in mixed),
                "device_mib": sum(graph.pool_bytes for graph in mixed) / 2**20,
            }
            print(results["start_s"], results["ladder"], flush=True)
            sampled = SamplingParams(max_tokens=1, temperature=1.0, ignore_eos=True)
            greedy = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
            results["prompts"] = rows = []
            for name, params in (("greedy", greedy), ("sampled", sampled)):
                for length in given.prompt:
                    rows.append({"sampling": name, **prompts_alone(engine, shape, length, params, given.repeats)})
                    print(f"{name}, a prompt of {length}: {rows[-1]['wall_ms']:.3f} ms", flush=True)
            results["gaps"] = gaps(engine, shape, 64, 256, 40)
            for name, each in results["gaps"].items():
                shown = {k: v for k, v in each.items() if k != "samples"} if isinstance(each, dict) else each
                print("gap", name, shown, flush=True)
            steps = {str(load): Steps(engine).measure(load) for load in LOADS}
            results["steps"] = list(steps.values())
            for record in steps.values():
                print(
                    {name: value for name, value in record.items() if name not in ("samples", "kernels_ms")}, flush=True
                )
            results["bound"] = bound(steps)
            print(results["bound"], engine.stats().eager_steps, flush=True)
    if given.json is not None:
        write_results(given.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
