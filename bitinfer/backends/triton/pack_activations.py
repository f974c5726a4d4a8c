"""``pack_activations``: scale, quantise, and transpose the bits into planes, one token to a program.

    z = in_scale * x,  scale = absmax / h,  q = rint(z * (h / absmax)),  planes[b, w] bit j = bit b of q[32*w + j]

A token is read twice where one scale serves all of it (for its absmax, then to quantise), once where blocks have their
own. A tile is ``ROWS`` segments by ``COLUMNS`` columns, so that sums per segment are sums over rows; a segment longer
than a tile is walked along. What bounds it is the latency of one token, then instructions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitinfer.backends.reference import SMALLEST_ABSMAX, segment_size
from bitinfer.backends.triton.bits import load_floats, product
from bitinfer.backends.triton.launch import ceil_div, contiguous, describe, flat, launch, power_of_two_from
from bitinfer.packing import words_per_row
from bitinfer.weight import group_count

TILE = 2048  # columns that a program holds at a time


@triton.jit
def scales_of(absmax, HIGHEST: tl.constexpr, SMALLEST: tl.constexpr):
    """Return the scale and the factor that quantises; an infinite ``absmax`` marks a token that is not finite."""
    highest = tl.full(absmax.shape, HIGHEST, tl.float32)
    bad, zero = absmax == float("inf"), absmax < SMALLEST
    divisor = tl.where(zero | bad, 1.0, absmax)
    scale = tl.where(zero, 0.0, tl.math.div_rn(divisor, highest))
    inverse = tl.where(zero | bad, 0.0, tl.math.div_rn(highest, divisor))
    return tl.where(bad, float("nan"), scale), inverse


@triton.jit
def scaled(x_ptr, in_scale_ptr, columns, mask, TARGET: tl.constexpr):
    z = load_floats(x_ptr, columns, mask)
    if in_scale_ptr is not None:
        z = product(z, load_floats(in_scale_ptr, columns, mask), TARGET)
    return z


@triton.jit(do_not_specialize=["K", "W", "segment", "segments", "blocks"])
def pack_token(
    x_ptr,  # [M, K], any float
    in_scale_ptr,  # [K] or None
    in_shift_ptr,  # [K] or None
    planes_ptr,  # [M, BITS, W] uint32
    scale_ptr,  # [M, blocks] float32
    sum_ptr,  # [M, segments] int32
    shift_ptr,  # [M] float32, with in_shift
    K,
    W,
    x_stride,
    segment,  # columns to a sum
    segments,
    blocks,
    BITS: tl.constexpr,
    BLOCKED: tl.constexpr,  # a scale for every row of a tile, else one for the token
    SMALLEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMS: tl.constexpr,  # segments to a row of a tile
    TARGET: tl.constexpr,
):
    HIGHEST: tl.constexpr = (1 << (BITS - 1)) - 1.0
    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * x_stride
    flat_columns = tl.arange(0, ROWS * COLUMNS)

    inverse = 0.0
    if not BLOCKED or in_shift_ptr is not None:
        largest = tl.zeros((ROWS * COLUMNS,), tl.float32)
        mean = tl.zeros((ROWS * COLUMNS,), tl.float64)
        shift = tl.zeros((ROWS * COLUMNS,), tl.float64)
        for start in range(0, K, ROWS * COLUMNS):
            k = start + flat_columns
            if in_shift_ptr is not None:
                shift += load_floats(x_ptr, k, k < K).to(tl.float64) * load_floats(in_shift_ptr, k, k < K)
            if not BLOCKED:
                size = tl.abs(scaled(x_ptr, in_scale_ptr, k, k < K, TARGET))
                if BITS == 1:
                    mean += size
                else:
                    largest = tl.maximum(largest, tl.where(size < float("inf"), size, float("inf")))
        if in_shift_ptr is not None:
            tl.store(shift_ptr + token, tl.sum(shift, 0).to(tl.float32))
        if not BLOCKED:
            if BITS == 1:
                scale = (tl.sum(mean, 0) / K).to(tl.float32)
                finite = tl.abs(scale) < float("inf")
                scale = tl.where(finite, scale, float("nan"))
                inverse = tl.where(finite, 1.0, 0.0)
            else:
                scale, inverse = scales_of(tl.max(largest, 0), HIGHEST, SMALLEST)
            tl.store(scale_ptr + token, scale)

    stride = segment * SUMS  # columns to a row of a tile, where rows are whole
    for first in range(0, tl.cdiv(K, stride), ROWS):
        rows = first + tl.arange(0, ROWS)
        ends = tl.minimum(K, (rows + 1) * stride)
        total = tl.zeros((ROWS * SUMS,), tl.int32)
        for start in range(0, stride, COLUMNS):
            k = (rows * stride + start)[:, None] + tl.arange(0, COLUMNS)[None, :]
            valid = k < ends[:, None]
            z = scaled(x_ptr, in_scale_ptr, k, valid, TARGET)
            if BLOCKED:
                size = tl.abs(z)
                if BITS == 1:
                    columns = tl.maximum(ends - rows * stride, 1)
                    row_scale = (tl.sum(size.to(tl.float64), 1) / columns).to(tl.float32)
                    finite = tl.abs(row_scale) < float("inf")
                    row_scale = tl.where(finite, row_scale, float("nan"))
                    row_inverse = tl.where(finite, 1.0, 0.0)
                else:
                    size = tl.where(size < float("inf"), size, float("inf"))
                    row_scale, row_inverse = scales_of(tl.max(size, 1), HIGHEST, SMALLEST)
                tl.store(scale_ptr + token * blocks + rows, row_scale, mask=rows < blocks)
                factor = tl.broadcast_to(row_inverse[:, None], z.shape)
            else:
                factor = tl.full(z.shape, 0.0, tl.float32) + inverse
            z = tl.where(factor == 0.0, 0.0, z)  # drops what is not finite
            if BITS == 1:
                q = tl.where(valid, tl.where(z < 0.0, -1, 1), 0)
                bits = (z < 0.0).to(tl.uint32)
            else:
                # the sum rounds to an integer, halves to even, and leaves its two's complement in the low bits
                magic = product(z, factor, TARGET) + 12582912.0
                bits = magic.to(tl.uint32, bitcast=True)
                q = bits.to(tl.int32, bitcast=True) - 0x4B400000
            total += tl.sum(tl.reshape(q, (ROWS * SUMS, COLUMNS // SUMS)), 1)
            words = tl.reshape(bits, (ROWS * COLUMNS // 32, 32))
            left = tl.arange(0, 32).to(tl.uint32)[None, :]
            column = (start + tl.arange(0, COLUMNS // 32) * 32)[None, :]
            word = (rows[:, None] * stride + column) // 32
            inside = (column < stride) & (word < W)
            for b in tl.static_range(BITS):
                plane = tl.reshape(tl.sum(((words >> b) & 1) << left, 1), (ROWS, COLUMNS // 32))
                tl.store(planes_ptr + (token * BITS + b) * W + word, plane, mask=inside)
        at = first * SUMS + tl.arange(0, ROWS * SUMS)
        tl.store(sum_ptr + token * segments + at, total, mask=at < segments)


def pack_activations(
    x: Tensor, in_scale: Tensor | None, in_shift: Tensor | None, bits: int, block_size: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`bitinfer.ops.pack_activations`."""
    lead, k = x.shape[:-1], x.shape[-1]
    words, segment = words_per_row(k), segment_size(block_size, group_size)
    blocks, segments = group_count(k, block_size), group_count(k, segment)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*lead, *shape, dtype=dtype, device=x.device)

    planes = empty(bits, words, dtype=torch.uint32)
    scale, total = empty(blocks, dtype=torch.float32), empty(segments, dtype=torch.int32)
    shift = empty(0 if in_shift is None else 1, dtype=torch.float32)
    tokens = flat(x)
    if tokens.shape[0] == 0:
        return planes, scale, total, shift
    segment = segment or k
    if block_size:
        columns, sums = block_size, block_size // segment
    else:
        columns, sums = min(TILE, power_of_two_from(max(segment, 32))), 1
    rows = min(max(1, TILE // columns), power_of_two_from(ceil_div(k, segment * sums)))
    launch(
        pack_token,
        (tokens.shape[0],),
        tokens,
        contiguous(in_scale),
        contiguous(in_shift),
        planes,
        scale,
        total,
        shift,
        k,
        words,
        tokens.stride(0),
        segment,
        segments,
        blocks,
        BITS=bits,
        BLOCKED=block_size > 0,
        SMALLEST=SMALLEST_ABSMAX,
        ROWS=rows,
        COLUMNS=columns,
        SUMS=sums,
        TARGET=describe(x.device).target,
        num_warps=8 if rows * columns >= 1024 else 4,
    )
    return planes, scale, total, shift
