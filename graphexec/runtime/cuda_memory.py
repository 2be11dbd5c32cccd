"""Tensors on a CUDA device over memory that belongs to somebody else."""

from __future__ import annotations

import torch

__all__ = ["device_view", "unowned"]


class _Span:
    """Bytes at an address, as the CUDA array interface describes them."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": (num_bytes,), "typestr": "|u1", "version": 3,
        }  # fmt: skip


def unowned(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor over the memory of one on a device that does not keep it; whoever uses it must know that it is there."""
    if not tensor.is_cuda or tensor.numel() == 0:
        return tensor
    items = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    span = torch.as_tensor(_Span(tensor.data_ptr(), items * tensor.itemsize), device=tensor.device)
    return span.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def device_view(pinned: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A contiguous pinned tensor as a tensor on `device`, which reads and writes it over the bus. Keeps nothing."""
    span = torch.as_tensor(_Span(pinned.data_ptr(), pinned.nbytes), device=device)
    return span.view(pinned.dtype).view(pinned.shape)
