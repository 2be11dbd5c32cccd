"""The manifest: what was captured, what it costs, and what is missing and why."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from graphexec.errors import ConfigError
from graphexec.plan import GraphKey

__all__ = ["CapturedGraph", "GraphGroup", "Manifest"]


@dataclass(frozen=True)
class CapturedGraph:
    """One captured graph.

    Attributes:
        key: what it serves.
        nodes: graph nodes; `kernels` of them are kernels.
        pool_bytes: by how much its capture made the shared pool grow.
        warmup_s: seconds of the eager step before it, which compiles kernels that no earlier shape has compiled.
        capture_s: seconds for capturing and instantiating it.
        fingerprint: equal for graphs of equal structure.
        verified: whether its replay was compared with the eager step.
        pieces: 1, or one more than its eager breaks.
        launches: how often a kernel is launched, by its name.
        replay_us: microseconds from a launch until the device has done it, median of a few; None if nobody measured.
        launch_us: microseconds of them that the host spends launching.
    """

    key: GraphKey
    nodes: int
    kernels: int
    pool_bytes: int
    warmup_s: float
    capture_s: float
    fingerprint: str
    verified: bool
    pieces: int = 1
    launches: Mapping[str, int] = field(default_factory=dict)
    replay_us: float | None = None
    launch_us: float | None = None


@dataclass(frozen=True)
class GraphGroup:
    """Graphs of one phase and variant that differ in little but their size, in ascending order of it.

    With prompt chunks those of the same slots, without those of as many nodes.
    """

    graphs: tuple[CapturedGraph, ...]

    @property
    def first(self) -> CapturedGraph:
        return self.graphs[0]

    @property
    def last(self) -> CapturedGraph:
        return self.graphs[-1]


@dataclass(frozen=True)
class Manifest:
    """Description of a sealed set of graphs.

    Attributes:
        device: name of the device.
        versions: of Python, torch and what else decides what is captured.
        graphs: in the order of capture.
        missing: keys that were left out, as text, with the reason.
        settings: of the engine, those that decide what is captured.
    """

    device: str
    versions: dict[str, str]
    graphs: tuple[CapturedGraph, ...]
    missing: dict[str, str]
    settings: dict[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, device: torch.device, graphs: Sequence[CapturedGraph], missing: Mapping[GraphKey, str]) -> Manifest:
        name, versions = _machine(device)
        return cls(
            device=name,
            versions=versions,
            graphs=tuple(graphs),
            missing={str(key): reason for key, reason in missing.items()},
        )

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads what `write` wrote.

        Raises:
            ConfigError: the file cannot be read, or holds something else.
        """
        try:
            content = json.loads(path.read_text())
            graphs = [CapturedGraph(**each | {"key": GraphKey(**each["key"])}) for each in content["graphs"]]
            return cls(
                content["device"], content["versions"], tuple(graphs), content["missing"], content.get("settings", {})
            )
        except OSError as failure:
            raise ConfigError(f"Cannot read {path}: {failure.strerror}.") from failure
        except (ValueError, KeyError, TypeError) as failure:
            raise ConfigError(
                f"{path} is no manifest of captured graphs, as warmup --report writes it: {failure}."
            ) from failure

    def check(self, device: torch.device, settings: Mapping[str, object]) -> None:
        """Checks that it was made on such a device, by these versions, with these settings.

        Raises:
            ConfigError: names everything that differs.
        """
        name, versions = _machine(device)
        here = {"device": name, **versions, **json.loads(json.dumps(settings))}
        there = {"device": self.device, **self.versions, **self.settings}
        wrong = [
            f"{each} is {here.get(each)!r} here and {there.get(each)!r} there"
            for each in dict.fromkeys((*here, *there))
            if here.get(each) != there.get(each)
        ]
        if wrong:
            raise ConfigError(f"manifest mismatch: {'; '.join(wrong)}.")

    def groups(self) -> list[GraphGroup]:
        """The graphs, in groups: hundreds of rows that differ in nothing are no use to a reader."""
        found: dict[tuple[object, ...], list[CapturedGraph]] = {}
        for graph in reversed(self.graphs):
            key = graph.key
            # The smallest steps of a ladder have as many slots as rows, whatever slots were asked for.
            same = ("slots", key.bucket < key.rows and key.bucket) if key.has_chunks else ("nodes", graph.nodes)
            found.setdefault((key.phase, key.variant, *same), []).append(graph)
        return [GraphGroup(tuple(graphs)) for graphs in found.values()]

    @property
    def capture_s(self) -> float:
        """Seconds that all captures took, warm-up and verification apart."""
        return sum(graph.capture_s for graph in self.graphs)

    @property
    def pool_bytes(self) -> int:
        return sum(graph.pool_bytes for graph in self.graphs)

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"capture_s": self.capture_s, "pool_bytes": self.pool_bytes}, indent=1)

    def write(self, path: Path) -> None:
        path.write_text(self.to_json() + "\n")


def _machine(device: torch.device) -> tuple[str, dict[str, str]]:
    """Name of a device, and versions of what else decides what is captured."""
    is_cuda = device.type == "cuda"
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    if is_cuda and torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return torch.cuda.get_device_name(device) if is_cuda else "cpu", versions
