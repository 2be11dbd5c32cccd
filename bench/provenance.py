"""Where a result comes from (commit, versions, device, command, the round that it shares with others), and its file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["provenance", "write_results"]

_PACKAGES = ("torch", "triton", "transformers", "cuda-python", "cuda-bindings", "numpy", "pytest-benchmark", "vllm")
_FOLDERS = re.compile(r"(?:(?<==)|^)/(?:[^/]*/)*")  # of an absolute path: no fact about what was measured
_NUMBERS = re.compile(r"\[\s+(-?[\d.e+-]+(?:,\s+-?[\d.e+-]+)*)\s+\]")


def provenance(command: list[str], device: torch.device) -> dict[str, object]:
    """Facts about a run that belong into its file.

    Args:
        command: the command line, as a list of words.
        device: what was measured.
    """
    is_cuda = device.type == "cuda"
    return {
        "commit": _commit(),
        "round": os.environ.get("BENCH_ROUND"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(_FOLDERS.sub("", word) for word in command),
        "device": torch.cuda.get_device_name(device) if is_cuda else platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda}
        | {name: _version(name) for name in _PACKAGES},
    }


def write_results(path: Path, results: dict[str, object]) -> None:
    """Writes a results file as JSON, with a list of numbers, such as samples, on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = _NUMBERS.sub(lambda numbers: f"[{' '.join(numbers[1].split())}]", json.dumps(results, indent=1))
    path.write_text(text + "\n")


def _commit() -> str:
    """From the environment where the checkout travels without its history, else from git; "+" if it was changed."""
    named = os.environ.get("GRAPHEXEC_COMMIT")
    if named:
        return named
    try:
        commit = _git("rev-parse", "HEAD").strip()
        return commit + "+" if _git("status", "--porcelain", "--untracked-files=no").strip() else commit
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10).stdout


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
