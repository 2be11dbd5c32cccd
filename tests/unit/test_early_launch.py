"""Kernels that begin before their predecessor has ended, as compiled for Hopper: what they do until they wait."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from graphexec.kernels import lang


@cache
def compiled() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.compiled_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    ptx: dict[str, str] = json.loads(done.stdout)
    return ptx


@pytest.mark.parametrize(
    ("kernel", "loads"),
    [
        ("decode", 8),  # number and starts of the splits, slot and position of one, blocks of its first tile
        ("prefill", 3),  # rows and slots of the chunks
        ("rope_write", 1),  # KV slot
        ("linear, vectors", 4),  # weights of the first tile
        ("linear, rows", 16),
    ],
)
def test_until_it_waits_a_kernel_reads_weights_or_what_is_two_launches_old_and_writes_nothing(
    kernel: str, loads: int
) -> None:
    lines = compiled()[kernel].splitlines()
    waits = [number for number, line in enumerate(lines) if "griddepcontrol.wait" in line]
    assert len(waits) == 1
    before = "\n".join(lines[: waits[0]])
    assert len(re.findall(r"\bld\.global", before)) == loads
    assert not re.search(r"\bst\.global|\bcp\.async|\batom\.|\bred\.|\bret;|\bexit;", before)


@pytest.mark.parametrize("kernel", ["decode", "prefill", "rope_write", "linear, vectors", "linear, rows"])
def test_no_program_leaves_without_having_waited(kernel: str) -> None:
    """Else a launch could be over before its predecessor, and the next one would take both for finished."""
    lines = compiled()[kernel].splitlines()
    wait = next(number for number, line in enumerate(lines) if "griddepcontrol.wait" in line)
    labels = {found[1]: number for number, line in enumerate(lines) if (found := re.match(r"(\$\w+):", line))}
    jumps = [target for line in lines[:wait] for target in re.findall(r"\bbra(?:\.uni)?\s+(\$\w+);", line)]
    assert all(labels[target] <= wait for target in jumps)
    assert any("griddepcontrol.launch_dependents" in line for line in lines[wait:]), "and it lets the next one begin"
    assert not any("griddepcontrol.launch_dependents" in line for line in lines[:wait])


@pytest.mark.parametrize(("capability", "early"), [((8, 9), False), ((9, 0), True), ((12, 0), True)])
def test_hopper_is_the_first_that_launches_early(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], early: bool
) -> None:
    monkeypatch.setattr(lang, "_capability", lambda device: capability)
    assert lang.launches_early(cast(torch.Tensor, SimpleNamespace(is_cuda=True, get_device=lambda: 0))) == early
