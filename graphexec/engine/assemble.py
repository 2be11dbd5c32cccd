"""Puts an engine together: model, KV cache, program, backend, in the order that sizes depend on each other."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from graphexec.backends import ExecutionBackend, Progress, create_backend
from graphexec.capture.manifest import Manifest
from graphexec.config import CompileMode, EngineConfig
from graphexec.engine.cache_size import measure_num_blocks, minimal_num_blocks
from graphexec.engine.program import DecoderProgram
from graphexec.engine.resolve import ResolvedConfig, kv_block_bytes, resolve
from graphexec.errors import ConfigError
from graphexec.kernels.lang import launches_early, settle_cache_folder
from graphexec.models.decoder import Decoder
from graphexec.models.loader import load_config, load_model, load_tokenizer, model_folder
from graphexec.models.tokenizer import Tokenizer
from graphexec.runtime import Runtime, create_runtime
from graphexec.slots import SlotLimits

__all__ = ["Assembly", "assemble"]

Compiler = str | Callable[..., object]
"""A backend of torch.compile, by name or as a callable."""

_log = logging.getLogger(__name__)

_OF_CAPTURES = ("name", "capture_sizes", "prefill_sizes", "prefill_slots", "decode", "prefill", "variants")


@dataclass(frozen=True)
class Assembly:
    """The parts of an engine, ready to run.

    Attributes:
        num_blocks: KV blocks, the reserved one included.
        startup_s: seconds that each part of the assembly took, by its name, in order.
    """

    resolved: ResolvedConfig
    backend: ExecutionBackend
    program: DecoderProgram
    manifest: Manifest
    limits: SlotLimits
    num_blocks: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    tokenizer: Tokenizer | None
    startup_s: Mapping[str, float] = field(default_factory=dict)


def assemble(config: EngineConfig, progress: Progress | None) -> Assembly:
    """Loads the model, sizes the KV cache, compiles, captures.

    Raises:
        ConfigError, CaptureError: see Engine.
    """
    laps = _Laps()
    folder = model_folder(config.model)
    model_config = load_config(folder)
    resolved = resolve(config, model_config)
    runtime = create_runtime(resolved.device)
    settings = _what_decides_captures(config, resolved, folder.name)
    if config.expected_manifest is not None:  # before anything takes long
        Manifest.read(Path(config.expected_manifest)).check(resolved.device, settings)
    if resolved.device.type == "cuda":
        settle_cache_folder()
    tokenizer = load_tokenizer(folder)
    load_format = "random" if config.model == "tiny-random" else config.load_format
    loaded = load_model(folder, model_config, load_format, resolved.device, resolved.dtype, config.seed)
    decoder = Decoder(loaded.model, resolved.max_model_len)
    compile_decoder(decoder, resolved.compile)
    limits = SlotLimits(
        max_slots=config.max_num_seqs,
        max_tokens=resolved.max_model_len,
        # Beside the chunks, a step may be launched with a row for every slot that its bound counts.
        max_rows=resolved.max_num_batched_tokens + config.max_num_seqs,
        block_size=config.kv_block_size,
        max_stop_ids=config.max_stop_token_ids,
        max_biases=config.max_biased_token_ids,
        max_stop_sequences=config.max_stop_sequences,
        max_stop_sequence_tokens=config.max_stop_sequence_tokens,
    )
    program = DecoderProgram(decoder, loaded.model.lm_head, limits)
    laps.end("load")
    try:
        num_blocks = _size_cache(config, resolved, runtime, program, decoder, model_config)
        allocate_caches(decoder, num_blocks, config.kv_block_size)
        laps.end("size the KV cache")
        backend = create_backend(config.backend, runtime)
        manifest = replace(_warm_up(backend, program, progress), settings=settings)
    except torch.OutOfMemoryError as failure:
        raise ConfigError(
            "The model, its KV cache and its largest step do not fit into device memory. Lower num_kv_blocks, "
            "max_num_batched_tokens or max_num_seqs, or use a smaller dtype."
        ) from failure
    laps.end("warm up")
    return Assembly(
        resolved=resolved,
        backend=backend,
        program=program,
        manifest=manifest,
        limits=limits,
        num_blocks=num_blocks,
        vocab_size=int(model_config.vocab_size),
        eos_token_ids=loaded.eos_token_ids,
        tokenizer=tokenizer,
        startup_s=laps.seconds,
    )


class _Laps:
    """A stopwatch."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._began = now - self._began, now


def _what_decides_captures(config: EngineConfig, resolved: ResolvedConfig, model: str) -> dict[str, object]:
    names = ("compile", "max_model_len", "max_num_batched_tokens")
    sizes = config.backend.model_dump(include={*_OF_CAPTURES}, mode="json")
    return {
        "model": model,
        "dtype": str(resolved.dtype),
        "max_num_seqs": config.max_num_seqs,
        "kv_block_size": config.kv_block_size,
        **{name: getattr(resolved, name) for name in names},
        **{f"backend.{name}": value for name, value in sizes.items()},
    }


def compile_decoder(decoder: Decoder, mode: CompileMode, compiler: Compiler = "inductor") -> None:
    """Compiles the decoder in place: two compilations, for one row and for several, since no number is read inside.

    By layers these are two of what is in front of the layers, and two of a layer: all layers share their code.

    Where our kernels begin early, inductor's do, too. They wait before they read what the kernel in front of them
    wrote, and before they let the next one begin. Two kinds would break the rule of `wait_for_predecessor`. A kernel
    that reads nothing does not wait at all. A reduction in a loop over what older kernels wrote may store before it
    waits. tests/engine/test_compile.py holds that a decoder has neither: what ends a layer reads its predecessor's
    output in the first of its loops, and waits in front of that.
    """
    modules = {"model": [decoder], "layer": [decoder.entry, *decoder.layers], "off": []}[mode]
    early = compiler == "inductor" and launches_early(decoder.embedding)
    options = {"triton.enable_pdl": True} if early else None
    for module in modules:
        module.compile(backend=compiler, dynamic=True, fullgraph=True, options=options)


def allocate_caches(decoder: Decoder, num_blocks: int, block_size: int) -> None:
    """Gives every layer a KV cache of `num_blocks` blocks."""
    for attention in decoder.attentions:
        attention.allocate_cache(num_blocks, block_size)


def _size_cache(
    config: EngineConfig,
    resolved: ResolvedConfig,
    runtime: Runtime,
    program: DecoderProgram,
    decoder: Decoder,
    model_config: Any,
) -> int:
    """Number of KV blocks, the reserved one included."""
    limits = program.limits
    if resolved.num_kv_blocks is not None:
        return resolved.num_kv_blocks + 1
    block_bytes = kv_block_bytes(model_config, config.kv_block_size, resolved.dtype)
    allocate_caches(decoder, minimal_num_blocks(limits), config.kv_block_size)
    return measure_num_blocks(program, limits, config.backend, runtime, block_bytes, config.kv_memory_fraction)


def _warm_up(backend: ExecutionBackend, program: DecoderProgram, progress: Progress | None) -> Manifest:
    try:
        backend.prepare(program)
        return backend.warmup(progress)
    except BaseException:
        backend.close()
        raise
