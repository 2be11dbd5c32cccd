"""Decode speed of vLLM on random weights.

    PYTHONPATH=/tmp/vllm_site:. python -m bench.peers.vllm.bench --shape qwen3-0.6b --batch 1,64 --traced --json PATH

`pack.sh` and `setup.sh` beside this file bring it to a machine without network. FlashInfer's sampler stays off, which
would compile at the start; greedy sampling does not need it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from bench.peers.measure import Load, arguments_for, load_of, run_peer
from bench.shapes import write_config

__all__ = ["ENVIRONMENT", "Vllm", "engine_settings"]

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, so that a trace sees its kernels
}
_SLOTS = 256
_SPARE_TOKENS = 736  # with prompts of 128 and outputs of 288, sequences may have 1152 tokens


def engine_settings(load: Load, changed: dict[str, object]) -> dict[str, object]:
    """What the engine is told beside its model; `changed` wins."""
    return {
        "dtype": "bfloat16",
        "max_model_len": load.longest + _SPARE_TOKENS,
        "max_num_seqs": max(_SLOTS, *load.batches),
        "gpu_memory_utilization": 0.6 if load.longest <= 2048 else 0.85,
        "enable_prefix_caching": False,  # no prefix of one run's prompts may serve the next
    } | changed


class Vllm:
    """vLLM's engine in this process."""

    handicap: str | None = None

    def __init__(self, load: Load, changed: dict[str, object]) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import vllm  # late: it reads its environment as it is imported
        from vllm import LLM

        self.name = f"vllm {vllm.__version__}"
        self.settings = engine_settings(load, changed)
        self._folder = tempfile.TemporaryDirectory()
        folder = write_config(load.shape, Path(self._folder.name))
        self._engine = LLM(model=str(folder), load_format="dummy", skip_tokenizer_init=True, **self.settings)

    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._engine.generate(requests, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


def main(arguments: list[str]) -> int:
    parser = arguments_for("bench.peers.vllm.bench", __doc__.splitlines()[0])
    parser.add_argument("--engine", type=json.loads, default={}, help='settings to change, {"async_scheduling": false}')
    given = parser.parse_args(arguments)
    command = ["python", "-m", "bench.peers.vllm.bench", *arguments]
    return run_peer(load_of(given), lambda load: Vllm(load, given.engine), command, given.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
