"""The ops, and their twins for tracers: ``bitinfer_triton::<op>``, of which ``torch.compile`` sees the kernels.

The ops of :mod:`bitinfer.ops` are opaque to torch. Where this backend is the one that would run a call, what they
register for tracers puts the twin in its place, a ``torch.library.triton_op`` that comes apart into kernels and
allocations.
"""

from collections.abc import Callable
from typing import Any

import torch

from bitinfer.backends.triton.launch import INTERPRETED
from bitinfer.backends.triton.pack_activations import pack_activations
from bitinfer.backends.triton.pack_signs import pack_signs
from bitinfer.backends.triton.popcount_gemm import popcount_gemm
from bitinfer.backends.triton.sign_gemm import sign_gemm

OPS: dict[str, Callable[..., Any]] = {
    "pack_signs": pack_signs,
    "pack_activations": pack_activations,
    "sign_gemm": sign_gemm,
    "popcount_gemm": popcount_gemm,
}

if not INTERPRETED:  # tracers have no use for an interpreter
    for _name, _function in OPS.items():
        torch.library.triton_op(f"bitinfer_triton::{_name}", _function, mutates_args=())
