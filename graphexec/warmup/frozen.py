"""The frozen-number check of `graphexec warmup`: over every captured graph, and told in a few sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from graphexec.backends import Progress
from graphexec.backends.frozen import check_frozen
from graphexec.capture.frozen import FrozenCheck
from graphexec.config import EngineConfig
from graphexec.engine.assemble import Assembly
from graphexec.engine.resolve import resolve
from graphexec.errors import ConfigError
from graphexec.models.loader import load_config, model_folder
from graphexec.runtime import create_runtime

__all__ = ["check_graphs", "refuse_on_cpu", "sentences"]

_SHOWN = 3


def refuse_on_cpu(config: EngineConfig) -> None:
    """Refuses, before anything takes long, a device on which there are no graphs to read.

    Raises:
        ConfigError: the device is the CPU.
    """
    if resolve(config, load_config(model_folder(config.model))).device.type == "cpu":
        raise ConfigError(
            "--check-frozen reads captured graphs, and needs CUDA. On the CPU, graphexec.check_capturable finds what a "
            "capture would refuse."
        )


def check_graphs(parts: Assembly, config: EngineConfig, progress: Progress) -> list[FrozenCheck]:
    """Checks each graph that the warm-up of `parts` captured; its backend must be closed."""
    keys = [graph.key for graph in parts.manifest.graphs]
    return check_frozen(parts.program, config.backend, create_runtime(parts.resolved.device), keys, progress)


def sentences(checks: Sequence[FrozenCheck]) -> list[str]:
    """What was found and what was not looked at."""
    leaks = [f"frozen: in the graph of the {check.key}, {leak}" for check in checks for leak in check.leaks]
    checked = sum(check.checked for check in checks)
    unread = [node.split(", ", 1)[-1].partition(": ") for check in checks for node in check.unchecked]
    reasons = Counter(reason for _, _, reason in unread)
    names = {reason: list(dict.fromkeys(name for name, _, why in unread if why == reason)) for reason in reasons}
    noisy = sum(len(check.noise) for check in checks)
    lines = [f"frozen numbers: {checked} nodes of {len(checks)} graphs compared, {len(leaks)} leaks", *leaks]
    if noisy:
        lines.append(f"not compared: {noisy} stretches of arguments that differ with every capture, as padding does")
    for reason, count in reasons.most_common():
        shown = ", ".join(names[reason][:_SHOWN]) + (", ..." if len(names[reason]) > _SHOWN else "")
        lines.append(f"unchecked: {count} nodes of {len(names[reason])} names ({shown}): {reason}")
    return lines
