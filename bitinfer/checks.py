"""Argument checks of the ops, shared by their implementations and shape functions: every error names the argument,
what was expected and what came."""

import torch
from torch import Tensor

from bitinfer.backends.reference import segment_size
from bitinfer.packing import words_per_row
from bitinfer.weight import FLOAT_DTYPES, group_count

ACT_BITS = (8, 4, 2, 1)
BLOCK_SIZE = 256  # the one block size of activation scales


def _activations(op: str, x: Tensor, name: str = "x") -> None:
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float16 or bfloat16, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError(f"{op}: {name} must have at least one dimension [..., in_features], got a scalar")


def _columns(op: str, name: str, tensor: Tensor | None, k: int) -> None:
    """Check a per-column vector ``[1, K]`` (any leading ones)."""
    if tensor is None:
        return
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    if tensor.dim() == 0 or tensor.shape[-1] != k or tensor.numel() != k:
        raise ValueError(f"{op}: {name} must have shape [1, {k}], got {tuple(tensor.shape)}")


def _sizes(op: str, block_size: int, group_size: int) -> None:
    if group_size < 0 or group_size % 32:
        raise ValueError(f"{op}: group_size must be 0 or a multiple of 32, got {group_size}")
    if block_size not in (0, BLOCK_SIZE):
        raise ValueError(f"{op}: block_size must be 0 (one scale per token) or {BLOCK_SIZE}, got {block_size}")
    if block_size and group_size and block_size % group_size and group_size % block_size:
        raise ValueError(
            f"{op}: block_size={block_size} and group_size={group_size} overlap unevenly: one must divide the other"
        )


def _norm(op: str, eps: float | None, name: str = "norm_eps") -> None:
    if eps is not None and not 0 <= eps < float("inf"):
        none = "None or " if name == "norm_eps" else ""
        raise ValueError(f"{op}: {name} must be {none}a finite number from 0, got {eps}")


def _weight(
    op: str,
    weight: Tensor,
    in_features: int,
    weight_scale: Tensor | None,
    group_shift: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> None:
    if weight.dtype != torch.uint32:
        raise TypeError(f"{op}: weight must be torch.uint32 sign words, got {weight.dtype}")
    if weight.dim() not in (2, 3) or weight.shape[-1] != words_per_row(in_features):
        raise ValueError(
            f"{op}: weight must be [N, {words_per_row(in_features)}] or [P, N, {words_per_row(in_features)}] words for "
            f"in_features={in_features}, got {tuple(weight.shape)}"
        )
    n, groups = weight.shape[-2], group_count(in_features, group_size)
    shapes = {
        "weight_scale": (weight_scale, (*weight.shape[:-1], groups)),
        "group_shift": (group_shift, (*(1,) * (weight.dim() - 2), n, groups)),
        "bias": (bias, (n,)),
    }
    for name, (tensor, expected) in shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(expected):
            raise ValueError(f"{op}: {name} must have shape {tuple(expected)}, got {tuple(tensor.shape)}")
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{op}: {name} must be float32, float16 or bfloat16, got {tensor.dtype}")


def _device(op: str, first: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but the activations are on {first.device}")


def check_pack_signs(weight: Tensor) -> None:
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"pack_signs: weight must be float32, float16 or bfloat16, got {weight.dtype}")
    if weight.dim() == 0:
        raise ValueError("pack_signs: weight must have at least one dimension [..., K], got a scalar")


def check_pack_activations(
    x: Tensor, in_scale: Tensor | None, in_shift: Tensor | None, bits: int, block_size: int, group_size: int
) -> None:
    _pack_activations("pack_activations", x, in_scale, in_shift, bits, block_size, group_size)


def check_rms_norm_pack_activations(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    bits: int,
    block_size: int,
    group_size: int,
) -> None:
    op = "rms_norm_pack_activations"
    _pack_activations(op, x, in_scale, in_shift, bits, block_size, group_size)
    _norm(op, eps, "eps")
    if residual is not None:
        _like(op, "residual", residual, "x", x, x.shape)
    _like(op, "norm_weight", norm_weight, "x", x, x.shape[-1:])
    _device(op, x, residual=residual, norm_weight=norm_weight)


def check_silu_mul_pack_activations(
    gate: Tensor,
    up: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    bits: int,
    block_size: int,
    group_size: int,
) -> None:
    op = "silu_mul_pack_activations"
    _pack_activations(op, gate, in_scale, in_shift, bits, block_size, group_size, "gate")
    _like(op, "up", up, "gate", gate, gate.shape)
    _device(op, gate, up=up)


def _like(op: str, name: str, tensor: Tensor, other: str, like: Tensor, shape: torch.Size) -> None:
    if tensor.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of {other}, {like.dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def _pack_activations(
    op: str,
    x: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    bits: int,
    block_size: int,
    group_size: int,
    name: str = "x",
) -> None:
    _activations(op, x, name)
    if bits not in ACT_BITS:
        raise ValueError(f"{op}: bits must be one of {ACT_BITS}, got {bits}")
    _sizes(op, block_size, group_size)
    _columns(op, "in_scale", in_scale, x.shape[-1])
    _columns(op, "in_shift", in_shift, x.shape[-1])
    _device(op, x, in_scale=in_scale, in_shift=in_shift)


def check_sign_gemm(
    x: Tensor,
    weight: Tensor,
    in_features: int,
    weight_scale: Tensor | None,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    group_shift: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    norm_eps: float | None,
) -> None:
    op = "sign_gemm"
    _activations(op, x)
    if x.shape[-1] != in_features:
        raise ValueError(
            f"{op}: weight has in_features={in_features} but x has last dimension {x.shape[-1]} "
            f"(x.shape={tuple(x.shape)})"
        )
    _sizes(op, 0, group_size)
    _norm(op, norm_eps)
    _weight(op, weight, in_features, weight_scale, group_shift, bias, group_size)
    _columns(op, "in_scale", in_scale, in_features)
    _columns(op, "in_shift", in_shift, in_features)
    _device(
        op,
        x,
        weight=weight,
        weight_scale=weight_scale,
        in_scale=in_scale,
        in_shift=in_shift,
        group_shift=group_shift,
        bias=bias,
    )


def check_popcount_gemm(
    planes: Tensor,
    act_scale: Tensor,
    act_sum: Tensor,
    act_shift: Tensor | None,
    weight: Tensor,
    in_features: int,
    weight_scale: Tensor | None,
    group_shift: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    block_size: int,
    norm_eps: float | None,
    dtype: torch.dtype,
) -> None:
    op = "popcount_gemm"
    _sizes(op, block_size, group_size)
    _norm(op, norm_eps)
    _weight(op, weight, in_features, weight_scale, group_shift, bias, group_size)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: dtype must be float32, float16 or bfloat16, got {dtype}")
    if planes.dim() < 2 or planes.shape[-2] not in ACT_BITS or planes.shape[-1] != words_per_row(in_features):
        raise ValueError(
            f"{op}: planes must be [..., bits, {words_per_row(in_features)}] with bits one of {ACT_BITS} for "
            f"in_features={in_features}, got {tuple(planes.shape)}"
        )
    lead = tuple(planes.shape[:-2])
    expected = {
        "planes": (planes, tuple(planes.shape), torch.uint32),
        "act_scale": (act_scale, (*lead, group_count(in_features, block_size)), torch.float32),
        "act_sum": (act_sum, (*lead, group_count(in_features, segment_size(block_size, group_size))), torch.int32),
        "act_shift": (act_shift, (*lead, 1), torch.float32),
    }
    for name, (tensor, shape, kind) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != kind:
            raise TypeError(f"{op}: {name} must be {kind}, got {tensor.dtype}")
    _device(
        op,
        planes,
        act_scale=act_scale,
        act_sum=act_sum,
        act_shift=act_shift,
        weight=weight,
        weight_scale=weight_scale,
        group_shift=group_shift,
        bias=bias,
    )
