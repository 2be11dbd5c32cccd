"""The choice of sizes under a budget, as settings, and as words for who asked for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphexec.backends import Progress
from graphexec.capture.budget import Budget, Choice, SizeLadder, choose, expected_us
from graphexec.capture.manifest import Manifest
from graphexec.capture.traffic import Traffic
from graphexec.config import BackendConfig, EngineConfig
from graphexec.errors import ConfigError
from graphexec.plan import GraphKey
from graphexec.warmup.costs import size_ladders
from graphexec.warmup.probe import probe

__all__ = ["Selection", "overruns", "select"]

_PHASE = {"capture_sizes": "decode", "prefill_sizes": "prefill"}
"""The setting that turns off the steps of a ladder."""


@dataclass(frozen=True)
class Selection:
    """Sizes that were chosen.

    Attributes:
        settings: of the backend, those that make the choice: sizes, and "off" where a ladder has none.
        left_out: sizes that no graph will have, by the setting that would name them.
        notes: what the choice is expected to cost and to bring.
    """

    settings: dict[str, tuple[int, ...] | str]
    left_out: dict[str, tuple[int, ...]]
    notes: tuple[str, ...]

    def apply(self, config: BackendConfig) -> BackendConfig:
        """The configuration with the choice."""
        return config.model_copy(update=self.settings)

    def leaves_out(self, key: GraphKey) -> bool:
        """Whether the graph of this key was left out."""
        size = key.rows if key.has_chunks else key.bucket
        return size in self.left_out.get("prefill_sizes" if key.has_chunks else "capture_sizes", ())

    def to_toml(self) -> str:
        """The choice as it stands in a configuration file, with what was left out as comments."""
        lines = ["[backend]"]
        for name, value in self.settings.items():
            lines.append(f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {list(value)}")
        lines += [f"# left out of {name}: {_listed(sizes)}" for name, sizes in self.left_out.items() if sizes]
        return "\n".join(lines)


def select(config: EngineConfig, budget: Budget, traffic: Traffic | None, progress: Progress | None) -> Selection:
    """Measures what the sizes of `config` cost, and chooses those that serve the traffic fastest.

    Args:
        traffic: None for steps of all sizes alike.

    Raises:
        ConfigError: the budget does not pay for a single size, or there is nothing to choose.
    """
    if config.expected_manifest is not None:
        raise ConfigError("expected_manifest fixes the sizes that a budget is to choose. Leave out one of them.")
    probed = probe(config, progress)
    traffic = traffic or Traffic.uniform(config.max_num_seqs, probed.max_rows)
    ladders = size_ladders(probed, traffic)
    if not any(demand.steps for ladder in ladders for demand in ladder.demands):
        raise ConfigError("The traffic has no step that could have a graph: there is nothing to choose.")
    return selection(ladders, choose(ladders, budget))


def selection(ladders: Sequence[SizeLadder], choice: Choice) -> Selection:
    """A choice from these ladders, in words."""
    steps = sum(demand.steps for ladder in ladders for demand in ladder.demands)
    settings: dict[str, tuple[int, ...] | str] = {}
    left_out = {}
    for ladder, sizes in zip(ladders, choice.sizes, strict=True):
        settings[ladder.name if sizes else _PHASE[ladder.name]] = sizes or "off"
        left_out[ladder.name] = tuple(each.size for each in ladder.candidates if each.size not in sizes)
    everything = sum(expected_us(ladder, range(len(ladder.candidates))) for ladder in ladders)
    eager = sum(ladder.eager_us for ladder in ladders)
    notes = [
        f"expected: {choice.mib:.1f} MiB, {choice.seconds:.2f} s of capturing; a step takes "
        f"{choice.expected_us / steps:.0f} us on average, {everything / steps:.0f} with every size, "
        f"{eager / steps:.0f} without graphs"
    ]
    notes += [f"left out of {name}: {_listed(sizes)}" for name, sizes in left_out.items() if sizes] or [
        "nothing was left out"
    ]
    if not any(choice.sizes):
        notes.append("no size is worth its graphs: the steps are no faster with them")
    if choice.rounding:
        notes.append(f"to keep the search short, costs were rounded up to 1/{1 / choice.rounding:.0f} of the budget")
    return Selection(settings, left_out, tuple(notes))


def overruns(captured: Manifest, budget: Budget) -> list[str]:
    """Sentences about what the graphs took beyond the budget."""
    spent = (
        ("MiB", captured.pool_bytes / 2**20, budget.mib),
        ("s of capturing", captured.capture_s, budget.seconds),
    )
    return [
        f"The graphs took {used:.2f} {unit}, {used - limit:.2f} more than the budget of {limit:g}: the cost of sizes "
        "between those that were tried is an estimate. Lower the budget by as much."
        for unit, used, limit in spent
        if used > limit
    ]


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
