"""Counter-based random numbers (Philox4x32-10): the same 32-bit words from the kernel and from its torch reference.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A word is a function of a
64-bit key and a 128-bit counter and of nothing else, so a draw does not depend on batch, order or device.
"""

from __future__ import annotations

import torch

from graphexec.kernels.lang import tl, triton

__all__ = ["philox_reference", "philox_words", "uniform", "uniform_reference"]

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_GRID_BITS = 23


@triton.jit
def philox_words(seed, c0, c1, c2, c3):
    """Four blocks of uint32 words; `seed`: scalar int64; `c0` to `c3`: int32, shapes that broadcast."""
    return tl.philox(seed, c0, c1, c2, c3)


@triton.jit
def uniform(word):
    """float32 in the open interval (0, 1) from a uint32 word: `((word >> 9) + 0.5) * 2**-23`, exact in float32."""
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


def philox_reference(
    seed: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10 in integer arithmetic.

    Args:
        seed: int64, any device; the key is its low word, then its high word.
        c0, c1, c2, c3: int64 counter words; only the low 32 bits count. All shapes broadcast.

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2**32).
    """
    key_low, key_high = seed & _WORD, (seed >> 32) & _WORD
    c0, c1, c2, c3 = (c & _WORD for c in (c0, c1, c2, c3))
    for _ in range(_ROUNDS):
        # The products need 64 unsigned bits: int64 wraps, which keeps every bit; the mask drops the shifted-in sign.
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((right >> 32) & _WORD) ^ c1 ^ key_low,
            right & _WORD,
            ((left >> 32) & _WORD) ^ c3 ^ key_high,
            left & _WORD,
        )
        key_low, key_high = (key_low + _KEY_STEPS[0]) & _WORD, (key_high + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def uniform_reference(word: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers of `uniform` (float32-exact also when `dtype` is float64) from int64 words in [0, 2**32)."""
    return ((word >> (32 - _GRID_BITS)).to(dtype) + 0.5) * 2.0**-_GRID_BITS
