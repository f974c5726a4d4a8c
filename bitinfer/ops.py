"""The functional API: the ops with their arguments documented and checked."""

from typing import Protocol

import torch
from torch import Tensor

from bitinfer.autograd import BinaryLinearFunction
from bitinfer.registration import call


def pack_signs(weight: Tensor) -> Tensor:
    """Pack signs: bit ``j`` of ``out[..., w]`` is set where ``weight[..., 32*w + j] < 0``.

    Args:
        weight: float32, float16 or bfloat16 ``[..., K]``.

    Returns:
        uint32 ``[..., ceil(K/32)]``. Zeros and NaN pack as +1 (bit 0), as do the bits past K.

    Raises:
        TypeError: ``weight`` has another dtype.
    """
    return call("pack_signs", weight)


def pack_activations(
    x: Tensor,
    bits: int,
    *,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    block_size: int = 0,
    group_size: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise ``z = in_scale * x`` to symmetric integers ``q`` with ``z ~ scale * q`` and split them into bit planes.

    All in float32: ``absmax = max |z|`` over a token, or over each block of columns; with ``h = 2**(bits-1) - 1``,
    ``scale = absmax / h`` and ``q = rint(z * (h / absmax))``, halves to even. One bit keeps the sign (zero is +1) and
    the mean of ``|z|`` as its scale (XNOR-Net, arXiv 1603.05279, equation 6). A token or block whose absmax is below
    2**-96 becomes zeros with scale 0; one that holds an infinity or a NaN gets the scale NaN, so that outputs show it.

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``, any strides.
        bits: 8, 4, 2 or 1.
        in_scale: floating ``[1, K]`` (any leading ones) or None.
        in_shift: floating ``[1, K]`` (any leading ones) or None.
        block_size: 0 for one scale per token, 256 for one per block of 256 columns.
        group_size: that of the weight which the result will meet; sums are kept per group.

    Returns:
        ``planes`` uint32 ``[..., bits, ceil(K/32)]``: plane ``b`` holds bit ``b`` of the two's complement of ``q``; for
        one bit the plane is set where ``q`` is -1. ``scale`` float32 ``[..., blocks]``. ``sum`` int32
        ``[..., segments]``: the sum of ``q`` over each segment, the smaller of block and group (all columns if neither
        is set). ``shift`` float32 ``[..., 1]``: ``sum_k in_shift[k] * x[k]``, or ``[..., 0]`` without ``in_shift``.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or value.
    """
    return call("pack_activations", x, in_scale, in_shift, bits, block_size, group_size)


def rms_norm_pack_activations(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    bits: int,
    *,
    residual: Tensor | None = None,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    block_size: int = 0,
    group_size: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pack ``norm_weight * RMSNorm(x + residual)``: what a decoder layer does in front of its projections, in one op.

    Each step is rounded to the dtype of ``x`` as in transformers' ``LlamaRMSNorm``: the sum, the normalised values, and
    their product with ``norm_weight``; the mean of squares is float32, in an order that differs between backends.

    Args:
        x, residual: float32, float16 or bfloat16 ``[..., K]`` of one dtype and shape, any strides.
        norm_weight: ``[K]`` in the dtype of ``x``.
        eps: added to the mean of squares.
        bits, in_scale, in_shift, block_size, group_size: as in :func:`pack_activations`.

    Returns:
        The four results of :func:`pack_activations`, and ``x + residual`` ``[..., K]`` (``[0]`` without a residual).

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or value.
    """
    return torch.ops.bitinfer.rms_norm_pack_activations(
        x, residual, norm_weight, eps, in_scale, in_shift, bits, block_size, group_size
    )


def silu_mul_pack_activations(
    gate: Tensor,
    up: Tensor,
    bits: int,
    *,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    block_size: int = 0,
    group_size: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pack ``silu(gate) * up``: what a gated MLP does in front of its down projection, in one op.

    Both steps are rounded to the dtype of ``gate``, as in transformers' ``LlamaMLP``.

    Args:
        gate, up: float32, float16 or bfloat16 ``[..., K]`` of one dtype and shape, any strides.
        bits, in_scale, in_shift, block_size, group_size: as in :func:`pack_activations`.

    Returns:
        The results of :func:`pack_activations`.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or value.
    """
    return torch.ops.bitinfer.silu_mul_pack_activations(gate, up, in_scale, in_shift, bits, block_size, group_size)


def sign_gemm(
    x: Tensor,
    weight: Tensor,
    in_features: int,
    *,
    weight_scale: Tensor | None = None,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    group_shift: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 0,
    norm_eps: float | None = None,
) -> Tensor:
    """Multiply floating point activations by a packed sign matrix, with the whole algebra of :mod:`bitinfer.weight`.

    ``y = norm(sum_p sum_g weight_scale * (S_p (in_scale * x))_g + group_shift * ... + in_shift . x) + bias``

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``, any strides.
        weight: uint32 ``[N, ceil(K/32)]`` or ``[P, N, ceil(K/32)]``.
        in_features: K.
        weight_scale, in_scale, in_shift, group_shift, bias, group_size, norm_eps: see :class:`bitinfer.BinaryWeight`.

    Returns:
        ``[..., N]`` in the dtype of ``x``. Accumulation is float32 or wider: against a float64 product of the
        dequantised weight the error is no larger than that of a dense ``F.linear`` in the dtype of ``x``.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype or shape.
        BackendError: the forced backend cannot run it.
    """
    return call(
        "sign_gemm", x, weight, in_features, weight_scale, in_scale, in_shift, group_shift, bias, group_size, norm_eps
    )


def popcount_gemm(
    planes: Tensor,
    act_scale: Tensor,
    act_sum: Tensor,
    act_shift: Tensor | None,
    weight: Tensor,
    in_features: int,
    *,
    weight_scale: Tensor | None = None,
    group_shift: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 0,
    block_size: int = 0,
    norm_eps: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Multiply quantised activations by a packed sign matrix: exact integers, then a float32 epilogue.

    ``I[p, s] = sum_{k in segment s} S[p, n, k] * q[k] = sum(q) - 2 * sum_b c_b * popcount(w & plane_b)``

    The epilogue is fixed to the rounding, no multiply-add fused, so that backends agree bit for bit: ``a = 0``; for
    each segment in order, for each plane in order ``a += (act_scale * weight_scale) * float(I)``, then
    ``a += (act_scale * group_shift) * float(act_sum)``; then ``a += act_shift``; then the norm (float64 inside); then
    ``a += bias``; then one rounding to ``dtype``.

    Args:
        planes, act_scale, act_sum, act_shift: what :func:`pack_activations` returned; ``act_shift`` may be None.
        weight: uint32 ``[N, ceil(K/32)]`` or ``[P, N, ceil(K/32)]``.
        in_features: K.
        weight_scale, group_shift, bias, group_size, norm_eps: see :class:`bitinfer.BinaryWeight`.
        block_size: as given to :func:`pack_activations`.
        dtype: float32, float16 or bfloat16.

    Returns:
        ``[..., N]`` in ``dtype``.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype or shape.
        BackendError: the forced backend cannot run it.
    """
    return call(
        "popcount_gemm",
        planes,
        act_scale,
        act_sum,
        act_shift,
        weight,
        in_features,
        weight_scale,
        group_shift,
        bias,
        group_size,
        block_size,
        norm_eps,
        dtype,
    )


class PackedWeight(Protocol):
    """The fields of a packed weight: a :class:`bitinfer.BinaryWeight` has them, and so has a ``BinaryLinear``."""

    @property
    def signs(self) -> Tensor: ...
    @property
    def in_features(self) -> int: ...
    @property
    def scale(self) -> Tensor | None: ...
    @property
    def in_scale(self) -> Tensor | None: ...
    @property
    def in_shift(self) -> Tensor | None: ...
    @property
    def group_shift(self) -> Tensor | None: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def group_size(self) -> int: ...
    @property
    def norm_eps(self) -> float | None: ...


def binary_linear(x: Tensor, weight: PackedWeight, act_bits: int | None = None, act_block: int = 0) -> Tensor:
    """Apply a binary weight to activations: ``sign_gemm``, or ``pack_activations`` and ``popcount_gemm``.

    Differentiable with respect to ``x`` (see :mod:`bitinfer.autograd`).

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``.
        weight: the packed weight.
        act_bits: None for floating point activations, or 8, 4, 2, 1.
        act_block: 0 for one activation scale per token, 256 for one per block of 256 columns.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    if x.requires_grad and torch.is_grad_enabled():
        w = weight
        scales = (w.scale, w.in_scale, w.in_shift, w.group_shift, w.bias)
        return BinaryLinearFunction.apply(
            x, act_bits, act_block, w.signs, w.in_features, *scales, w.group_size, w.norm_eps
        )
    return apply_weight(x, weight, act_bits, act_block)


def apply_weight(x: Tensor, weight: PackedWeight, act_bits: int | None, act_block: int) -> Tensor:
    """Do what :func:`binary_linear` does, without a gradient."""
    w = weight
    if act_bits is None:
        return call(
            "sign_gemm",
            x,
            w.signs,
            w.in_features,
            w.scale,
            w.in_scale,
            w.in_shift,
            w.group_shift,
            w.bias,
            w.group_size,
            w.norm_eps,
        )
    planes, scale, total, shift = call("pack_activations", x, w.in_scale, w.in_shift, act_bits, act_block, w.group_size)
    return call(
        "popcount_gemm",
        planes,
        scale,
        total,
        None if w.in_shift is None else shift,
        w.signs,
        w.in_features,
        w.scale,
        w.group_shift,
        w.bias,
        w.group_size,
        act_block,
        w.norm_eps,
        x.dtype,
    )
