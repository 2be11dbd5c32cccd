"""Decode speed of transformers' continuous batching, with CUDA graphs and asynchronous batching.

    python -m bench.peers.transformers_batching --shape qwen3-0.6b --batch 1,64 --json PATH

Handicapped: its fast decode path needs flash-attention, and without it every step attends under a mask.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from bench.peers.measure import Load, arguments_for, load_of, run_peer

__all__ = ["ContinuousBatching", "continuous_batching", "random_model"]

_HANDICAP = (
    "Its fast decode path needs flash-attention, which is not installed: attention is paged|sdpa under a mask, on the "
    "path for sequences of varying length."
)
_BLOCK_SIZE = 256
_ROWS = 2048  # of a step, as graphexec has them
_KV_PADDING = 1024  # tokens; by default 16,384, over which a single request would attend too
_ANSWER_S = 120.0
_SETTINGS = ("block_size", "num_blocks", "max_batch_tokens", "kv_padding_interval_size")


def random_model(load: Load, attention: str) -> PreTrainedModel:
    """The shape with seeded random weights, on the load's device."""
    config = AutoConfig.for_model(**load.shape.config)
    torch.manual_seed(0)
    with torch.device(load.device):
        dtype = getattr(torch, str(load.shape.config["dtype"]))
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval()


class ContinuousBatching:
    """One manager for all runs: its thread goes on between them, as a server's does."""

    name = f"transformers {transformers.__version__}"
    handicap: str | None = _HANDICAP

    def __init__(self, model: PreTrainedModel, manager: object, settings: dict[str, object]) -> None:
        self._model = model
        self._manager = manager
        self.settings = settings

    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        manager = self._manager
        ids = manager.add_requests(prompts, max_new_tokens=tokens)
        finished: dict[str, list[int]] = {}
        while len(finished) < len(prompts):
            result = manager.get_result(timeout=_ANSWER_S)
            if result is None:
                cause = manager.background_thread_status.fatal_error
                raise RuntimeError(f"No answer for {_ANSWER_S:g} s, or its thread has ended ({cause!r}).") from cause
            if result.error is not None:
                raise RuntimeError(f"A request failed: {result.error}")
            if result.is_finished():
                finished[result.request_id] = result.generated_tokens
        return [finished[request_id] for request_id in ids]


@contextmanager
def continuous_batching(load: Load) -> Iterator[ContinuousBatching]:
    """A warmed-up manager with KV blocks for the largest batch at its full length."""
    on_gpu = load.device == "cuda"
    requests = max(load.batches)
    blocks = requests * (-(-load.longest // _BLOCK_SIZE) + 1)
    config = ContinuousBatchingConfig(
        block_size=_BLOCK_SIZE,
        num_blocks=blocks,
        max_batch_tokens=max(_ROWS, requests),
        max_requests_per_batch=requests,
        allow_block_sharing=False,  # no prefix of one run's prompts may serve the next
        use_cuda_graph=on_gpu,
        use_async_batching=on_gpu,
        kv_padding_interval_size=_KV_PADDING if on_gpu else 0,
    )
    model = random_model(load, "paged|sdpa")
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=load.longest - min(load.prompts))
    with model.continuous_batching_context_manager(
        generation_config=greedy, continuous_batching_config=config, timeout=30, warmup=on_gpu
    ) as manager:
        settings = {name: getattr(config, name) for name in _SETTINGS}
        settings |= {"attention": "paged|sdpa", "use_cuda_graph": on_gpu, "use_async_batching": on_gpu}
        yield ContinuousBatching(model, manager, settings)


def main(arguments: list[str]) -> int:
    given = arguments_for("bench.peers.transformers_batching", __doc__.splitlines()[0]).parse_args(arguments)
    load = load_of(given)
    command = ["python", "-m", "bench.peers.transformers_batching", *arguments]
    with continuous_batching(load) as peer:
        return run_peer(load, lambda _: peer, command, given.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
