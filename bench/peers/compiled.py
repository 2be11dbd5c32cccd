"""Decode speed of transformers' model under torch.compile(mode="reduce-overhead"), over a static KV cache.

    python -m bench.peers.compiled --shape qwen3-0.6b --batch 1,64,256 --json PATH

What a user gets without an engine: the prompts of a batch begin and end together, nothing is scheduled, and the cache
has one length for all. After each step the new tokens are read, as whoever looks for a stop token must.
"""

from __future__ import annotations

import sys

import torch
from transformers import PreTrainedModel, StaticCache

from bench.peers.measure import Load, arguments_for, load_of, run_peer
from bench.peers.transformers_batching import random_model

__all__ = ["Compiled"]

_HANDICAP = (
    "A loop over a fixed batch, no engine: requests begin and end together, so it schedules nothing, and it attends to "
    "the whole static cache in every step."
)


class Compiled:
    """A batch of another size is compiled anew, in its first run."""

    handicap: str | None = _HANDICAP

    def __init__(self, load: Load, compiler: str = "inductor") -> None:
        """`compiler` is a backend of torch.compile; any but inductor is for a smoke run."""
        self._load = load
        self._compiler = compiler
        self._model: PreTrainedModel = random_model(load, "sdpa")
        self._batch = 0
        mode = "reduce-overhead" if compiler == "inductor" else None
        self.name = f"torch.compile {torch.__version__}"
        self.settings: dict[str, object] = {"mode": mode, "compiler": compiler, "dynamic": False, "attention": "sdpa"}

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        if len(prompts) != self._batch:
            self._begin(len(prompts))
        ids = torch.tensor(prompts, device=self._load.device)
        self._cache.reset()
        latest = self._forward(ids)  # the prompts, eagerly: they are not what is measured
        outputs = [[token] for [token] in latest.tolist()]
        for _ in range(tokens - 1):
            torch.compiler.cudagraph_mark_step_begin()
            latest = self._step(latest).clone()  # the graph's own output is overwritten by its next replay
            for output, [token] in zip(outputs, latest.tolist(), strict=True):  # waits for the device
                output.append(token)
        return outputs

    def _begin(self, batch: int) -> None:
        torch.compiler.reset()  # also drops the graphs of the batch before, and with them its cache
        self._batch = batch
        self._cache = StaticCache(config=self._model.config, max_cache_len=self._load.longest)
        mode = self.settings["mode"]
        options = {} if mode is None else {"mode": mode}
        self._step = torch.compile(self._forward, backend=self._compiler, dynamic=False, fullgraph=True, **options)

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The likeliest next tokens, [batch, 1]."""
        logits = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)


def main(arguments: list[str]) -> int:
    parser = arguments_for("bench.peers.compiled", __doc__.splitlines()[0])
    parser.add_argument("--compiler", default="inductor", help='a backend of torch.compile; "eager" for a smoke run')
    given = parser.parse_args(arguments)
    command = ["python", "-m", "bench.peers.compiled", *arguments]
    return run_peer(load_of(given), lambda load: Compiled(load, given.compiler), command, given.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
