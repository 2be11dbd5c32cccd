"""Lets inductor write the kernels of a decoder's regions for Hopper, without a GPU, and prints their sources as JSON.

A program of its own, `python -m tests.support.inductor_kernels`: torch must take the machine for one with a GPU.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config, graph, scheduler
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import fake_tensor
from transformers import AutoConfig, AutoModelForCausalLM
from triton.backends.compiler import GPUTarget

from graphexec.engine.assemble import allocate_caches
from graphexec.models.decoder import Decoder
from graphexec.models.layers import swap_modules
from tests.support.checkpoints import SMALL

_H200 = SimpleNamespace(
    name="H200", major=9, minor=0, gcnArchName="", multi_processor_count=132, warp_size=32, total_memory=141 << 30,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block_optin=232448, L2_cache_size=60 << 20,
)  # fmt: skip


class _Written(BaseException):
    """Inductor has written the code; there is nothing to run it on."""


def take_for_hopper() -> ExitStack:
    """Until it is closed, torch believes that there is an H200."""
    stack = ExitStack()
    for module, name, stand_in in [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "get_device_properties", lambda *_: _H200),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state()),
        (torch.cuda, "set_rng_state", lambda *_: None),
        (torch.cuda, "_exchange_device", lambda _: 0),
        (torch.cuda, "_maybe_exchange_device", lambda _: 0),
        (torch.cuda, "_lazy_init", lambda: None),
        (CudaInterface, "get_device_properties", lambda *_: _H200),
        (CudaInterface.Worker, "get_device_properties", lambda *_: _H200),
        (CudaInterface, "get_compute_capability", lambda *_: 90),
        (CudaInterface, "is_available", lambda: True),
        (fake_tensor, "init_gpu_context", lambda *_: None),
        (scheduler, "has_triton", lambda *_: True),
    ]:
        stack.enter_context(mock.patch.object(module, name, stand_in))
    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(mock.Mock(get_current_target=lambda: target))
    return stack


def kernels(region: nn.Module, *inputs: object) -> list[str]:
    """Sources of the kernels that inductor launches in a region, in their order, with the engine's options."""
    written: list[str] = []

    def write(lowered: Any) -> None:
        code = codegen(lowered)[0]
        written.append(getattr(code, "value", code))
        raise _Written

    codegen = graph.GraphLowering.codegen

    def compile_for_hopper(traced: torch.fx.GraphModule, fakes: list[Any]) -> object:
        fake_mode = next(each.fake_mode for each in fakes if isinstance(each, torch.Tensor))
        with (
            take_for_hopper(),
            mock.patch.object(graph.GraphLowering, "codegen", write),
            config.patch({"triton.enable_pdl": True, "fx_graph_cache": False}),
            suppress(_Written),
        ):
            with fake_mode:
                there = [
                    torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="cuda")
                    if isinstance(each, torch.Tensor)
                    else each
                    for each in fakes
                ]
            compile_fx_inner(traced, there)
        return traced.forward

    backend: Any = aot_autograd(
        fw_compiler=compile_for_hopper, decompositions=select_decomp_table(), keep_inference_input_mutations=True
    )
    torch._dynamo.reset()
    region.compile(backend=backend, dynamic=True, fullgraph=True)
    with suppress(LookupError):  # attention finds no running step: the code is what is wanted
        region(*inputs)
    (code,) = written
    sources = {found[1]: found[0] for found in re.finditer(r"def (triton_\w+)\(.*?(?=''')", code, re.DOTALL)}
    return [sources[name] for name in re.findall(r"(triton_\w+)\.run\(", code)]


@torch.no_grad()
def main() -> None:
    made = {}
    for hidden_size in (1024, 4096):  # of the second, a sum over a row is a loop
        model_config = AutoConfig.for_model("qwen3", **(SMALL | {"hidden_size": hidden_size}))
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16).requires_grad_(False)
        swap_modules(model)
        decoder = Decoder(model, max_tokens=64)
        allocate_caches(decoder, 4, 16)
        for rows in (1, 3):
            row = torch.zeros(rows, dtype=torch.int32)
            of_entry = decoder.entry(row, row)
            case = f"{hidden_size} wide, {rows} rows"
            made[f"entry, {case}"] = kernels(decoder.entry, row, row)
            made[f"layer, {case}"] = kernels(decoder.layers[0], *(of_entry[0].clone(), *of_entry[1:]))
    json.dump(made, sys.stdout)


if __name__ == "__main__":
    main()
