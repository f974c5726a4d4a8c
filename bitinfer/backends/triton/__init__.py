"""The Triton backend: kernels compiled at run time, with no nvcc, for every GPU that Triton reaches.

Importing this imports no Triton and asks nothing of a GPU: both wait for the first tensor that needs a backend. Under
``TRITON_INTERPRET=1`` the kernels run on CPU tensors, in Triton's interpreter.
"""

import os
from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bitinfer.backends.base import Backend, Problem
from bitinfer.weight import FLOAT_DTYPES

OLDEST_TRITON = (3, 6)
OLDEST_GPU = (8, 0)  # NVIDIA's: older ones have no int8 and bfloat16 matrix units
MAX_INTEGER_COLUMNS = 1 << 22  # sums and their offsets fit int32 up to here
DEVICES = ("cuda", "xpu")  # torch calls an AMD GPU cuda


class TritonBackend(Backend):
    """Decode, tiled and packing kernels in Triton, on the tensors' device and stream."""

    name = "triton"

    @cached_property
    def library_failure(self) -> str | None:
        """Why Triton cannot be used, whatever the GPUs; None if it can."""
        if find_spec("triton") is None:
            return "Triton is not installed (pip install triton)"
        try:
            version = str(import_module("triton").__version__)
            if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
                oldest = ".".join(map(str, OLDEST_TRITON))
                return f"Triton {version} is older than {oldest} (pip install 'triton>={oldest}')"
            assert self._ops
        except Exception as error:  # whatever a broken installation raises
            return f"Triton is installed, but does not load: {type(error).__name__}: {error}"
        return None

    @cached_property
    def _ops(self) -> dict[str, Callable[..., Any]]:
        """The ops by their names: the modules that import Triton."""
        functions: dict[str, Callable[..., Any]] = import_module("bitinfer.backends.triton.compiled").OPS
        return functions

    @property
    def gpu_failure(self) -> str | None:
        """Why no kernel can run on the GPUs that torch sees, None if all can."""
        if interpreted():
            return None
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                capability = torch.cuda.get_device_capability(index)
                if torch.version.hip is None and capability < OLDEST_GPU:
                    return (
                        f"GPU {index} ({torch.cuda.get_device_name(index)}) has compute capability "
                        f"{'.'.join(map(str, capability))}, but 8.0 or later is needed "
                        "(CUDA_VISIBLE_DEVICES can hide it)"
                    )
        elif not torch.xpu.is_available():
            return f"torch {torch.__version__} sees no GPU"
        return None

    def unavailable(self) -> str | None:
        return self.library_failure or self.gpu_failure

    def unsupported(self, problem: Problem) -> str | None:
        if problem.device not in DEVICES and not (problem.device == "cpu" and interpreted()):
            return f"it runs on tensors of {' and '.join(DEVICES)}, not of {problem.device}"
        if problem.dtype not in FLOAT_DTYPES:
            return f"it takes float32, float16 and bfloat16, not {problem.dtype}"
        if problem.bits and problem.k > MAX_INTEGER_COLUMNS:
            return f"its integer sums hold at most {MAX_INTEGER_COLUMNS} columns, not {problem.k}"
        return None

    def traced(self, op: str) -> Any:
        if self.unavailable() is not None or interpreted() or op not in self._ops:
            return None
        return getattr(torch.ops.bitinfer_triton, op)

    def pack_signs(self, weight: Tensor) -> Tensor:
        return self._ops["pack_signs"](weight)

    def pack_activations(self, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._ops["pack_activations"](*args)

    def sign_gemm(self, *args: Any) -> Tensor:
        return self._ops["sign_gemm"](*args)

    def popcount_gemm(self, *args: Any) -> Tensor:
        return self._ops["popcount_gemm"](*args)


def interpreted() -> bool:
    """Return whether Triton is asked to interpret kernels on the CPU; it reads the variable as it is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
