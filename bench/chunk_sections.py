"""The section of steps with prompt chunks: prompts alone, beside decoding requests, and the gaps in front of them."""

from __future__ import annotations

from bench.committed import Committed, Results, facts, shown, table
from bench.plots import PLOTS, Figure

__all__ = ["mixed", "mixed_figures"]


def mixed(committed: Committed) -> list[str]:
    """What prompts cost, by what comes with them."""
    lines: list[str] = []
    for name, results in committed.kind("mixed").items():
        lines += [f"**{results['shape']}**: a prompt alone, from its arrival to its token ({facts(results)})", ""]
        lines += [*_prompts_alone(results), "", f"![{name}]({PLOTS}/{name}.png)", ""]
        lines += ["Steps: the replay of a graph, and how long kernels run in it and in the same step run eagerly", ""]
        lines += [*_steps(results), "", *_gaps(results), ""]
    return lines


def mixed_figures(committed: Committed) -> list[Figure]:
    """Prompts alone, by their length."""
    figures = []
    for name, results in committed.kind("mixed").items():
        lines = {
            sampling: tuple((float(row["prompt_tokens"]), row["wall_ms"]) for row in rows)
            for sampling, rows in _by_sampling(results).items()
        }
        title = f"{results['shape']}: a prompt alone on {results['device']}"
        figures.append(Figure(f"{name}.png", title, lines, "prompt tokens", "ms to its first token"))
    return figures


def _prompts_alone(results: Results) -> list[str]:
    by_sampling = _by_sampling(results)
    lengths = [row["prompt_tokens"] for row in next(iter(by_sampling.values()))]
    body = [[sampling, *(shown(row["wall_ms"]) for row in rows)] for sampling, rows in by_sampling.items()]
    return table(["ms, by prompt tokens", *map(str, lengths)], body)


def _by_sampling(results: Results) -> dict[str, list[Results]]:
    found: dict[str, list[Results]] = {}
    for row in results["prompts"]:
        found.setdefault(row["sampling"], []).append(row)
    return found


def _steps(results: Results) -> list[str]:
    columns = {"load": "step", "kernels": "kernels", "replay_ms": "replay ms", "busy_ms": "busy ms"}
    columns |= {"eager_unpadded_busy_ms": "busy ms, eager, unpadded"}
    return table(list(columns.values()), [[shown(row.get(name)) for name in columns] for row in results["steps"]])


def _gaps(results: Results) -> list[str]:
    gaps = results["gaps"]
    parts = gaps.get("applying a delta, us", {})
    shown_parts = "; ".join(f"{part} {shown(value)}" for part, value in parts.items())
    return [
        f"Without kernels of a step in front of a {kind} step, at depth 1: {shown(each['p50'])} µs (p50)"
        + (f", in which a delta is applied: {shown_parts}." if kind == "mixed" and parts else ".")
        for kind in ("decode", "mixed")
        if (each := gaps.get(f"in front of a {kind} step, us"))
    ]
