"""Times the sampler variants on a GPU, by CUDA-graph replays, at a real vocabulary; prints a table.

    python -m bench.sampling_sweep [--json PATH]      (from the root of the repository)

Several copies of the logits take turns, so that the cache does not serve what a forward would have evicted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.provenance import provenance, write_results
from graphexec.kernels.sample import SampleOutput, SamplerVariant, sample
from graphexec.kernels.state import SlotTensors

VOCABULARY = 151_936
BATCHES = (1, 8, 64, 256)
TOP = 5
REPEATS = 30
COPIES_BYTES = 200 * 2**20
"""Logits in rotation: four times the 50 MiB of cache."""

MAX_TOKENS = 4096
WORKLOADS: dict[str, tuple[SamplerVariant, float, int, float, int]] = {
    # name: variant, temperature, top_k, top_p, tokens that a repetition penalty looks at
    "greedy": (SamplerVariant.GREEDY, 0.0, 0, 1.0, 0),
    "sampled": (SamplerVariant.SAMPLED, 0.8, 0, 1.0, 0),
    "shaped, all rows greedy": (SamplerVariant.SHAPED, 0.0, 0, 1.0, 0),
    "shaped, no filter": (SamplerVariant.SHAPED, 0.8, 0, 1.0, 0),
    "shaped, top-k 20": (SamplerVariant.SHAPED, 0.8, 20, 1.0, 0),
    "shaped, top-p 0.95": (SamplerVariant.SHAPED, 0.8, 0, 0.95, 0),
    "shaped, top-k 20, top-p 0.95": (SamplerVariant.SHAPED, 0.8, 20, 0.95, 0),
    "shaped, penalty over 300 tokens": (SamplerVariant.SHAPED, 0.8, 0, 1.0, 300),
    "shaped, penalty over 4,000 tokens": (SamplerVariant.SHAPED, 0.8, 0, 1.0, 4000),
    "logprobs, no filter": (SamplerVariant.LOGPROBS, 0.8, 0, 1.0, 0),
}


@dataclass(frozen=True)
class Timing:
    """One cell: microseconds for one call inside a graph."""

    workload: str
    batch: int
    median_us: float
    lowest_us: float
    samples: list[float]


def make_state(batch: int, temperature: float, top_k: int, top_p: float, penalized: int) -> SlotTensors:
    """The same parameters for every slot, seeds apart."""
    state = SlotTensors.allocate(batch, torch.device("cuda"), tokens=MAX_TOKENS, biases=300, stop_ids=8)
    state.temperature.fill_(temperature)
    state.top_k.fill_(top_k)
    state.top_p.fill_(top_p)
    state.seed.copy_(torch.arange(batch))
    state.repetition_penalty.fill_(1.1 if penalized else 1.0)
    state.token_ids.random_(VOCABULARY)
    state.num_tokens.fill_(penalized or 100)
    return state


def make_output(batch: int) -> SampleOutput:
    """All buffers."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device="cuda")

    logprobs = torch.empty(batch, 1 + TOP, device="cuda")
    return SampleOutput(empty(batch), empty(batch), logprobs, empty(batch, 1 + TOP), empty(batch))


def time_workload(workload: str, batch: int) -> Timing:
    """Median and lowest over replays of a graph that samples from each copy of the logits in turn."""
    variant, temperature, top_k, top_p, penalized = WORKLOADS[workload]
    copies = min(64, max(4, COPIES_BYTES // (batch * VOCABULARY * 2)))
    logits = [(2.5 * torch.randn(batch, VOCABULARY, device="cuda")).to(torch.bfloat16) for _ in range(copies)]
    slots = torch.arange(batch, dtype=torch.int32, device="cuda")
    state, out = make_state(batch, temperature, top_k, top_p, penalized), make_output(batch)
    sample(logits[0], slots, state, variant, out)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in logits:
            sample(one, slots, state, variant, out)
    for _ in range(5):
        graph.replay()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / copies)
    return Timing(workload, batch, statistics.median(times), min(times), [round(each, 3) for each in times])


def main() -> None:
    """Runs the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the timings here")
    path = parser.parse_args().json
    if not torch.cuda.is_available():
        raise SystemExit("This sweep needs a CUDA device.")
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, V={VOCABULARY}, bfloat16; median (lowest) microseconds a call")
    print(f"{'':32}" + "".join(f"{f'B={batch}':>18}" for batch in BATCHES))
    timings = []
    for workload in WORKLOADS:
        row = [time_workload(workload, batch) for batch in BATCHES]
        timings += row
        print(f"{workload:32}" + "".join(f"{f'{t.median_us:.1f} ({t.lowest_us:.1f})':>18}" for t in row), flush=True)
    if path is not None:
        command = ["python", "-m", "bench.sampling_sweep", *sys.argv[1:]]
        record = provenance(command, torch.device("cuda")) | {
            "vocabulary": VOCABULARY,
            "dtype": "bfloat16",
            "repeats": REPEATS,
            "timings": [asdict(timing) for timing in timings],
        }
        write_results(path, record)


if __name__ == "__main__":
    main()
