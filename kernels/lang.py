"""Triton as the kernels import it; without Triton the modules still import and only a kernel launch fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol

import torch

from graphexec.errors import ConfigError

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU build of torch does not bring Triton; the references need none

    class _Missing:
        """Stands where `triton` and `triton.language` would: decorates kernels, and refuses to launch them."""

        @staticmethod
        def constexpr(value: object) -> object:
            return value

        @staticmethod
        def jit(function: object = None, **_: object) -> object:
            return _Missing() if function is not None else lambda inner: _Missing()

        def __getitem__(self, grid: object) -> object:
            return self.launch

        def __getattr__(self, name: str) -> object:
            return self.launch()

        @staticmethod
        def launch(*_: object, **__: object) -> object:
            raise ConfigError("This operation needs a Triton kernel, and Triton is not installed. Install `triton`.")

    triton = tl = _Missing()

__all__ = [
    "Launch",
    "launches_early",
    "multiprocessors",
    "settle_cache_folder",
    "tl",
    "triton",
    "use_triton",
    "wait_for_predecessor",
]


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether the kernel (rather than its torch reference) serves `tensor`: on CUDA yes, on the CPU no.

    float64 is the setting of equality tests, and has no kernel on any device.
    """
    return tensor.is_cuda and tensor.element_size() < 8


def launches_early(tensor: torch.Tensor) -> bool:
    """Whether a kernel on the device of `tensor` may begin before the one in front of it in the stream has ended.

    Programmatic dependent launch, which Hopper (compute capability 9.0) introduced; graphs capture it as such an edge.
    A kernel launched with `launch_pdl` must call `wait_for_predecessor`, in every program.
    """
    return tensor.is_cuda and _capability(tensor.get_device()) >= (9, 0)


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def multiprocessors(tensor: torch.Tensor) -> int:
    """Of the device of `tensor`; under the interpreter one, so that programs have several pieces of work."""
    return _multiprocessors(tensor.get_device()) if tensor.is_cuda else 1


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def wait_for_predecessor():
    """From here on, what earlier kernels of the stream wrote can be read, and what they read be overwritten.

    Before it, a kernel of ours may read only weights, which no launch of a step writes, and what `apply` and `prepare`
    wrote at the beginning of the step. That is at least two launches ago, and those are over: the predecessor ended its
    own waiting before it let this kernel begin. That holds only if every kernel that begins early waits, those of
    inductor too: see `compile_decoder`.
    """
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


class Kernel(Protocol):
    """What `triton.jit` makes of a function."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]: ...


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel's launch with everything that it needs.

    Attributes:
        kernel: a function that `triton.jit` made.
        grid: `(x,)`, programs.
        arguments: all of the kernel's, by name.
        options: of the launch, e.g. `num_warps`.
    """

    kernel: Kernel
    grid: tuple[int]
    arguments: Mapping[str, object]
    options: Mapping[str, object]

    def __call__(self) -> None:
        """Launches on the current stream; compiles first where it must."""
        self.kernel[self.grid](**self.arguments, **self.options)

    def bound(self) -> Callable[[], None]:
        """The same launch on the stream that is current now, with its kernel found and its tensors' addresses read.

        It does not keep them. That leaves the host a fifth of the work.
        """
        if not isinstance(self.kernel, triton.JITFunction):  # under the interpreter
            return self
        compiled = self.kernel.warmup(**self.arguments, **self.options, grid=self.grid)
        values = [self.arguments[name] for name in self.kernel.arg_names]
        addresses = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values]
        return partial(compiled[*self.grid, 1, 1], *addresses, stream=torch.cuda.current_stream().cuda_stream)


def settle_cache_folder() -> None:
    """Settles where Triton caches what it compiles, unless TRITON_CACHE_DIR says so; before the first kernel.

    torch's inductor sets that variable in the middle of a start, sooner or later as its own cache is cold or warm. The
    next start would look for some kernels where they are not.
    """
    os.environ.setdefault("TRITON_CACHE_DIR", triton.knobs.cache.dir)
