"""Sizes the KV cache before anything is captured, since graphs hold its addresses."""

from __future__ import annotations

import logging

import torch

from graphexec.backends import bucket_sizes, create_backend
from graphexec.config import BackendConfig
from graphexec.deltas import Admission, SlotDeltas, as_words
from graphexec.engine.program import DecoderProgram
from graphexec.errors import ConfigError
from graphexec.plan import StepPlan
from graphexec.runtime import Runtime
from graphexec.slots import SlotLimits

__all__ = ["measure_num_blocks", "minimal_num_blocks"]

_log = logging.getLogger(__name__)

_LESS = "Lower max_model_len, max_num_seqs or max_num_batched_tokens."


def minimal_num_blocks(limits: SlotLimits) -> int:
    """Blocks, the reserved one included, with which the largest step can be tried."""
    return 1 + limits.max_rows // limits.block_size + limits.max_slots


def measure_num_blocks(
    program: DecoderProgram,
    limits: SlotLimits,
    backend: BackendConfig,
    runtime: Runtime,
    block_bytes: int,
    fraction: float,
) -> int:
    """How many KV blocks fit beside everything else; the model has a cache of `minimal_num_blocks` meanwhile.

    Runs the largest mixed step, and captures the two largest buckets: the first captures make the shared pool grow,
    the last ones show what each further graph costs.

    Raises:
        ConfigError: not even one sequence of full length fits.
    """
    sizes = bucket_sizes(backend, limits.max_slots).sizes
    trial = backend.model_copy(update={"capture_sizes": sizes[-2:], "verify": False, "strict": False})
    probe = create_backend(trial, runtime)
    with runtime.activated():
        try:
            probe.prepare(program)
            manifest = probe.warmup()
            if manifest.missing:
                raise ConfigError(f"There is no memory to capture the {next(iter(manifest.missing))}. {_LESS}")
            costs = [graph.pool_bytes for graph in manifest.graphs]
            torch.cuda.reset_peak_memory_stats(runtime.device)
            resident = torch.cuda.memory_allocated(runtime.device)
            probe.submit(_largest_step(limits, program.chunk_variants[-1])).result()
            activations = torch.cuda.max_memory_allocated(runtime.device) - resident
        finally:
            probe.close()
        runtime.trim()
        free, _ = runtime.memory()
    variants = len(program.variants)
    graphs = sum(costs) + max(costs[variants:], default=0) * variants * max(len(sizes) - 2, 0)
    free += minimal_num_blocks(limits) * block_bytes  # the probe's cache goes
    blocks = int((free - activations - graphs) * fraction) // block_bytes
    _log.info(
        "num_kv_blocks = %d: %.1f GiB free, less %.2f for activations and %.2f for graphs, times %.2f",
        blocks - 1,
        free / 2**30,
        activations / 2**30,
        graphs / 2**30,
        fraction,
    )
    if blocks - 1 < limits.max_blocks:
        raise ConfigError(
            f"The KV cache would have {max(blocks - 1, 0)} blocks, less than the {limits.max_blocks} of one sequence. "
            + _LESS
        )
    return blocks


def _largest_step(limits: SlotLimits, variant: str) -> StepPlan:
    """A step that fills every row it may have with prompt chunks."""
    deltas = SlotDeltas(limits)
    rows_left, next_block = limits.max_rows, 1
    for slot in range(limits.max_slots):
        chunk = min(rows_left, limits.max_tokens - 1)
        if chunk == 0:
            break
        blocks = -(-chunk // limits.block_size)
        newcomer = Admission(max_len=chunk + 1, min_len=0, temperature=1.0, top_k=0, top_p=1.0, seed=0, stop_ids=())
        deltas.admit(slot, newcomer, seq_len=0, num_tokens=chunk)
        deltas.arm(slot, 0, as_words([0] * chunk))
        deltas.supply(slot, 0, range(next_block, next_block + blocks))
        rows_left, next_block = rows_left - chunk, next_block + blocks
    return StepPlan(variant, deltas)
