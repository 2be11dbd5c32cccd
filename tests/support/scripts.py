"""Programs that end without `close`, as processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

__all__ = ["run_script"]

_SCRIPT = """
from graphexec import BackendConfig, Engine, EngineConfig, SamplingParams

engine = Engine(
    EngineConfig(
        model="tiny-random", device={device!r}, max_num_seqs=4, max_model_len=64, num_kv_blocks=64,
        compile="off", overlap_depth={depth}, backend=BackendConfig(name={name!r}, verify=False),
    )
)
for index in range(4):
    engine.add_request([5 + index], SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
for _ in range(5):
    engine.step()
print("steps in flight:", len(engine._in_flight))
"""


def run_script(**settings: object) -> subprocess.CompletedProcess[str]:
    """A program that ends without `close`, with steps in flight."""
    return subprocess.run(
        [sys.executable, "-c", _SCRIPT.format(**settings)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
