"""Sizes the KV cache before anything is captured, since graphs hold its addresses."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from graphexec.backends import create_backend, keys_of, ladders_of
from graphexec.capture.manifest import Manifest
from graphexec.config import BackendConfig
from graphexec.deltas import Admission, SlotDeltas, as_words
from graphexec.engine.program import DecoderProgram
from graphexec.errors import ConfigError
from graphexec.plan import GraphKey, StepPlan
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

    Captures the graphs of the largest sizes, and runs the largest step with all its log-probabilities. The first
    captures make the shared pool grow; the last ones show what each further graph costs.

    Raises:
        ConfigError: not even one sequence of full length fits.
    """
    ladders = ladders_of(backend, program)
    largest = {
        "capture_sizes": ladders.slots.sizes[-2:],
        "prefill_sizes": ladders.rows.sizes[-2:],
        "prefill_slots": ladders.chunk_slots.sizes[-1:],
    }
    trial = backend.model_copy(update={**largest, "verify": False, "measure": False, "strict": False})
    probe = create_backend(trial, runtime)
    with runtime.activated():
        try:
            probe.prepare(program)
            manifest = probe.warmup()
            if manifest.missing:
                raise ConfigError(f"There is no memory to capture the {next(iter(manifest.missing))}. {_LESS}")
            torch.cuda.reset_peak_memory_stats(runtime.device)
            resident = torch.cuda.memory_allocated(runtime.device)
            probe.submit(_largest_step(limits, program.chunk_variants[-1])).result()
            activations = torch.cuda.max_memory_allocated(runtime.device) - resident
        finally:
            probe.close()
        runtime.trim()
        free, _ = runtime.memory()
    graphs = _cost_of_all(manifest, keys_of(backend, program, ladders))
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


def _cost_of_all(manifest: Manifest, keys: Sequence[GraphKey]) -> int:
    """Bytes of the graphs of all keys, from what the largest ones cost, steps with prompt chunks by themselves."""
    total = 0
    for has_chunks in (True, False):
        costs = [graph.pool_bytes for graph in manifest.graphs if graph.key.has_chunks is has_chunks]
        more = sum(key.has_chunks is has_chunks for key in keys) - len(costs)
        total += sum(costs) + max(costs[1:], default=0) * max(more, 0)
    return total


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
