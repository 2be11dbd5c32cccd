"""The sections that the README itself shows: decode steps and serving, beside vLLM."""

from __future__ import annotations

from bench.committed import Committed, Results, facts, shown, table
from bench.plots import PLOTS, Figure

__all__ = ["SERVING_METRICS", "decode_headline", "serving", "serving_figures"]

SERVING_METRICS = {
    "ttft_ms": ("first token, ms", ("p50", "p99")),
    "itl_ms": ("between tokens, ms", ("mean", "p50", "p99")),
}
"""What a user waits for, and the figures to show of it, by the name of its record."""


def decode_headline(committed: Committed) -> list[str]:
    """Decode steps of every shape that was measured beside vLLM, in one table."""
    measured = {
        systems[0]["shape"]: systems
        for name, systems in committed.peers().items()
        if name == f"peer-{systems[0]['shape']}"
        and [each["system"].split()[0] for each in systems] == ["graphexec", "vllm"]
    }
    if not measured:
        return []
    steps = {
        shape: [{row["batch"]: row["decode_step_ms"] for row in each["decode"]} for each in systems]
        for shape, systems in measured.items()
    }
    head = ["batch"]
    for shape, systems in measured.items():
        head += [f"{shape}: {each['system']}, ms" for each in systems] + ["quotient"]
    body = []
    for batch in sorted({batch for ours, _ in steps.values() for batch in ours}):
        cells = [shown(batch)]
        for ours, theirs in steps.values():
            pair = ours.get(batch), theirs.get(batch)
            cells += [*map(shown, pair), "-" if None in pair else f"{ours[batch] / theirs[batch]:.2f}"]
        body.append(cells)
    first = next(iter(measured.values()))[0]
    name = f"peer-{first['shape']}"
    return [
        f"Prompts of {first['decode'][0]['prompt_tokens']} tokens, greedy ({facts(first)}):",
        "",
        *table(head, body),
        "",
        f"![{name}]({PLOTS}/{name}.png)",
    ]


def serving(committed: Committed) -> list[str]:
    """What users waited for under the same arrivals, system by system."""
    lines: list[str] = []
    for shape, systems in _by_shape(committed).items():
        first = systems[0]
        lines += [f"**{shape}** ({facts(first)})", ""]
        names = [results["system"] for results in systems]
        head = ["requests a second", "", *names, *(f"over {name}" for name in names[1:])]
        body = []
        rates = [run["rate"] for run in first["runs"]]
        for rate in sorted(rates, key=lambda rate: (rate is None, rate)):
            runs = [next((run for run in each["runs"] if run["rate"] == rate), None) for each in systems]
            body += _rows(rate, runs)
        lines += [*table(head, body), "", f"![serving-{shape}]({PLOTS}/serving-{shape}.png)", ""]
    return lines


def _rows(rate: int | None, runs: list[Results | None]) -> list[list[str]]:
    """The rows of a load, each with the quotients of ours over the others'."""
    if rate is None:
        count = next(run["requests"] for run in runs if run is not None)
        return [_row(f"all {count} at once", "tokens a second", [run and run["tokens_per_s"] for run in runs])]
    return [
        _row(str(rate), f"{what}, {part}", [run and run[name][part] for run in runs])
        for name, (what, parts) in SERVING_METRICS.items()
        for part in parts
    ]


def _row(load: str, what: str, values: list[float | None]) -> list[str]:
    ours, *others = values
    quotients = [f"{ours / other:.2f}" if ours and other else "-" for other in others]
    return [load, what, *map(shown, values), *quotients]


def serving_figures(committed: Committed) -> list[Figure]:
    """First tokens by the rate of requests."""
    figures = []
    for shape, systems in _by_shape(committed).items():
        lines = {
            f"{each['system']}, {part}": tuple(
                (float(run["rate"]), run["ttft_ms"][part]) for run in each["runs"] if run["rate"] is not None
            )
            for each in systems
            for part in ("p50", "p99")
        }
        title = f"{shape}: time to the first token on {systems[0]['device']}"
        figures.append(Figure(f"serving-{shape}.png", title, lines, "requests a second", "ms"))
    return figures


def _by_shape(committed: Committed) -> dict[str, list[Results]]:
    found: dict[str, list[Results]] = {}
    for results in committed.kind("serving").values():
        found.setdefault(results["shape"], []).append(results)
    return {shape: sorted(all_, key=lambda each: each["system"] != "graphexec") for shape, all_ in found.items()}
