"""vLLM under the arrivals of bench.serving, on random weights.

PYTHONPATH=/tmp/vllm_site:. python -m bench.peers.vllm.serving --shape qwen3-0.6b --rate 10,40 --json PATH
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from bench.peers.vllm.bench import ENVIRONMENT
from bench.serving import LONGEST, SLOTS, arguments_for, run
from bench.shapes import SHAPES, Shape, write_config

__all__ = ["VllmServer"]


class VllmServer:
    """vLLM's engine in this process, stepped by hand."""

    def __init__(self, shape: Shape, folder: Path, changed: dict[str, object]) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import vllm  # late: it reads its environment as it is imported
        from vllm import LLM

        self.name = f"vllm {vllm.__version__}"
        self.settings: dict[str, object] = {
            "dtype": "bfloat16",
            "max_model_len": LONGEST,
            "max_num_seqs": SLOTS,
            "max_num_batched_tokens": shape.max_num_batched_tokens,
            "gpu_memory_utilization": 0.6,
            "enable_prefix_caching": False,
        } | changed
        model = str(write_config(shape, folder))
        self._engine = LLM(model=model, load_format="dummy", skip_tokenizer_init=True, **self.settings).llm_engine

    def add(self, request: int, prompt: list[int], tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(str(request), {"prompt_token_ids": prompt}, params)

    def step(self) -> list[tuple[int, int]]:
        return [(int(each.request_id), len(each.outputs[0].token_ids)) for each in self._engine.step()]


def main(arguments: list[str]) -> int:
    parser = arguments_for("bench.peers.vllm.serving", (__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", type=json.loads, default={}, help='settings to change, {"async_scheduling": false}')
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        server = VllmServer(SHAPES[given.shape], Path(folder), given.engine)
        return run(server, given, ["python", "-m", "bench.peers.vllm.serving", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
