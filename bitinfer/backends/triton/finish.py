"""What follows a product that one kernel could not finish: the sum of its parts, the norm over N, the bias.

    y[m, n] = norm(sum_s a[s, m, n]) + bias[n]

A program takes one token; reading the parts is the bound.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitinfer.backends.triton.bits import load_floats, product
from bitinfer.backends.triton.launch import ceil_div, describe, launch

BLOCK = 1024


@triton.jit
def finished(a, mean, factor, bias_ptr, n, N, NORM: tl.constexpr):
    if NORM:
        a = ((a.to(tl.float64) - mean) * factor).to(tl.float32)
    if bias_ptr is not None:
        a += load_floats(bias_ptr, n, n < N)
    return a


@triton.jit
def summed(parts_ptr, token, n, M, N, PARTS: tl.constexpr):
    a = tl.zeros(n.shape, tl.float32)
    for s in tl.static_range(PARTS):
        a += tl.load(parts_ptr + (s * M + token) * N + n, mask=n < N, other=0.0)
    return a


@triton.jit(do_not_specialize=["M", "eps"])
def finish_floats(
    parts_ptr,  # [PARTS, M, N] float32
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N]
    M,
    N,
    eps,
    PARTS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the parts; the norm takes a pass for its mean, one for its variance, and one to apply them, in float64."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mean = 0.0
    factor = 0.0
    first = tl.program_id(1) * BLOCK
    end = min(N, first + BLOCK)
    if NORM:
        end = N
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, N, BLOCK):
            total += summed(parts_ptr, token, start + columns, M, N, PARTS).to(tl.float64)
        mean = tl.sum(total, 0) / N
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, N, BLOCK):
            n = start + columns
            centred = tl.where(n < N, summed(parts_ptr, token, n, M, N, PARTS).to(tl.float64) - mean, 0.0)
            total += centred * centred
        factor = 1.0 / tl.sqrt(tl.sum(total, 0) / N + eps)
    for start in range(first, end, BLOCK):
        n = start + columns
        y = finished(summed(parts_ptr, token, n, M, N, PARTS), mean, factor, bias_ptr, n, N, NORM)
        tl.store(out_ptr + token * N + n, y.to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["M", "segments", "per_block", "per_group", "blocks", "groups"])
def scale_integers(
    integers_ptr,  # [PLANES, segments, SPLITS, M, N] int32
    act_scale_ptr,  # [M, blocks]
    act_sum_ptr,  # [M, segments]
    act_shift_ptr,  # [M] or None
    scale_ptr,  # [PLANES, N, groups] or None
    group_shift_ptr,  # [N, groups] or None
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N]
    M,
    N,
    segments,
    per_block,  # segments to a block of activations
    per_group,  # segments to a group of weights
    blocks,
    groups,
    PLANES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TARGET: tl.constexpr,
):
    """Scale and sum the integers of every segment in the order that :func:`bitinfer.ops.popcount_gemm` fixes."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    a = tl.zeros((BLOCK,), tl.float32)
    for s in range(segments):
        act_scale = tl.load(act_scale_ptr + token * blocks + s // per_block)
        group = s // per_group
        for p in tl.static_range(PLANES):
            integers = tl.zeros((BLOCK,), tl.int32)
            for part in tl.static_range(SPLITS):
                at = ((p * segments + s).to(tl.int64) * SPLITS + part) * M + token
                integers += tl.load(integers_ptr + at * N + n, mask=mask, other=0)
            a = add_scaled(a, integers, act_scale, scale_ptr, (n.to(tl.int64) + p * N) * groups + group, mask, TARGET)
        if group_shift_ptr is not None:
            total = tl.load(act_sum_ptr + token * segments + s)
            a = add_scaled(a, total, act_scale, group_shift_ptr, n.to(tl.int64) * groups + group, mask, TARGET)
    if act_shift_ptr is not None:
        a += tl.load(act_shift_ptr + token)
    if bias_ptr is not None:
        a += load_floats(bias_ptr, n, mask)
    tl.store(out_ptr + token * N + n, a.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_scaled(a, integers, act_scale, scale_ptr, at, mask, TARGET: tl.constexpr):
    """Return ``a + (act_scale * scale) * integers``, each operation rounded by itself."""
    factor = act_scale
    if scale_ptr is not None:
        factor = product(act_scale, load_floats(scale_ptr, at, mask), TARGET)
    return a + product(factor, integers.to(tl.float32), TARGET)


def sum_parts(parts: Tensor, bias: Tensor | None, norm_eps: float | None, dtype: torch.dtype) -> Tensor:
    """Return ``norm(sum of parts) + bias`` for float32 ``parts [S, M, N]``."""
    splits, m, n = parts.shape
    out = torch.empty(m, n, dtype=dtype, device=parts.device)
    norm = norm_eps is not None
    grid = (m, 1 if norm else ceil_div(n, BLOCK))
    launch(finish_floats, grid, parts, bias, out, m, n, float(norm_eps or 0.0), PARTS=splits, NORM=norm, BLOCK=BLOCK)
    return out


def finish_integers(
    integers: Tensor,
    act_scale: Tensor,
    act_sum: Tensor,
    act_shift: Tensor | None,
    scale: Tensor | None,
    group_shift: Tensor | None,
    bias: Tensor | None,
    segment: int,
    block_size: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return what ``popcount_gemm`` gives without a norm for int32 ``integers [P, segments, S, M, N]``."""
    planes, segments, splits, m, n = integers.shape
    out = torch.empty(m, n, dtype=dtype, device=integers.device)
    launch(
        scale_integers,
        (m, ceil_div(n, 256)),
        integers,
        act_scale,
        act_sum,
        act_shift,
        scale,
        group_shift,
        bias,
        out,
        m,
        n,
        segments,
        block_size // segment if block_size else segments,
        group_size // segment if group_size else segments,
        act_scale.shape[-1],
        next((t.shape[-1] for t in (scale, group_shift) if t is not None), 1),
        PLANES=planes,
        SPLITS=splits,
        BLOCK=256,
        TARGET=describe(integers.device).target,
    )
    return out
