"""Keeps an engine busy for minutes with mixed traffic, and fails if a step hangs or a request loses a token.

    python -m bench.soak --seconds 160 [--model FOLDER] [--depth 2]

Replays that never complete were seen in the field after two minutes, so the default is longer.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict

from graphexec import BackendConfig, Engine, EngineConfig, SamplingParams

__all__ = ["soak"]


def soak(config: EngineConfig, seconds: float, vocab_size: int) -> dict[str, object]:
    """Runs traffic with shared prefixes, aborts, stops and preemptions for `seconds`; returns what was done."""
    rng = random.Random(0)
    stems = [[rng.randrange(vocab_size) for _ in range(150)] for _ in range(3)]
    wanted: dict[str, int] = {}
    received: dict[str, int] = {}
    reasons: dict[str, int] = {}
    with Engine(config) as engine:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline or engine.has_unfinished():
            if time.monotonic() < deadline and len(wanted) < 2 * config.max_num_seqs and rng.random() < 0.5:
                shared = rng.choice(stems)[: rng.randrange(150)]
                prompt = [*shared, *(rng.randrange(vocab_size) for _ in range(rng.randrange(1, 50)))]
                tokens = rng.randrange(1, 100)
                params = SamplingParams(max_tokens=tokens, temperature=rng.choice([0.0, 0.8]), ignore_eos=True)
                request_id = engine.add_request(prompt, params)
                wanted[request_id], received[request_id] = tokens, 0
            if wanted and rng.random() < 0.01:
                engine.abort(rng.choice(list(wanted)))
            for output in engine.step():
                received[output.request_id] += len(output.new_token_ids)
                if output.finished:
                    reason = str(output.finish_reason)
                    reasons[reason] = reasons.get(reason, 0) + 1
                    expected, got = wanted.pop(output.request_id), received.pop(output.request_id)
                    if reason == "error" or (reason != "abort" and got != expected):
                        raise SystemExit(f"request {output.request_id}: {reason}, {got} of {expected} tokens")
        return {"seconds": seconds, "finished": reasons, **asdict(engine.stats())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=160)
    parser.add_argument("--model", default="tiny-random")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=256)
    options = parser.parse_args()
    config = EngineConfig(
        model=options.model, max_num_seqs=32, max_model_len=320, num_kv_blocks=120,
        overlap_depth=options.depth, backend=BackendConfig(step_timeout_s=20),
    )  # fmt: skip
    print(json.dumps(soak(config, options.seconds, options.vocab_size)))


if __name__ == "__main__":
    main()
