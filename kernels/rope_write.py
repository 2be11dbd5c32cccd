"""Fused query/key norm, rotary embedding and KV-cache write: from the merged projection to rotated queries.

Invariant: a row with a negative KV slot (padding) reads no cos or sin, and writes nowhere.
"""

from __future__ import annotations

import torch

from graphexec.kernels.lang import launches_early, tl, triton, use_triton, wait_for_predecessor

__all__ = ["rope_write", "rope_write_reference", "rope_write_triton"]

HEADS_PER_PROGRAM = 8  # with head size 128 and two warps, a thread moves two 16-byte pieces of bf16


def rope_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    norm_eps: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_slots: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """Normalises and rotates queries and keys, writes keys and values to the cache, returns the queries.

    The norm is Qwen3's RMSNorm over each head (computed in float32, rounded, then multiplied by the weight); the
    rotation is the "rotate half" convention of transformers (RoFormer, Su et al. 2021), computed in float32 and rounded
    once. In float64 everything is computed in float64.

    Args:
        qkv: `[T, (H + 2 * KH) * D]`, contiguous; the merged projection: all query heads, then keys, then values.
        cos, sin: `[T, D]`, contiguous, the model's dtype.
        q_norm, k_norm: `[D]`, the model's dtype; both None for a model without head norms.
        norm_eps: added to the mean square; not read without norms.
        k_cache, v_cache: `[num_blocks, KH, block_size, D]`, contiguous, the model's dtype; written in place.
        kv_slots: `[T]` int64, block * block_size + offset; negative writes nowhere. Written at least two launches
            earlier: see `wait_for_predecessor`.
        num_heads: H.

    Returns:
        `[T, H, D]` in the dtype and on the device of `qkv`. Padding rows (negative KV slot) hold anything.

    Raises:
        ValueError: qkv does not hold H + 2 * KH heads, one norm is missing, or a cache is not contiguous.
    """
    width = (num_heads + 2 * k_cache.shape[1]) * k_cache.shape[3]
    if qkv.shape[1] != width:
        raise ValueError(f"qkv has {qkv.shape[1]} columns; {num_heads} heads over this cache need {width}.")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm come together: give both, or None for both.")
    serve = rope_write_triton if use_triton(qkv) else rope_write_reference
    return serve(qkv, cos, sin, q_norm, k_norm, norm_eps, k_cache, v_cache, kv_slots, num_heads)


def rope_write_reference(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    norm_eps: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_slots: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """`rope_write` in plain torch, for any float dtype and device."""
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    query, key, value = heads.tensor_split([num_heads, num_heads + num_kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        query, key = _head_norm(query, q_norm, norm_eps), _head_norm(key, k_norm, norm_eps)
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)

    written = (kv_slots >= 0).nonzero().squeeze(1)
    block, offset = kv_slots[written] // block_size, kv_slots[written] % block_size
    k_cache[block, :, offset] = key[written]
    v_cache[block, :, offset] = value[written]
    return query


def _head_norm(heads: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = heads.to(_wide(heads))
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * scaled.to(heads.dtype)


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    wide = heads.to(_wide(heads))
    lower, upper = wide.chunk(2, dim=-1)
    rotated = wide * cos.unsqueeze(1) + torch.cat((-upper, lower), dim=-1) * sin.unsqueeze(1)
    return rotated.to(heads.dtype)


def _wide(heads: torch.Tensor) -> torch.dtype:
    return torch.promote_types(heads.dtype, torch.float32)


def rope_write_triton(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    norm_eps: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_slots: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """`rope_write` as one Triton kernel; float32, bfloat16 or float16."""
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("The KV cache of a layer must be contiguous: the kernel derives its strides from its shape.")
    rows = qkv.shape[0]
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    query = torch.empty((rows, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if rows == 0:
        return query
    early = launches_early(qkv)
    _rope_write_kernel[(rows, triton.cdiv(num_heads + 2 * num_kv_heads, HEADS_PER_PROGRAM))](
        qkv,
        cos,
        sin,
        q_norm,
        k_norm,
        norm_eps,
        k_cache,
        v_cache,
        kv_slots,
        query,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        HALF_PADDED=triton.next_power_of_2(head_dim // 2),
        TILE_HEADS=HEADS_PER_PROGRAM,
        HAS_NORM=q_norm is not None,
        EARLY=early,
        num_warps=2 if qkv.element_size() == 2 else 4,
        launch_pdl=early,
    )
    return query


@triton.jit
def _rope_write_kernel(
    qkv,  # [T, (H + 2 * KH) * D]
    cos,  # [T, D]
    sin,  # [T, D]
    q_norm,  # [D], or None without HAS_NORM
    k_norm,  # [D], or None without HAS_NORM
    norm_eps,
    k_cache,  # [num_blocks, KH, BLOCK_SIZE, D]
    v_cache,  # [num_blocks, KH, BLOCK_SIZE, D]
    kv_slots,  # [T]
    query_out,  # [T, H, D]
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: TILE_HEADS consecutive heads of one row, each as its lower and upper half."""
    row = tl.program_id(0).to(tl.int64)
    kv_slot = tl.load(kv_slots + row).to(tl.int64)
    if EARLY:
        wait_for_predecessor()
    if kv_slot < 0:
        return

    HALF: tl.constexpr = HEAD_DIM // 2
    ALL_HEADS: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    heads = (tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS))[:, None]
    dims = tl.arange(0, HALF_PADDED)[None, :]
    is_query = heads < NUM_HEADS
    is_value = heads >= NUM_HEADS + NUM_KV_HEADS
    inside = (heads < ALL_HEADS) & (dims < HALF)

    source = qkv + row * (ALL_HEADS * HEAD_DIM) + heads * HEAD_DIM + dims
    lower_raw = tl.load(source, mask=inside, other=0.0)
    upper_raw = tl.load(source + HALF, mask=inside, other=0.0)
    lower = lower_raw.to(tl.float32)
    upper = upper_raw.to(tl.float32)

    if HAS_NORM:
        mean_square = (tl.sum(lower * lower, axis=1) + tl.sum(upper * upper, axis=1)) / HEAD_DIM
        inverse = tl.rsqrt(mean_square + norm_eps)[:, None]
        q_lower = tl.load(q_norm + dims, mask=dims < HALF, other=0.0).to(tl.float32)
        q_upper = tl.load(q_norm + HALF + dims, mask=dims < HALF, other=0.0).to(tl.float32)
        k_lower = tl.load(k_norm + dims, mask=dims < HALF, other=0.0).to(tl.float32)
        k_upper = tl.load(k_norm + HALF + dims, mask=dims < HALF, other=0.0).to(tl.float32)
        # Rounded before and after the weight, as the model's own norm rounds.
        lower = (lower * inverse).to(lower_raw.dtype).to(tl.float32) * tl.where(is_query, q_lower, k_lower)
        upper = (upper * inverse).to(upper_raw.dtype).to(tl.float32) * tl.where(is_query, q_upper, k_upper)
        lower = lower.to(lower_raw.dtype).to(tl.float32)
        upper = upper.to(upper_raw.dtype).to(tl.float32)

    angle = row * HEAD_DIM + dims
    cos_lower = tl.load(cos + angle, mask=dims < HALF, other=0.0).to(tl.float32)
    cos_upper = tl.load(cos + angle + HALF, mask=dims < HALF, other=0.0).to(tl.float32)
    sin_lower = tl.load(sin + angle, mask=dims < HALF, other=0.0).to(tl.float32)
    sin_upper = tl.load(sin + angle + HALF, mask=dims < HALF, other=0.0).to(tl.float32)
    lower_rotated = (lower * cos_lower - upper * sin_lower).to(lower_raw.dtype)
    upper_rotated = (upper * cos_upper + lower * sin_upper).to(lower_raw.dtype)

    query_at = query_out + row * (NUM_HEADS * HEAD_DIM) + heads * HEAD_DIM + dims
    to_query = inside & is_query
    tl.store(query_at, lower_rotated, mask=to_query)
    tl.store(query_at + HALF, upper_rotated, mask=to_query)

    token_at = (kv_slot // BLOCK_SIZE) * (NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM) + (kv_slot % BLOCK_SIZE) * HEAD_DIM
    key_at = k_cache + token_at + (heads - NUM_HEADS) * (BLOCK_SIZE * HEAD_DIM) + dims
    to_key = inside & (heads >= NUM_HEADS) & (heads < NUM_HEADS + NUM_KV_HEADS)
    tl.store(key_at, lower_rotated, mask=to_key)
    tl.store(key_at + HALF, upper_rotated, mask=to_key)

    value_at = v_cache + token_at + (heads - NUM_HEADS - NUM_KV_HEADS) * (BLOCK_SIZE * HEAD_DIM) + dims
    to_value = inside & is_value
    tl.store(value_at, lower_raw, mask=to_value)
    tl.store(value_at + HALF, upper_raw, mask=to_value)
