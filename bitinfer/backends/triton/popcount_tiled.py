"""``popcount_gemm`` for many tokens: planes turned back into int8, signs expanded in registers, int8 matrix units.

    I[p, s, m, n] = act_sum[m, s] - 2 * sum_{k in s} bit[p, n, k] * q[m, k]

The operand of the matrix units is the bit itself, 0 or 1, which takes two instructions. A program computes ``BLOCK_N``
rows by ``BLOCK_M`` tokens, transposed, as ``sign_tiled`` does; segments follow each other in its accumulators, since
the order of the float sums is fixed. The matrix units are the bound.
"""

import triton
import triton.language as tl

from bitinfer.backends.triton.bits import expand_bits, load_floats, product, shifts_of, worth
from bitinfer.backends.triton.sign_tiled import tile_of


@triton.jit(do_not_specialize=["M", "W"])
def unpack_planes(
    planes_ptr,  # [M, BITS, W] uint32
    q_ptr,  # [M, q_stride] int8
    W,
    q_stride,
    BITS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Turn bit planes back into integers: +-1 for one plane, else two's complement."""
    token = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    shift = tl.arange(0, 32).to(tl.uint32)[None, :]
    q = tl.zeros((BLOCK_W, 32), tl.int32)
    for b in tl.static_range(BITS):
        plane = tl.load(planes_ptr + (token * BITS + b) * W + word, mask=word < W, other=0)
        bits = ((plane[:, None] >> shift) & 1).to(tl.int32)
        q += 1 - 2 * bits if BITS == 1 else worth(bits, b, BITS)
    columns = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(q_ptr + token * q_stride + columns, q.to(tl.int8), mask=columns < q_stride)


@triton.jit
def counts_of(
    w_ptr,
    q_ptr,
    w_at,
    q_at,
    shifts,
    W,
    first,
    last,
    BLOCK_N,
    BLOCK_M,
    BLOCK_K: tl.constexpr,
    EVEN_K,
    STRIDE: tl.constexpr,
):
    """Return int32 ``sum_k bit[n, k] * q[m, k]`` over the steps from ``first`` below ``last``, ``STRIDE`` apart."""
    words = tl.arange(0, BLOCK_K // 32)
    counts = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for step in range(first, last, STRIDE):
        at = step * (BLOCK_K // 32) + words
        if EVEN_K:
            packed = tl.load(w_ptr + w_at[:, None] + at[None, :])
        else:
            packed = tl.load(w_ptr + w_at[:, None] + at[None, :], mask=at[None, :] < W, other=0)
        q = tl.load(q_ptr + q_at + step * BLOCK_K)
        counts = tl.dot(expand_bits(packed, shifts), q, counts, out_dtype=tl.int32)
    return counts


@triton.jit
def scaled(integers, factor_m, scale_ptr, at, TARGET: tl.constexpr):
    """Return ``(factor_m * scale) * integers`` for a tile, each product rounded by itself."""
    factor = tl.broadcast_to(factor_m[None, :], integers.shape)
    if scale_ptr is not None:
        factor = product(tl.load(scale_ptr + at).to(tl.float32)[:, None], factor, TARGET)
    return product(factor, integers.to(tl.float32), TARGET)


@triton.jit(do_not_specialize=["M", "segments", "per_block", "per_group", "blocks", "groups"])
def popcount_tiled(
    q_ptr,  # [M, q_stride] int8, anything past K
    act_scale_ptr,  # [M, blocks] float32
    act_sum_ptr,  # [M, segments] int32
    act_shift_ptr,  # [M] or None
    w_ptr,  # [PLANES, N, W] uint32
    scale_ptr,  # [PLANES, N, groups] or None
    group_shift_ptr,  # [N, groups] or None
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N], or int32 [PLANES, 1, SPLIT_K, M, N] where a second kernel finishes
    M,
    N,
    q_stride,
    W,
    segments,
    per_block,
    per_group,
    blocks,
    groups,
    STEPS: tl.constexpr,  # of BLOCK_K to a segment; 0 where there is one segment
    PLANES: tl.constexpr,
    EVEN_K: tl.constexpr,
    DIRECT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    TARGET: tl.constexpr,
):
    BAND: tl.constexpr = 8
    tile_n, tile_m = tile_of(N, M, BLOCK_N, BLOCK_M, BAND)
    split = tl.program_id(1)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # tiles past the end repeat the last row and token, which are not stored
    m = tl.minimum(tokens, M - 1).to(tl.int64)
    n = tl.minimum(rows, N - 1).to(tl.int64)
    mask = (tokens < M)[:, None] & (rows < N)[None, :]
    q_at = m[None, :] * q_stride + tl.arange(0, BLOCK_K)[:, None]
    shifts = shifts_of(w_ptr, W < 0)
    steps = tl.cdiv(q_stride, BLOCK_K)

    a = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if STEPS == 0:  # no loop over segments, which would hold a second set of accumulators
        for p in tl.static_range(PLANES):
            w_at = (n + p * N) * W
            counts = counts_of(
                w_ptr, q_ptr, w_at, q_at, shifts, W, split, steps, BLOCK_N, BLOCK_M, BLOCK_K, EVEN_K, SPLIT_K
            )
            act_sum = tl.load(act_sum_ptr + m)
            if DIRECT:
                act_scale = tl.load(act_scale_ptr + m)
                a += scaled(act_sum[None, :] - 2 * counts, act_scale, scale_ptr, n + p * N, TARGET)
            else:
                integers = tl.where(split == 0, act_sum, 0)[None, :] - 2 * counts
                at = ((p * SPLIT_K + split).to(tl.int64) * M + tokens)[:, None] * N + rows[None, :]
                tl.store(out_ptr + at, tl.trans(integers), mask=mask)
        if DIRECT and group_shift_ptr is not None:
            total = tl.broadcast_to(act_sum[None, :], (BLOCK_N, BLOCK_M))
            a += scaled(total, act_scale, group_shift_ptr, n, TARGET)
    else:
        for s in range(segments):
            act_scale = tl.load(act_scale_ptr + m * blocks + s // per_block)
            act_sum = tl.load(act_sum_ptr + m * segments + s)
            group = s // per_group
            last = tl.minimum((s + 1) * STEPS, steps)
            for p in tl.static_range(PLANES):
                w_at = (n + p * N) * W
                counts = counts_of(
                    w_ptr, q_ptr, w_at, q_at, shifts, W, s * STEPS, last, BLOCK_N, BLOCK_M, BLOCK_K, EVEN_K, 1
                )
                at = (n + p * N) * groups + group
                a += scaled(act_sum[None, :] - 2 * counts, act_scale, scale_ptr, at, TARGET)
            if group_shift_ptr is not None:
                total = tl.broadcast_to(act_sum[None, :], (BLOCK_N, BLOCK_M))
                a += scaled(total, act_scale, group_shift_ptr, n * groups + group, TARGET)
    if DIRECT:
        if act_shift_ptr is not None:
            a += tl.load(act_shift_ptr + m)[None, :]
        if bias_ptr is not None:
            a += load_floats(bias_ptr, rows, rows < N)[:, None]
        at = tokens.to(tl.int64)[:, None] * N + rows[None, :]
        tl.store(out_ptr + at, tl.trans(a.to(out_ptr.dtype.element_ty)), mask=mask)
