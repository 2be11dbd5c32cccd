"""The README's benchmark sections, as Markdown made from results files."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.chunk_sections import mixed, mixed_figures
from bench.committed import Committed, Results, facts, shown, table
from bench.headlines import decode_headline, serving, serving_figures
from bench.plots import PLOTS, Bars, Figure
from bench.startup_section import startup, startup_figures

__all__ = ["SECTIONS", "figures"]

_OURS_DEPTH = 1
"""The depth that is compared with peers: the default."""
_DECODE_ALONE = {"decode_phase_overhead": "overhead, decode alone"}
"""A column that files of before it was measured do not have."""


def decode(committed: Committed) -> list[str]:
    lines: list[str] = []
    for name, results in committed.kind("decode").items():
        lines += _heading(results, f"prompts of {_prompts(results)} tokens")
        depths = sorted({row["depth"] for row in results["decode"]})
        main = _OURS_DEPTH if _OURS_DEPTH in depths else depths[0]
        at_main = [row for row in results["decode"] if row["depth"] == main]
        columns = {"bare_replay_ms": "bare replay ms", "overhead": "overhead", **_DECODE_ALONE, "host_us": "host µs"}
        columns = _measured(columns, at_main)
        head = ["batch", *(f"step ms, depth {depth}" for depth in depths), *columns.values()]
        head += ["bubble µs, p50 / p99", "busy", "by hand ms", "eager ms"]
        eager = {(row["prompt_tokens"], row["batch"]): row["decode_step_ms"] for row in results["eager"]}
        body = []
        for load, by_depth in _by_load(results).items():
            row = by_depth.get(main, {})
            by_hand = next((each["hand_written_ms"] for each in by_depth.values() if "hand_written_ms" in each), None)
            steps = [by_depth.get(depth, {}).get("decode_step_ms") for depth in depths]
            cells = [*steps, *map(row.get, columns)]
            body.append([shown(load[1]), *map(shown, cells), _bubble(row), shown(row.get("busy")), shown(by_hand)])
            body[-1].append(shown(eager.get(load)))
        lines += [*table(head, body), "", f"From overhead to busy: at depth {main}.", ""]
        if left_out := _left_out(results):
            lines += [*left_out, ""]
        lines += [_image(f"{name}.png"), ""]
    return lines


def context(committed: Committed) -> list[str]:
    lines: list[str] = []
    for results in committed.kind("context").values():
        lines += _heading(results, "long prompts")
        columns = {"prompt_tokens": "prompt", "batch": "batch", "depth": "depth", "decode_step_ms": "step ms"}
        columns |= {"bare_replay_ms": "bare replay ms", "overhead": "overhead", **_DECODE_ALONE}
        columns |= {"busy": "busy", "hand_written_ms": "by hand ms"}
        columns = _measured(columns, results["decode"])
        body = [[shown(row.get(name)) for name in columns] for row in results["decode"]]
        lines += [*table(list(columns.values()), body), ""]
        lines += [*_left_out(results), ""]
    return lines


def _left_out(results: Results) -> list[str]:
    """Loads that were skipped for a reason, and those of the plan of which the file knows nothing: it was cut off."""
    reasons = [reason for reason in results["skipped"] if ": " in reason]
    plan = results["plan"]
    known = {(row["prompt_tokens"], row["batch"], row["depth"]) for row in results["decode"]}
    missing = [
        f"batch {batch}, prompts of {prompt}, depth {depth}"
        for depth in plan["depths"]
        for prompt in plan["prompts"]
        for batch in plan["batches"]
        if (prompt, batch, depth) not in known
        and not any(reason.startswith(f"batch {batch}, prompts of {prompt}:") for reason in reasons)
    ]
    lines = [f"- Left out: {reason}." for reason in reasons]
    return [*lines, f"- The round ended before: {'; '.join(missing)}."] if missing else lines


def peers(committed: Committed) -> list[str]:
    lines: list[str] = []
    for name, systems in committed.peers().items():
        lines += _heading(systems[0], "decode step, ms; in brackets, a peer's time over graphexec's")
        tables = [_steps(results) for results in systems]
        loads = sorted({load for steps in tables for load in steps})
        ours = tables[0] if systems[0]["system"] == "graphexec" else {}
        body = [
            [shown(prompt), shown(batch), *(_beside(steps, ours, (prompt, batch)) for steps in tables)]
            for prompt, batch in loads
        ]
        lines += [*table(["prompt", "batch", *(results["system"] for results in systems)], body), ""]
        lines += [f"- {each['system']}: {each['handicap']}" for each in systems if each["handicap"]]
        lines += [f"- {each['system']}: left out: {reason}." for each in systems for reason in each["skipped"]]
        if len({results.get("round") for results in systems}) > 1:
            lines.append("- Not all of these were measured in one run: the quotients hold to about 8 %.")
        lines += ["", _image(f"{name}.png"), ""]
    return lines


def attention(committed: Committed) -> list[str]:
    results = committed.files.get("attention")
    if results is None:
        return []
    chosen = [record for record in results["decode"] if record["chosen"] and "microseconds" in record]
    heads = ("num_heads", "num_kv_heads", "head_dim")
    names = ("batch", "context", "num_splits", "microseconds", "over_bytes")
    head = ["heads / KV heads / size", "batch", "context", "splits", "µs", "over the time of its bytes"]
    body = [
        [" / ".join(str(record[name]) for name in heads), *(shown(record[name]) for name in names)] for record in chosen
    ]
    title = f"Decode, bytes at {results['bandwidth'] / 1e12:.2f} TB/s ({facts(results)}):"
    lines = [title, "", *table(head, body), ""]
    dense = {_workload(each): each["microseconds"] for each in results["prefill"] if each["kernel"] != "paged_prefill"}
    body = []
    for record in results["prefill"]:
        if record.get("chosen") and "microseconds" in record:
            ours, torchs = record["microseconds"], dense[_workload(record)]
            body.append([shown(each) for each in (*_workload(record), ours, torchs, ours / torchs)])
    head = ["sequences", "chunk", "heads", "µs", "torch's causal attention, contiguous, µs", "quotient"]
    return [*lines, "Prefill:", "", *table(head, body), ""]


def _workload(record: Results) -> tuple[int, int, int]:
    return record["sequences"], record["chunk"], record["H"]


def capture(committed: Committed) -> list[str]:
    lines: list[str] = []
    for results in committed.kind("decode").values():
        passes = results["capture"]
        if not passes:
            continue
        lines += _heading(results, "capture of the whole ladder, for every sampler variant")
        head = ["pass", "graphs", "capture s", "with warm-up s", "pool MiB", "device MiB"]
        body = []
        for name, entry in passes.items():
            graphs = sum(each["graphs"] for each in entry["variants"].values())
            figures = (graphs, entry["capture_s"], entry["wall_s"], entry["pool_mib"], entry["device_mib"])
            body.append([name, *map(shown, figures)])
        lines += [*table(head, body), ""]
        variants = list(passes.values())[-1]["variants"]
        by_bucket = {name: {each["bucket"]: each for each in entry["by_bucket"]} for name, entry in variants.items()}
        head = ["bucket, in order of capture", *(f"pool MiB, {name}" for name in variants), "nodes, greedy"]
        body = []
        for bucket in dict.fromkeys(bucket for entries in by_bucket.values() for bucket in entries):
            entries = [entry.get(bucket, {}) for entry in by_bucket.values()]
            if bucket in results["plan"]["batches"] or any(entry.get("pool_mib") for entry in entries):
                nodes = by_bucket.get("greedy", {}).get(bucket, {}).get("nodes")
                body.append([shown(bucket), *(shown(entry.get("pool_mib")) for entry in entries), shown(nodes)])
        lines += [*table(head, body), ""]
    return lines


SECTIONS: dict[str, tuple[Callable[[Committed], list[str]], str]] = {
    "headline": (decode_headline, "bench/gpu_round.sh peer"),
    "serving": (serving, "bench/gpu_round.sh peer-serving"),
    "decode": (decode, "bench/gpu_round.sh bench"),
    "mixed": (mixed, "bench/gpu_round.sh mixed"),
    "peers": (peers, "bench/gpu_round.sh peer"),
    "context": (context, "bench/gpu_round.sh context"),
    "startup": (startup, "bench/gpu_round.sh startup"),
    "capture": (capture, "bench/gpu_round.sh bench"),
    "attention": (attention, "bench/gpu_round.sh kernels"),
}
"""What makes a section, and the command that measures it."""


def figures(committed: Committed) -> list[Figure | Bars]:
    """The plots that the sections show."""
    made: list[Figure | Bars] = []
    for name, results in committed.kind("decode").items():
        depths = sorted({row["depth"] for row in results["decode"]})
        lines = {f"depth {depth}": _line(results, "decode_step_ms", depth) for depth in depths}
        lines["bare replay"] = _line(results, "bare_replay_ms", _OURS_DEPTH)
        lines["by hand, .item()"] = _line(results, "hand_written_ms", None)
        made.append(Figure(f"{name}.png", f"{results['shape']}: decode step on {results['device']}", lines))
    for name, systems in committed.peers().items():
        first = systems[0]
        lines = {
            each["system"]: tuple(sorted((batch, step) for (_, batch), step in _steps(each).items()))
            for each in systems
        }
        made.append(Figure(f"{name}.png", f"{first['shape']}: decode step beside peers on {first['device']}", lines))
    return [*made, *serving_figures(committed), *mixed_figures(committed), *startup_figures(committed)]


def _line(results: Results, name: str, depth: int | None) -> tuple[tuple[float, float], ...]:
    """A figure by batch; of graphexec at this depth, or at the first that has it."""
    points: dict[int, float] = {}
    for row in results["decode"]:
        if name in row and (depth is None or row["depth"] == depth):
            points.setdefault(row["batch"], row[name])
    return tuple(sorted(points.items()))


def _by_load(results: Results) -> dict[tuple[int, int], dict[int, Results]]:
    loads: dict[tuple[int, int], dict[int, Results]] = {}
    for row in results["decode"]:
        loads.setdefault((row["prompt_tokens"], row["batch"]), {})[row["depth"]] = row
    return dict(sorted(loads.items()))


def _steps(results: Results) -> dict[tuple[int, int], float]:
    rows = [
        row for row in results["decode"] if row.get("depth", _OURS_DEPTH) == _OURS_DEPTH and "decode_step_ms" in row
    ]
    return {(row["prompt_tokens"], row["batch"]): row["decode_step_ms"] for row in rows}


def _beside(steps: dict[tuple[int, int], float], ours: dict[tuple[int, int], float], load: tuple[int, int]) -> str:
    if load not in steps:
        return "-"
    quotient = f" ({steps[load] / ours[load]:.2f})" if load in ours and steps is not ours else ""
    return shown(steps[load]) + quotient


def _measured(columns: dict[str, str], rows: Sequence[Results]) -> dict[str, str]:
    """The columns by name of their figure, without that of `_DECODE_ALONE` where no row has it."""
    return {
        name: head for name, head in columns.items() if name not in _DECODE_ALONE or any(name in row for row in rows)
    }


def _bubble(row: Results) -> str:
    bubble = row.get("bubble_us")
    return f"{shown(bubble['p50'])} / {shown(bubble['p99'])}" if bubble else "-"


def _prompts(results: Results) -> str:
    return ", ".join(map(str, sorted({row["prompt_tokens"] for row in results["decode"]})))


def _heading(results: Results, what: str) -> list[str]:
    return [f"**{results['shape']}**: {what} ({facts(results)})", ""]


def _image(name: str) -> str:
    return f"![{name.removesuffix('.png')}]({PLOTS}/{name})"
