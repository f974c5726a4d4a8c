"""The ops as torch knows them: schemas, implementations, shape functions.

They are registered as ``torch.ops.bitinfer.*``: opaque to ``torch.compile``, which never breaks the graph on them, but
for a backend whose kernels it can see into. Each call asks :mod:`bitinfer.dispatch` for the backend that runs it. What
their arguments mean is told in :mod:`bitinfer.ops`.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode  # as torch.library.triton_op itself uses it

from bitinfer.backends.base import Problem
from bitinfer.backends.reference import segment_size
from bitinfer.checks import (
    check_pack_activations,
    check_pack_signs,
    check_popcount_gemm,
    check_rms_norm_pack_activations,
    check_sign_gemm,
    check_silu_mul_pack_activations,
)
from bitinfer.dispatch import compiled_cpu_ops, select
from bitinfer.packing import words_per_row
from bitinfer.weight import group_count

# csrc/registration.cpp holds the same schemas for the compiled ops; a test compares them
SCHEMAS = {
    "pack_signs": "(Tensor weight) -> Tensor",
    "pack_activations": (
        "(Tensor x, Tensor? in_scale, Tensor? in_shift, int bits, int block_size, int group_size)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "sign_gemm": (
        "(Tensor x, Tensor weight, int in_features, Tensor? weight_scale, Tensor? in_scale, Tensor? in_shift,"
        " Tensor? group_shift, Tensor? bias, int group_size, float? norm_eps) -> Tensor"
    ),
    "popcount_gemm": (
        "(Tensor planes, Tensor act_scale, Tensor act_sum, Tensor? act_shift, Tensor weight, int in_features,"
        " Tensor? weight_scale, Tensor? group_shift, Tensor? bias, int group_size, int block_size, float? norm_eps,"
        " ScalarType dtype) -> Tensor"
    ),
    "rms_norm_pack_activations": (
        "(Tensor x, Tensor? residual, Tensor norm_weight, float eps, Tensor? in_scale, Tensor? in_shift, int bits,"
        " int block_size, int group_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "silu_mul_pack_activations": (
        "(Tensor gate, Tensor up, Tensor? in_scale, Tensor? in_shift, int bits, int block_size, int group_size)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
}
COMPILED = ("pack_signs", "pack_activations", "sign_gemm", "popcount_gemm")  # on every device with compiled kernels


def call(name: str, *args: Any) -> Any:
    """Call an op: its compiled CPU kernel at once, unless a compiler or a mode is to see the op itself."""
    seen = torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() > 0
    result = NotImplemented if seen else _compiled(name, args)
    return getattr(torch.ops.bitinfer, name)(*args) if result is NotImplemented else result


def _compiled(name: str, args: tuple[Any, ...]) -> Any:
    """Run an op by its compiled CPU kernel, or return NotImplemented if there is none or it refuses the arguments.

    The kernels check all that is checked here, only with fewer words. Asking them first spares decoding a Python that
    weights on their way through the caches have made slow.
    """
    cpu = compiled_cpu_ops() if args[0].is_cpu and name in COMPILED else None
    if cpu is not None:
        try:
            return getattr(cpu, name)(*args)
        except RuntimeError:
            pass
    return NotImplemented


def _implementation(name: str, check: Callable[..., None], problem_of: Callable[..., Problem]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        result = _compiled(name, args)
        if result is not NotImplemented:
            return result
        check(*args)
        return getattr(select(problem_of(*args)), name)(*args)

    return run


def _signs_problem(weight: Tensor) -> Problem:
    return Problem("pack_signs", weight.device.type, weight.dtype)


def _packing_problem(
    x: Tensor, in_scale: Tensor | None, in_shift: Tensor | None, bits: int, block_size: int, group_size: int
) -> Problem:
    k = x.shape[-1]
    return Problem("pack_activations", x.device.type, x.dtype, bits, m=_tokens(x), k=k, group_size=group_size)


def _norm_packing_problem(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *pack: Any) -> Problem:
    return _packing_problem(x, *pack)


def _silu_packing_problem(gate: Tensor, up: Tensor, *pack: Any) -> Problem:
    return _packing_problem(gate, *pack)


def _sign_problem(*args: Any) -> Problem:
    x, weight, in_features, *_, group_size, _norm_eps = args
    return Problem(
        "sign_gemm", x.device.type, x.dtype, 0, _tokens(x), weight.shape[-2], in_features, _planes(weight), group_size
    )


def _popcount_problem(*args: Any) -> Problem:
    planes, act_scale, _act_sum, _act_shift, weight, in_features, *_, group_size, _block_size, _norm_eps, dtype = args
    return Problem(
        "popcount_gemm",
        planes.device.type,
        dtype,
        planes.shape[-2],
        _tokens(act_scale),
        weight.shape[-2],
        in_features,
        _planes(weight),
        group_size,
    )


def _tokens(x: Tensor) -> int:
    return prod(x.shape[:-1])


def _planes(weight: Tensor) -> int:
    return weight.shape[0] if weight.dim() == 3 else 1


def _fake_pack_signs(weight: Tensor) -> Tensor:
    check_pack_signs(weight)
    return weight.new_empty(*weight.shape[:-1], words_per_row(weight.shape[-1]), dtype=torch.uint32)


def _fake_pack_activations(
    x: Tensor, in_scale: Tensor | None, in_shift: Tensor | None, bits: int, block_size: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_pack_activations(x, in_scale, in_shift, bits, block_size, group_size)
    lead, k = x.shape[:-1], x.shape[-1]
    return (
        x.new_empty(*lead, bits, words_per_row(k), dtype=torch.uint32),
        x.new_empty(*lead, group_count(k, block_size), dtype=torch.float32),
        x.new_empty(*lead, group_count(k, segment_size(block_size, group_size)), dtype=torch.int32),
        x.new_empty(*lead, 0 if in_shift is None else 1, dtype=torch.float32),
    )


def _fake_rms_norm_pack_activations(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, *pack: Any
) -> tuple[Tensor, ...]:
    check_rms_norm_pack_activations(x, residual, norm_weight, eps, *pack)
    return (*_fake_pack_activations(x, *pack), x.new_empty(0 if residual is None else x.shape))


def _fake_silu_mul_pack_activations(gate: Tensor, up: Tensor, *pack: Any) -> tuple[Tensor, ...]:
    check_silu_mul_pack_activations(gate, up, *pack)
    return _fake_pack_activations(gate, *pack)


def _fake_sign_gemm(*args: Any) -> Tensor:
    check_sign_gemm(*args)
    x, weight = args[:2]
    return x.new_empty(*x.shape[:-1], weight.shape[-2])


def _fake_popcount_gemm(*args: Any) -> Tensor:
    check_popcount_gemm(*args)
    planes, weight, dtype = args[0], args[4], args[-1]
    return planes.new_empty(*planes.shape[:-2], weight.shape[-2], dtype=dtype)


for _name, _check, _problem_of, _fake in (
    ("pack_signs", check_pack_signs, _signs_problem, _fake_pack_signs),
    ("pack_activations", check_pack_activations, _packing_problem, _fake_pack_activations),
    ("sign_gemm", check_sign_gemm, _sign_problem, _fake_sign_gemm),
    ("popcount_gemm", check_popcount_gemm, _popcount_problem, _fake_popcount_gemm),
    (
        "rms_norm_pack_activations",
        check_rms_norm_pack_activations,
        _norm_packing_problem,
        _fake_rms_norm_pack_activations,
    ),
    (
        "silu_mul_pack_activations",
        check_silu_mul_pack_activations,
        _silu_packing_problem,
        _fake_silu_mul_pack_activations,
    ),
):
    torch.library.define(f"bitinfer::{_name}", SCHEMAS[_name])
    torch.library.impl(f"bitinfer::{_name}", "CompositeExplicitAutograd", _implementation(_name, _check, _problem_of))
    torch.library.register_fake(f"bitinfer::{_name}", _fake)


def _seen_inside(name: str, problem_of: Callable[..., Problem]) -> Callable[..., Any]:
    """Return what tracers meet: the twin that a backend offers them if it would run the call, else the opaque op.

    A graph keeps the backend that was chosen as it was traced. Exported programs keep the op, which runs anywhere.
    """

    def rule(mode: Any, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs and not torch.compiler.is_exporting():
            problem = problem_of(*args)
            if isinstance(problem.m, torch.SymInt):  # no backend asks how many tokens there are
                problem = problem._replace(m=0)
            known = not any(isinstance(size, torch.SymInt) for size in (problem.n, problem.k))
            twin = select(problem).traced(name) if known else None
            if twin is not None:
                with mode:
                    return twin(*args)
        return mode.__torch_dispatch__(op, types, args, kwargs)

    return rule


for _name, _problem_of in (
    ("pack_signs", _signs_problem),
    ("pack_activations", _packing_problem),
    ("sign_gemm", _sign_problem),
    ("popcount_gemm", _popcount_problem),
):
    torch.library.register_torch_dispatch(f"bitinfer::{_name}", FunctionalTensorMode, _seen_inside(_name, _problem_of))
