"""Turns every "decide for me" of the configuration into a value, in this order, and says why.

1. device: CUDA if there is one, else the CPU.
2. dtype: the checkpoint's on CUDA, float32 on the CPU.
3. max_model_len: what the model allows, at most 4096.
4. max_num_batched_tokens: 2048, and at least one row for each slot.
5. compile: per layer on CUDA, off on the CPU (a small model starts faster than it compiles).
6. num_kv_blocks: on the CPU enough for every slot at full length, at most 2 GiB; on CUDA it is measured later.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from graphexec.config import CompileMode, EngineConfig
from graphexec.errors import ConfigError
from graphexec.models.architectures import check_supported, head_dim

__all__ = ["ResolvedConfig", "kv_block_bytes", "resolve"]

_log = logging.getLogger(__name__)

_DEFAULT_MODEL_LEN = 4096
_DEFAULT_BATCHED_TOKENS = 2048
_CPU_CACHE_BYTES = 2 << 30


@dataclass(frozen=True)
class ResolvedConfig:
    """An EngineConfig without open questions.

    Attributes:
        num_kv_blocks: blocks beside the reserved one; None when it is to be measured on the device.
        reasons: for each value that was decided here, why.
    """

    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    max_num_batched_tokens: int
    compile: CompileMode
    num_kv_blocks: int | None
    reasons: dict[str, str]


def resolve(config: EngineConfig, model_config: Any) -> ResolvedConfig:
    """Decides what `config` leaves open, for a model with this transformers configuration.

    Raises:
        ConfigError: the model is not supported, or a wish cannot be met.
    """
    reasons: dict[str, str] = {}
    device = _device(config, reasons)
    check_supported(model_config, device)
    dtype = _dtype(config, model_config, device, reasons)
    max_model_len = _max_model_len(config, model_config, reasons)
    batched = config.max_num_batched_tokens
    if batched is None:
        batched = max(_DEFAULT_BATCHED_TOKENS, config.max_num_seqs)
        reasons["max_num_batched_tokens"] = f"{batched}: the default, and at least max_num_seqs"
    mode = config.compile
    if mode is None:
        mode = "layer" if device.type == "cuda" else "off"
        reasons["compile"] = f"{mode}: the default on {device.type}"
    blocks = config.num_kv_blocks
    if blocks is None and device.type == "cpu":
        blocks = _cpu_blocks(config, model_config, dtype, max_model_len)
        reasons["num_kv_blocks"] = f"{blocks}: every slot at full length, at most {_CPU_CACHE_BYTES >> 30} GiB"
    for name, reason in reasons.items():
        _log.info("%s = %s", name, reason)
    return ResolvedConfig(device, dtype, max_model_len, batched, mode, blocks, reasons)


def kv_block_bytes(model_config: Any, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV block over all layers."""
    per_token = 2 * model_config.num_hidden_layers * model_config.num_key_value_heads * head_dim(model_config)
    return int(per_token * block_size * dtype.itemsize)


def _device(config: EngineConfig, reasons: dict[str, str]) -> torch.device:
    if config.device != "auto":
        return torch.device(config.device)
    name = "cuda" if torch.cuda.is_available() else "cpu"
    reasons["device"] = f"{name}: " + ("torch finds a CUDA device" if name == "cuda" else "torch finds no CUDA device")
    return torch.device(name)


def _dtype(config: EngineConfig, model_config: Any, device: torch.device, reasons: dict[str, str]) -> torch.dtype:
    if config.dtype == "auto":
        stored = getattr(model_config, "dtype", None) or torch.float32
        dtype: torch.dtype = stored if device.type == "cuda" else torch.float32
        why = "the checkpoint's" if device.type == "cuda" else "the fastest that the CPU computes exactly"
        reasons["dtype"] = f"{str(dtype).removeprefix('torch.')}: {why}"
        return dtype
    if config.dtype == "float64" and device.type == "cuda":
        raise ConfigError('dtype="float64" runs on the CPU only: it is the setting of equality tests.')
    named: torch.dtype = getattr(torch, config.dtype)
    return named


def _max_model_len(config: EngineConfig, model_config: Any, reasons: dict[str, str]) -> int:
    allowed = int(getattr(model_config, "max_position_embeddings", _DEFAULT_MODEL_LEN))
    if config.max_model_len is None:
        length = min(allowed, _DEFAULT_MODEL_LEN)
        reasons["max_model_len"] = f"{length}: what the model allows ({allowed}), at most {_DEFAULT_MODEL_LEN}"
        return length
    if config.max_model_len > allowed:
        raise ConfigError(f"max_model_len={config.max_model_len} is more than the model's {allowed} positions.")
    return config.max_model_len


def _cpu_blocks(config: EngineConfig, model_config: Any, dtype: torch.dtype, max_model_len: int) -> int:
    wanted = config.max_num_seqs * -(-max_model_len // config.kv_block_size)
    affordable = _CPU_CACHE_BYTES // kv_block_bytes(model_config, config.kv_block_size, dtype)
    return max(min(wanted, affordable), -(-max_model_len // config.kv_block_size))
