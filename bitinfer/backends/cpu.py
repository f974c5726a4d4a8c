"""The CPU backend: compiled kernels, whose instruction set the C++ side chooses (``BITINFER_CPU_ISA`` forces one)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitinfer.backends.base import Backend, Problem
from bitinfer.weight import FLOAT_DTYPES

LIBRARY = Path(__file__).parent.parent / "_C.abi3.so"
MAX_INTEGER_COLUMNS = 1 << 22  # csrc/cpu/ops.cpp: sums and their offsets fit int32 up to here


class CPUBackend(Backend):
    """Scalar, AVX2 and wider tables of kernels behind ``torch.ops.bitinfer_native``."""

    name = "cpu"

    def __init__(self) -> None:
        self._failure: str | None = None
        if not LIBRARY.exists():
            self._failure = "the compiled library is missing: bitinfer was installed without its compiled kernels"
            return
        try:
            torch.ops.load_library(str(LIBRARY))
        except OSError as error:
            self._failure = f"the compiled library does not load under torch {torch.__version__}: {error}"

    def unavailable(self) -> str | None:
        return self._failure

    def unsupported(self, problem: Problem) -> str | None:
        if problem.device != "cpu":
            return f"it runs on CPU tensors, not on {problem.device}"
        if problem.dtype not in FLOAT_DTYPES:
            return f"it takes float32, float16 and bfloat16, not {problem.dtype}"
        if problem.bits and problem.k > MAX_INTEGER_COLUMNS:
            return f"its integer sums hold at most {MAX_INTEGER_COLUMNS} columns, not {problem.k}"
        return None

    def pack_signs(self, weight: Tensor) -> Tensor:
        return torch.ops.bitinfer_native.pack_signs(weight)

    def pack_activations(self, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.ops.bitinfer_native.pack_activations(*args)

    def sign_gemm(self, *args: Any) -> Tensor:
        return torch.ops.bitinfer_native.sign_gemm(*args)

    def popcount_gemm(self, *args: Any) -> Tensor:
        return torch.ops.bitinfer_native.popcount_gemm(*args)
