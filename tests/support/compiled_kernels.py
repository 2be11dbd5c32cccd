"""Compiles the kernels that begin early for Hopper, without a GPU, and prints their PTX as JSON.

A program of its own, `python -m tests.support.compiled_kernels`: the tests' process holds interpreted kernels.
"""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graphexec.kernels import linear, paged_decode, paged_prefill, rope_write

_HEADS = {"NUM_KV_HEADS": 8, "BLOCK_SIZE": 16, "HEAD_DIM": 128}
_SPLITS = {"GROUP": 2, "GROUP_PADDED": 16, "HEAD_DIM_PADDED": 128, "BLOCK_N": 32, "WIDTH": 128, "PARTS": 8}
_CHUNKS = {"GROUP": 2, "HEAD_DIM_PADDED": 128, "BLOCK_M": 128, "BLOCK_Q": 64, "BLOCK_N": 64, "WIDTH": 128}
_ROPE = {"NUM_HEADS": 16, "HALF_PADDED": 64, "TILE_HEADS": 8, "HAS_NORM": True, "EARLY": True}
_LINEAR = {"WARP_K": 256, "WARPS": 4, "HAS_BIAS": False, "bias": None, "EARLY": True}

KERNELS = {
    "decode": (paged_decode._decode_kernel, _HEADS | _SPLITS | {"EARLY": True}, 1, 2),
    "prefill": (paged_prefill._prefill_kernel, _HEADS | _CHUNKS | {"EARLY": True}, 8, 3),
    "rope_write": (rope_write._rope_write_kernel, _HEADS | _ROPE, 2, 3),
    "linear, vectors": (linear._vectors_kernel, _LINEAR | {"ROWS_PADDED": 2, "TILE_N": 4}, 4, 1),
    "linear, rows": (linear._rows_kernel, _LINEAR | {"ROWS_PADDED": 8, "TILE_N": 16}, 4, 1),
}
"""Kernel, constants, warps, stages; as they are launched."""

TYPES = {
    "block_tables": "*i32",
    "row_slot": "*i32",
    "positions": "*i32",
    "chunk_slots": "*i32",
    "chunk_start": "*i32",
    "seq_lens": "*i32",
    "tickets": "*i32",
    "kv_slots": "*i64",
    "partial_out": "*fp32",
    "partial_lse": "*fp32",
    "scale": "fp32",
    "norm_eps": "fp32",
    "max_blocks": "i32",
    "split_start": "*i32",
    "arrivals": "*i32",
    "size": "i32",
    "most": "i32",
    "num_entries": "i32",
    "programs": "i32",
    "rows": "i32",
    "N": "i32",
    "K": "i32",
}
"""Of the arguments that are not bfloat16 tensors."""


def ptx(name: str) -> str:
    kernel, constants, num_warps, num_stages = KERNELS[name]
    names = kernel.arg_names
    signature = {each: "constexpr" if each in constants else TYPES.get(each, "*bf16") for each in names}
    values = {(names.index(each),): value for each, value in constants.items()}
    by_16 = {each for each in names if "*" in signature[each]} | {"N", "K"}
    aligned = {(place,): [["tt.divisibility", 16]] for place, each in enumerate(names) if each in by_16}
    source = ASTSource(kernel, signature, values, aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": True}
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])


if __name__ == "__main__":
    json.dump({name: ptx(name) for name in KERNELS}, sys.stdout)
