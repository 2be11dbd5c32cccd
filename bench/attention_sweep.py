"""Times the paged-attention kernels on a GPU: splits and tiles for decode, tiles for prefill against torch's own.

Run from the repository's root: `python -m bench.attention_sweep --json bench/results/h200/attention.json`. Decode is
memory-bound, so its yardstick is the time in which the bytes of keys and values would pass at `--bandwidth`. Launches
are timed in replays of a CUDA graph in which each launch has a cache of its own, so that L2 hides no bytes.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bench.launches import Launch, Record, describe, launches_to_rotate, measure
from bench.provenance import provenance, write_results
from graphexec.kernels.paged_decode import (
    PROGRAMS_PER_SM,
    DecodeSplits,
    DecodeTile,
    DecodeWorkspace,
    choose_decode_splits,
    choose_decode_tile,
    paged_decode_triton,
    split_starts,
)
from graphexec.kernels.paged_prefill import PrefillTile, choose_prefill_tile, paged_prefill_triton

BLOCK_SIZE = 16
HEADS = ((16, 8, 128), (32, 8, 128))  # H, KH, D
BATCHES = (1, 16, 64, 256)
CONTEXTS = (300, 1000, 8000)
CHUNKS = (512, 2048)
DECODE_TILES = tuple(
    DecodeTile(*tile)
    for tile in ((32, 1, 2), (32, 1, 3), (32, 2, 3), (64, 2, 2), (64, 2, 3), (64, 4, 2), (64, 4, 3), (128, 4, 2))
)
PREFILL_TILES = tuple(
    PrefillTile(*tile)
    for tile in ((64, 64, 4, 2, 2), (64, 64, 4, 2, 3), (64, 64, 4, 3, 2), (128, 64, 8, 3, 1), (128, 64, 8, 4, 1))
)
DTYPE = torch.bfloat16


class Load(NamedTuple):
    """One decode workload: every row has the same context, or they are log-normal around it (`varied`)."""

    batch: int
    context: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    varied: bool = False

    @property
    def contexts(self) -> list[int]:
        if not self.varied:
            return [self.context] * self.batch
        drawn = np.random.default_rng(0).lognormal(math.log(self.context), 0.9, self.batch)
        return [int(each) for each in np.clip(drawn, 16, 8 * self.context)]

    @property
    def kv_bytes(self) -> int:
        return 2 * sum(self.contexts) * self.num_kv_heads * self.head_dim * DTYPE.itemsize


def make_caches(count: int, blocks: int, num_kv_heads: int, head_dim: int, device: str) -> list[torch.Tensor]:
    return [
        torch.empty(blocks + 1, num_kv_heads, BLOCK_SIZE, head_dim, dtype=DTYPE, device=device).normal_()
        for _ in range(count)
    ]


def scattered_tables(rows: int, tokens: int, device: str) -> torch.Tensor:
    """Block tables whose blocks lie anywhere in the cache; block 0 is reserved."""
    blocks = -(-tokens // BLOCK_SIZE)
    return (1 + torch.randperm(rows * blocks, device=device)).view(rows, blocks).to(torch.int32)


def sweep_decode(load: Load, bandwidth: float, device: str) -> Iterator[Record]:
    """Shorter and longer splits, fewer and more programs, and all tiles, each with the choice for the others."""
    batch, context, num_heads, num_kv_heads, head_dim, _ = load
    launches = launches_to_rotate(load.kv_bytes)
    longest = max(load.contexts)
    blocks = batch * -(-longest // BLOCK_SIZE)
    k_caches, v_caches = (make_caches(launches, blocks, num_kv_heads, head_dim, device) for _ in range(2))
    tables = scattered_tables(batch, longest, device)
    query = torch.randn(batch, num_heads, head_dim, device=device).to(DTYPE)
    group = num_heads // num_kv_heads
    chosen_tile = choose_decode_tile(head_dim, group, DTYPE.itemsize)
    chosen = choose_decode_splits(batch, num_kv_heads, chosen_tile.block_n)
    sizes = dict.fromkeys((chosen.size, 1, 2, 4, 8, 16, 32))
    plans = [(chosen_tile, chosen._replace(size=size), PROGRAMS_PER_SM) for size in sizes]
    plans += [(chosen_tile, chosen, programs) for programs in (2, 4, 12)]
    plans += [(tile, chosen._replace(tile=tile.block_n), PROGRAMS_PER_SM) for tile in DECODE_TILES]
    bytes_us = load.kv_bytes / bandwidth * 1e6
    for tile, splits, programs_per_sm in dict.fromkeys(plans):
        launch_on = partial(_decode_launch, load, tables, query, splits, tile, programs_per_sm)
        record: Record = {
            **load._asdict(),
            "num_splits": int(splits.of(torch.tensor(context))),
            "size": splits.size,
            "programs_per_sm": programs_per_sm,
            "tile": tile._asdict(),
            "chosen": (tile, splits, programs_per_sm) == (chosen_tile, chosen, PROGRAMS_PER_SM),
            "bytes_us": bytes_us,
        }
        record = measure(record, [launch_on(k, v) for k, v in zip(k_caches, v_caches, strict=True)])
        if isinstance(elapsed := record.get("microseconds"), float):
            record["over_bytes"] = elapsed / bytes_us
        yield record


def _decode_launch(
    load: Load, tables: torch.Tensor, query: torch.Tensor, splits: DecodeSplits, tile: DecodeTile,
    programs_per_sm: int, k_cache: torch.Tensor, v_cache: torch.Tensor,
) -> Launch:  # fmt: skip
    device = query.device
    row_slot = torch.arange(load.batch, dtype=torch.int32, device=device)
    positions = torch.tensor(load.contexts, dtype=torch.int32, device=device) - 1
    start = split_starts(row_slot, positions, splits)
    heads = load.num_heads, load.num_kv_heads, load.head_dim
    workspace = DecodeWorkspace.allocate(load.batch, int(start[-1]), *heads, device)
    where = tables, row_slot, positions, start, load.head_dim**-0.5
    return lambda: paged_decode_triton(
        query, k_cache, v_cache, *where, splits, workspace, tile, programs_per_sm=programs_per_sm
    )


def sweep_prefill(sequences: int, chunk: int, heads: tuple[int, int, int], device: str) -> Iterator[Record]:
    """torch's causal attention on contiguous tensors, then every tile over the paged cache with the same numbers."""
    num_heads, num_kv_heads, head_dim = heads
    rows = sequences * chunk
    tables = scattered_tables(sequences, chunk, device)
    k_cache, v_cache = make_caches(2, tables.numel(), num_kv_heads, head_dim, device)
    query = torch.randn(rows, num_heads, head_dim, device=device).to(DTYPE)
    active = torch.arange(sequences, dtype=torch.int32, device=device)
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=device) * chunk
    before = torch.zeros(sequences, dtype=torch.int32, device=device)
    tickets = torch.zeros(2, dtype=torch.int32, device=device)
    scale = head_dim**-0.5

    def contiguous(cache: torch.Tensor) -> torch.Tensor:
        """`[sequences, KH, chunk, D]`"""
        by_block = cache[tables.long()].transpose(1, 2)
        return by_block.reshape(sequences, num_kv_heads, -1, head_dim)[:, :, :chunk].contiguous()

    dense_query = query.view(sequences, chunk, num_heads, head_dim).transpose(1, 2).contiguous()
    keys, values = contiguous(k_cache), contiguous(v_cache)

    def dense() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            dense_query, keys, values, is_causal=True, scale=scale, enable_gqa=num_heads != num_kv_heads
        )

    expected = dense().transpose(1, 2).reshape(rows, num_heads, head_dim).float()
    flops = 2 * num_heads * head_dim * sequences * chunk * (chunk + 1)  # two products over half a square
    workload: Record = {"sequences": sequences, "chunk": chunk, **dict(zip(("H", "KH", "D"), heads, strict=True))}

    def finish(record: Record) -> Record:
        if isinstance(elapsed := record.get("microseconds"), float):
            record["tflops"] = flops / elapsed / 1e6
        return record

    yield finish(measure({**workload, "kernel": "scaled_dot_product_attention"}, [dense] * 8))
    chosen = choose_prefill_tile(rows, num_heads, head_dim, DTYPE.itemsize)
    for tile in dict.fromkeys((chosen, *PREFILL_TILES)):

        def paged(tile: PrefillTile = tile) -> torch.Tensor:
            where = tables, active, starts, before, scale
            return paged_prefill_triton(query, k_cache, v_cache, *where, tickets, tile)

        record: Record = {**workload, "kernel": "paged_prefill", "tile": tile._asdict(), "chosen": tile == chosen}
        record = measure(record, [paged] * 8)
        if "error" not in record:
            record["relative_error"] = float((paged().float() - expected).norm() / expected.norm())
        yield finish(record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    parser.add_argument("--bandwidth", type=float, default=4.27e12, help="bytes per second to compare decode with")
    parser.add_argument("--minutes", type=float, default=5.0, help="start no workload after this many minutes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("The sweep needs a CUDA device, and torch sees none.")
    command = ["python", "-m", "bench.attention_sweep", *sys.argv[1:]]
    run(command, arguments.json, arguments.bandwidth, arguments.minutes, "cuda")


def run(command: list[str], path: Path | None, bandwidth: float, minutes: float, device: str) -> None:
    properties = torch.cuda.get_device_properties(0)
    results: dict[str, object] = provenance(command, torch.device(device, 0)) | {
        "multiprocessors": properties.multi_processor_count,
        "bandwidth": bandwidth,
    }
    decode: list[Record] = []
    prefill: list[Record] = []
    results["decode"], results["prefill"] = decode, prefill
    deadline = time.perf_counter() + 60 * minutes

    def keep(kept: list[Record], records: Iterator[Record]) -> None:
        try:
            for record in records:
                kept.append(record)
                print(describe(record), flush=True)
        finally:  # after each workload: what was measured survives whatever comes next
            if path is not None:
                write_results(path, results)

    workloads: list[tuple[list[Record], Callable[[], Iterator[Record]]]] = []
    for heads in HEADS:
        for sequences, chunk in itertools.product((1, 4), CHUNKS):
            workloads.append((prefill, partial(sweep_prefill, sequences, chunk, heads, device)))
        for batch, context in itertools.product(BATCHES, CONTEXTS):
            for varied in (False, True) if context <= 1000 and batch > 1 else (False,):
                load = Load(batch, context, *heads, varied)
                workloads.append((decode, partial(sweep_decode, load, bandwidth, device)))
    for done, (kept, sweep) in enumerate(workloads):
        if time.perf_counter() > deadline:
            print(f"Stopped after {minutes} minutes; {len(workloads) - done} workloads left out.")
            break
        try:
            keep(kept, sweep())
        except torch.cuda.OutOfMemoryError as error:
            print("  left out:", str(error).splitlines()[0], flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
