"""What the device learns about a request that gets a slot."""

from __future__ import annotations

import math

from graphexec.deltas import Admission
from graphexec.engine.request import Request

__all__ = ["admission"]


def admission(request: Request, seq_len: int) -> Admission:
    """The slot's new owner, of whose tokens the first `seq_len` are in the KV cache already."""
    params, prompt_len = request.params, len(request.prompt_token_ids)
    return Admission(
        seq_len=seq_len,
        num_tokens=request.num_tokens,
        max_len=request.max_len,
        min_len=min(prompt_len + params.min_tokens, request.max_len),
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        seed=request.seed,
        stop_ids=request.stop_ids,
        prompt_len=prompt_len,
        log_min_p=math.log(params.min_p) if params.min_p > 0 else -math.inf,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        biases=request.biases,
        stop_sequences=tuple(map(tuple, params.stop_sequences)),
    )
