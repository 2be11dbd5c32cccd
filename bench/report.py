"""What a results file of bench.decode says, as text and as a verdict."""

from __future__ import annotations

from graphexec.capture.manifest import Manifest

__all__ = ["METHOD", "Row", "capture_summary", "succeeded", "table"]

Row = dict[str, object]

METHOD = {
    "decode_step_ms": "(median seconds of the long runs - median of the short ones) / difference in tokens. A run "
    "takes all prompts at once and ends when the last token of the last request is on the host, so everything is in "
    "it: scheduling, launches, copies, collection.",
    "bare_replay_ms": "the graph of the same backend, as many replays as the long run has more tokens, all enqueued at "
    "once, between two events. The slots start with the context of a short run's end and grow by one token a replay, "
    "as in the run: the same contexts, over the KV blocks that the run has filled. Taken after each long run; median.",
    "overhead": "decode_step_ms / bare_replay_ms",
    "decode_phase_ms": "the slope of the same runs with clocks that start when the last prompt has been computed: when "
    "the first step is collected in which every request has an output. What comes before varies from run to run, "
    "and is not in it. Left out where the requests never all had an output in the same step.",
    "decode_phase_overhead": "decode_phase_ms / bare_replay_ms",
    "host_us": "difference of Engine.stats().host_us over a window of a run in which every request decodes, by steps: "
    "host time of the step loop, waits excluded. Median of the windows. wait_us and step_us: the same windows.",
    "bubble_us": "from a torch.profiler trace (CUPTI) of steady decode: from the end of the last kernel of a step "
    "(`_update`) to the start of the next kernel; copies and fills are no kernels. busy: share of the time, from the "
    "first traced step's end to the last one's, in which a kernel runs.",
    "hand_written_ms": "a torch.cuda.CUDAGraph of the same model step over the same contexts, and after each replay a "
    "blocking read of the tokens (.item(), .tolist() for a batch), appended to lists; no scheduling, no requests.",
    "tokens": "every timed run against one run of the eager backend with the same one decode bucket and one prefill "
    "bucket; the hand-written loop against the bare replays.",
    "capture": "warm-up of a new backend over the ladder to max_num_seqs for every sampler variant. wall_s is all of "
    "it, with one eager step of each shape before its capture (warmup_s); capture_s is capture and instantiation "
    "alone. The first pass also compiles what no step before it has needed. pool_mib: by how much a capture made the "
    "pool grow that all graphs share, so the largest bucket, which comes first, pays for the others. device_mib: by "
    "how much the memory in use grew in all, as the driver counts it, its own share of the graphs included.",
    "eager": "one run of each length on the eager backend, the tokens of which the others must give.",
}
"""What the figures mean; part of every results file."""


def capture_summary(manifest: Manifest) -> Row:
    variants: dict[str, Row] = {}
    for variant in dict.fromkeys(graph.key.variant for graph in manifest.graphs):
        graphs = [graph for graph in manifest.graphs if graph.key.variant == variant]
        variants[variant] = {
            "graphs": len(graphs),
            "warmup_s": sum(graph.warmup_s for graph in graphs),
            "capture_s": sum(graph.capture_s for graph in graphs),
            "pool_mib": sum(graph.pool_bytes for graph in graphs) / 2**20,
            "most_nodes": max(graph.nodes for graph in graphs),
            "by_bucket": [
                {
                    "bucket": graph.key.bucket,
                    "nodes": graph.nodes,
                    "pool_mib": graph.pool_bytes / 2**20,
                    "capture_s": graph.capture_s,
                }
                for graph in graphs
            ],
        }
    return {
        "capture_s": manifest.capture_s,
        "pool_mib": manifest.pool_bytes / 2**20,
        "missing": manifest.missing,
        "variants": variants,
    }


def table(results: Row) -> str:
    """The figures of a results file as text."""
    columns = {
        "prompt_tokens": "prompt", "batch": "batch", "depth": "depth", "decode_step_ms": "step ms",
        "bare_replay_ms": "bare ms", "overhead": "overhead", "decode_phase_overhead": "overhead, decode alone",
        "host_us": "host us", "wait_us": "wait us", "bubble_us.p50": "bubble p50",
        "bubble_us.p99": "p99 us", "busy": "busy", "hand_written_ms": "by hand ms",
        "runs_with_other_tokens_than_eager": "runs != eager",
    }  # fmt: skip
    decode = results["decode"]
    assert isinstance(decode, list)
    if not any("decode_phase_overhead" in row for row in decode):  # a file of before it was measured
        del columns["decode_phase_overhead"]
    rows = [list(columns.values())]
    rows += [[_shown(_look_up(row, name)) for name in columns] for row in decode]
    lines = _aligned(rows)
    eager = results["eager"]
    assert isinstance(eager, list)
    for row in eager:
        load = f"batch {row['batch']}, prompts of {row['prompt_tokens']}"
        lines.append(f"eager, {load}: {_shown(row['decode_step_ms'])} ms a step")
    captures = results["capture"]
    assert isinstance(captures, dict)
    if captures:
        passes = [["capture", "graphs of", "graphs", "warm-up s", "capture s", "wall s", "pool MiB", "device MiB"]]
        for name, entry in captures.items():
            for variant, each in entry["variants"].items():
                figures = (each["graphs"], each["warmup_s"], each["capture_s"], None, each["pool_mib"], None)
                passes.append([name, variant, *map(_shown, figures)])
            figures = (None, None, entry["capture_s"], entry["wall_s"], entry["pool_mib"], entry["device_mib"])
            passes.append([name, "all", *map(_shown, figures)])
        lines += ["", *_aligned(passes)]
    for kind in ("skipped", "errors"):
        entries = results[kind]
        assert isinstance(entries, list)
        lines += [f"{kind}: {entry}" for entry in entries]
    return "\n".join(lines)


def _look_up(row: Row, name: str) -> object:
    value: object = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def succeeded(results: Row) -> bool:
    """Whether nothing failed and every run gave the tokens of eager."""
    decode = results["decode"]
    assert isinstance(decode, list)
    same = all(
        row.get("runs_with_other_tokens_than_eager") == 0 and row.get("hand_written_tokens_are_the_replays", True)
        for row in decode
    )
    return same and not results["errors"]
