"""Times the products of a decode step on a GPU: the kernel for few rows with several tiles, and torch's own.

    python -m bench.linear_sweep [--shape qwen3-0.6b,qwen3-8b] [--json PATH]      (from the root of the repository)

A product of few rows takes at least as long as its weights at `--bandwidth`. Launches follow each other as in a model,
each over weights of its own: the kernel fetches while its predecessor computes, and L2 hides no bytes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from bench.launches import Record, describe, launches_to_rotate, measure
from bench.method import integers
from bench.provenance import provenance, write_results
from bench.shapes import SHAPES, Shape
from graphexec.kernels.linear import LinearTile, choose_linear_tile, linear_reference, linear_triton, serves

DTYPE = torch.bfloat16
ROWS = (1, 2, 4, 8)
VECTOR_TILES = ((4, 256, 1), (8, 256, 1), (4, 256, 2), (8, 256, 2), (4, 256, 4), (8, 256, 4), (4, 256, 8), (8, 256, 8))
ROWS_TILES = ((16, 128, 4), (16, 256, 4), (16, 128, 8), (16, 256, 8), (32, 64, 4), (32, 128, 4), (64, 64, 4))


def sweep(
    name: str, out_features: int, in_features: int, rows: int, bandwidth: float, device: str = "cuda"
) -> Iterator[Record]:
    """torch's product, then every tile."""
    size = out_features * in_features * DTYPE.itemsize
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, device=device, dtype=DTYPE)

    weights = [normal(out_features, in_features) for _ in range(launches_to_rotate(size))]
    inputs = normal(rows, in_features)
    expected = linear_reference(inputs.double(), weights[0].double())
    facts: Record = {"product": name, "rows": rows, "N": out_features, "K": in_features}
    facts |= {"bytes_us": size / bandwidth * 1e6, "served": serves(rows, weights[0])}
    yield measure({**facts, "kernel": "torch"}, [partial(linear_reference, inputs, weight) for weight in weights])
    chosen = choose_linear_tile(rows, out_features, in_features)
    tiles = VECTOR_TILES if rows <= 2 else ROWS_TILES
    for tile in dict.fromkeys((chosen, *(LinearTile(*each) for each in tiles))):
        record: Record = {**facts, "kernel": "linear", "tile": tile._asdict(), "chosen": tile == chosen}
        launches = [partial(linear_triton, inputs, weight, tile=tile) for weight in weights]
        record = measure(record, launches)
        if "error" not in record:
            record["relative_error"] = float((launches[0]().double() - expected).norm() / expected.norm())
        yield record


def products(shape: Shape) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the products of a decode step, by name."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    hidden, wide, heads, kv_heads, size, vocabulary = (int(str(shape.config[name])) for name in names)
    return {
        "qkv": ((heads + 2 * kv_heads) * size, hidden),
        "o": (hidden, heads * size),
        "gate_up": (2 * wide, hidden),
        "down": (hidden, wide),
        "lm_head": (vocabulary, hidden),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b,qwen3-8b", help="names from bench.shapes")
    parser.add_argument("--rows", type=integers, default=ROWS)
    parser.add_argument("--bandwidth", type=float, default=4.27e12, help="bytes per second to compare with")
    parser.add_argument("--minutes", type=float, default=3.0, help="start no product after this many minutes")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("The sweep needs a CUDA device, and torch sees none.")
    records: list[Record] = []
    skipped: list[str] = []
    results = provenance(["python", "-m", "bench.linear_sweep", *sys.argv[1:]], torch.device("cuda", 0))
    results |= {"bandwidth": given.bandwidth, "products": records, "skipped": skipped}
    deadline = time.perf_counter() + 60 * given.minutes
    for shape in given.shape.split(","):
        for name, (out_features, in_features) in products(SHAPES[shape]).items():
            for rows in given.rows:
                if time.perf_counter() > deadline:
                    skipped.append(f"{shape}, {name}, {rows} rows")
                    continue
                for record in sweep(name, out_features, in_features, rows, given.bandwidth):
                    records.append({"shape": shape, **record})
                    print(describe(records[-1]), flush=True)
                torch.cuda.empty_cache()
                if given.json is not None:
                    write_results(given.json, results)


if __name__ == "__main__":
    main()
