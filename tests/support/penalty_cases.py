"""Penalties over long sequences, for the CPU (interpreter) and the GPU alike."""

from __future__ import annotations

import torch

from graphexec.kernels.adjust import adjust_triton
from tests.support.sampling_cases import SamplingCase, adjusted_row, make_state


def check_penalties_of_long_sequences(rows: int, device: str) -> None:
    """Sequences of some 2,100 tokens with many repeats, more of them than tables of counts.

    Parameters and logits are such that nothing is rounded.
    """
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(40, (rows, 2100), generator=generator)
    known = torch.randint(1900, 2100, (rows,), generator=generator)
    state = make_state(
        rows, tokens=tokens.tolist(), num_tokens=known.tolist(), prompt_len=(known // 3).tolist(),
        repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.5,
    )  # fmt: skip
    logits = torch.randint(-64, 64, (rows, 50), generator=generator).float() / 8
    case = SamplingCase(logits, torch.randperm(rows, generator=generator).to(torch.int32), state)
    expected = torch.stack([adjusted_row(case, row) for row in range(rows)])
    moved = case.on(device)
    for _ in range(2):  # the second call would find what the first had left in a table
        adjusted = moved.logits.clone()
        adjust_triton(adjusted, moved.slots, moved.state)
        assert torch.equal(adjusted.cpu(), expected)
