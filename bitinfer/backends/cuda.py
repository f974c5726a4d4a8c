"""The CUDA backend: compiled kernels for NVIDIA GPUs from sm_80 on (``BITINFER_CUDA_KERNEL`` forces a variant).

Importing this initialises nothing: the GPU is asked about when the first CUDA tensor needs a backend.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitinfer.backends.base import Backend, Problem
from bitinfer.build_record import REBUILD_CUDA, read_build_record, reason_left_out
from bitinfer.weight import FLOAT_DTYPES

PACKAGE = Path(__file__).parent.parent
LIBRARY = PACKAGE / "_C_cuda.abi3.so"
SCHEMAS = PACKAGE / "_C.abi3.so"  # defines the ops that LIBRARY implements
MAX_INTEGER_COLUMNS = 1 << 22  # csrc/cuda/ops.cpp: sums and their offsets fit int32 up to here
OLDEST_GPU = (8, 0)


class CUDABackend(Backend):
    """Decode, prefill and packing kernels behind ``torch.ops.bitinfer_native``, on the tensors' device and stream."""

    name = "cuda"

    @cached_property
    def library_failure(self) -> str | None:
        """Why the library cannot be used under this torch, whatever the GPUs; None if it can."""
        if not LIBRARY.exists():
            return f"no CUDA library: {reason_left_out('cuda', read_build_record())} ({REBUILD_CUDA})"
        if torch.version.cuda is None:
            return f"built, but torch {torch.__version__} has no CUDA"
        try:
            for library in (SCHEMAS, LIBRARY):  # in this order
                torch.ops.load_library(str(library))
        except OSError as error:
            return f"built, but it does not load under torch {torch.__version__}: {error}"
        return None

    @cached_property
    def gpu_failure(self) -> str | None:
        """Why no kernel can run on the GPUs that torch sees, None if all can."""
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} sees no GPU"
        for index in range(torch.cuda.device_count()):
            capability = torch.cuda.get_device_capability(index)
            if capability < OLDEST_GPU:
                return (
                    f"GPU {index} ({torch.cuda.get_device_name(index)}) has compute capability "
                    f"{capability[0]}.{capability[1]}, but 8.0 or later is needed (CUDA_VISIBLE_DEVICES can hide it)"
                )
        return None

    def unavailable(self) -> str | None:
        return self.library_failure or self.gpu_failure

    def unsupported(self, problem: Problem) -> str | None:
        if problem.device != "cuda":
            return f"it runs on CUDA tensors, not on {problem.device}"
        if problem.dtype not in FLOAT_DTYPES:
            return f"it takes float32, float16 and bfloat16, not {problem.dtype}"
        if problem.bits and problem.k > MAX_INTEGER_COLUMNS:
            return f"its integer sums hold at most {MAX_INTEGER_COLUMNS} columns, not {problem.k}"
        return None

    def kernel(
        self, op: str, m: int, n: int, k: int, bits: int = 0, group_size: int = 0, planes: int = 1
    ) -> str | None:
        """Name the kernel variant that would run a problem on the current device, or None where the library can't say.

        Raises:
            RuntimeError: ``BITINFER_CUDA_KERNEL`` forces a variant that cannot run it.
        """
        if self.unavailable() is not None or not hasattr(torch.ops.bitinfer_native, "cuda_kernel"):
            return None
        return str(torch.ops.bitinfer_native.cuda_kernel(op, m, n, k, bits, group_size, planes))

    def pack_signs(self, weight: Tensor) -> Tensor:
        return torch.ops.bitinfer_native.pack_signs(weight)

    def pack_activations(self, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        native = torch.ops.bitinfer_native
        _x, in_scale, in_shift, *_ = args
        return (native.pack_activations_settled if _settled(in_scale, in_shift) else native.pack_activations)(*args)

    def rms_norm_pack_activations(self, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        native = torch.ops.bitinfer_native
        _x, _residual, norm_weight, _eps, in_scale, in_shift, *_ = args
        known = _settled(norm_weight, in_scale, in_shift)
        return (native.rms_norm_pack_activations_settled if known else native.rms_norm_pack_activations)(*args)

    def silu_mul_pack_activations(self, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        native = torch.ops.bitinfer_native
        _gate, _up, in_scale, in_shift, *_ = args
        known = _settled(in_scale, in_shift)
        return (native.silu_mul_pack_activations_settled if known else native.silu_mul_pack_activations)(*args)

    def sign_gemm(self, *args: Any) -> Tensor:
        native = torch.ops.bitinfer_native
        _x, weight, _in_features, *columns_and_rows, _group_size, _norm_eps = args
        return (native.sign_gemm_settled if _settled(weight, *columns_and_rows) else native.sign_gemm)(*args)

    def popcount_gemm(self, *args: Any) -> Tensor:
        native = torch.ops.bitinfer_native
        weight, _in_features, weight_scale, group_shift, bias = args[4:9]
        known = _settled(weight, weight_scale, group_shift, bias)
        return (native.popcount_gemm_settled if known else native.popcount_gemm)(*args)


def _settled(*constants: Tensor | None) -> bool:
    """Return whether earlier calls have met all these tensors as they are now, and note that this one has.

    The kernels then read them while the kernel ahead in the stream still runs, which must not be the one that wrote
    them. Writes are seen through torch's version counter; not those behind its back (``weight.data``), which only
    matter if nothing else runs between such a write and the call.
    """
    settled = True
    for tensor in constants:
        if tensor is None:
            continue
        if tensor.is_inference():  # has no version counter
            settled = False
        elif getattr(tensor, "_bitinfer_version", None) != tensor._version:
            tensor._bitinfer_version = tensor._version  # type: ignore[attr-defined]
            settled = False
    return settled
