"""How kernels are launched: through Triton itself, and so that ``torch.compile`` sees them where it traces."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from bitinfer.backends.triton.interpreter import mend_interpreter

INTERPRETED = bool(triton.knobs.runtime.interpret)  # as read when the kernels are defined
INTERPRETER = ""  # the target that knows no assembly

if INTERPRETED:
    mend_interpreter()


@dataclass(frozen=True)
class Device:
    """What the choice of a configuration, and the code of a kernel, depend on.

    Attributes:
        name: as the driver gives it.
        target: Triton's name of the kind of GPU: ``cuda``, ``hip``, ``xpu``, or ``""`` in the interpreter.
        arch: compute capability as ``90``, or an AMD architecture as ``gfx942``.
        processors: multiprocessors, compute units or Xe cores.
        lanes: threads to a warp.
        shared: bytes of shared memory that a program may have.
    """

    name: str
    target: str
    arch: str
    processors: int
    lanes: int
    shared: int = 64 << 10


@cache
def describe(device: torch.device) -> Device:
    """Return what Triton and the choice of a configuration need to know of ``device``."""
    if INTERPRETED:
        return Device("interpreter", INTERPRETER, "", 4, 32)
    if device.type == "xpu":
        xpu = torch.xpu.get_device_properties(device)
        return Device(xpu.name, "xpu", "", max(1, xpu.gpu_eu_count // 8), 32)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        target, arch = "hip", properties.gcnArchName.split(":")[0]
    else:
        target, arch = "cuda", f"{properties.major}{properties.minor}"
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or 64 << 10  # AMD's have 64 KiB and no option
    return Device(properties.name, target, arch, properties.multi_processor_count, properties.warp_size, shared)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch ``kernel`` on the device of its first argument, a tensor.

    ``kernel`` is one that ``wrap_triton`` could wrap: that costs a millisecond, so only tracers' tensors get it.
    """
    first = args[0]
    if INTERPRETED:
        kernel[grid](*args, **options)
    elif not is_plain(first):
        wrap_triton(kernel)[grid](*args, **options)
    else:
        if first.device.type == "xpu":
            options["enable_fp_fusion"] = False  # NVIDIA's and AMD's products are kept apart by assembly
        with _current(first.device):
            kernel[grid](*args, **options)


def is_plain(tensor: Tensor) -> bool:
    """Return whether ``tensor`` has memory: one that a tracer passes has none."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def _current(device: torch.device) -> Any:
    """Make ``device`` the current one, which is where Triton launches."""
    here = device.index is None or device.index == torch.accelerator.current_device_index()
    return nullcontext() if here else torch.accelerator.device_index(device.index)


def flat(x: Tensor) -> Tensor:
    """Return ``[..., K]`` as ``[M, K]`` whose columns are neighbours in memory."""
    x = x if x.dim() == 2 else x.reshape(prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def aligned(tensor: Tensor | None, nbytes: int) -> bool:
    """Return whether rows of ``tensor`` begin at multiples of ``nbytes``; an absent one does."""
    if tensor is None:
        return True
    size = tensor.element_size()
    # what is allocated is aligned, and torch.compile copies inputs that turn out not to be as they were when it traced
    start = tensor.data_ptr() if is_plain(tensor) else tensor.storage_offset() * size
    rows = tensor.stride(0) * size if tensor.dim() > 1 and tensor.shape[0] > 1 else 0
    return bool(start % nbytes == 0 and rows % nbytes == 0)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two_from(a: int) -> int:
    """Return the smallest power of two that is at least ``a``."""
    return 1 << max(0, a - 1).bit_length()
