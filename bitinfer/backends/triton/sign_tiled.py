"""``sign_gemm`` for many tokens: signs expanded in registers, as the left operand of the matrix units.

    acc[n, m] = sum_k S[n, k] * z[m, k],  z = in_scale * x

A program computes ``BLOCK_N`` rows by ``BLOCK_M`` tokens, transposed, so that the expanded signs need not go through
shared memory. 16-bit activations are an operand as they are, multiplied by +-1, or by +-in_scale of the same dtype:
either is exact. Otherwise ``z`` comes as a sum of bfloat16 parts, two for 16-bit activations and three for float32: 16
and 24 bits of it, since rounding it to one 16-bit number would cost as much accuracy as a dense layer loses in all. The
matrix units are the bound, once for each part. They cut the sums that they carry instead of rounding them: for float32,
where that would show, each step sums from zero, and the steps are added outside.
"""

import triton
import triton.language as tl

from bitinfer.backends.triton.bits import expand_scaled, expand_signs, load_floats, shifts_of


@triton.jit
def tile_of(N, M, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BAND: tl.constexpr):
    """Return which tile of rows and of tokens a program computes; ``BAND`` tiles of rows share the tokens they read."""
    pid = tl.program_id(0)
    row_tiles, token_tiles = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    band = pid // (BAND * token_tiles)
    height = min(row_tiles - band * BAND, BAND)
    within = pid % (BAND * token_tiles)
    return band * BAND + within % height, within // height


@triton.jit
def scaled(acc, scale_ptr, at):
    if scale_ptr is not None:
        acc = acc * tl.load(scale_ptr + at).to(tl.float32)[:, None]
    return acc


@triton.jit(do_not_specialize=["M", "K", "groups", "group_size"])
def sign_tiled(
    z_ptr,  # [PARTS, M, z_stride], 16-bit
    in_scale_ptr,  # [K] of the dtype of z, where z is x; or None
    w_ptr,  # [PLANES, N, W] uint32
    scale_ptr,  # [PLANES, N, groups] or None
    group_shift_ptr,  # [N, groups] or None
    z_sum_ptr,  # [M, groups] float32: sums of z, with group_shift
    shift_ptr,  # [M] float32 or None: in_shift . x
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N], or [SPLIT_K, M, N] float32 where a second kernel finishes
    M,
    N,
    K,
    z_stride,
    W,
    groups,
    group_size,
    PARTS: tl.constexpr,
    PLANES: tl.constexpr,
    GROUPED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    BAND: tl.constexpr = 8
    tile_n, tile_m = tile_of(N, M, BLOCK_N, BLOCK_M, BAND)
    split = tl.program_id(1)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # tiles past the end repeat the last row and token, which are not stored
    z_at = tl.minimum(tokens, M - 1).to(tl.int64)[None, :] * z_stride + tl.arange(0, BLOCK_K)[:, None]
    rows_at = tl.minimum(rows, N - 1).to(tl.int64)
    words = tl.arange(0, BLOCK_K // 32)
    steps = tl.cdiv(K, BLOCK_K)
    FRESH: tl.constexpr = GROUPED or PARTS == 3  # sums of a step
    shifts = shifts_of(w_ptr, W < 0)

    y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for p in tl.static_range(PLANES):
        plane_rows = rows_at + p * N
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        total = acc
        for step in range(split, steps, SPLIT_K):
            k = step * BLOCK_K
            w_at = plane_rows[:, None] * W + (step * (BLOCK_K // 32) + words)[None, :]
            if EVEN_K:
                packed = tl.load(w_ptr + w_at)
            else:
                packed = tl.load(w_ptr + w_at, mask=(step * (BLOCK_K // 32) + words)[None, :] < W, other=0)
            if in_scale_ptr is None:
                signs = expand_signs(packed, shifts, z_ptr.dtype.element_ty)
            else:
                columns = k + tl.arange(0, BLOCK_K)
                signs = expand_scaled(packed, shifts, tl.load(in_scale_ptr + columns, mask=columns < K, other=0.0))
            if FRESH:
                acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for part in tl.static_range(PARTS):
                part_at = z_at + (part * M).to(tl.int64) * z_stride + k
                if EVEN_K:
                    z = tl.load(z_ptr + part_at)
                else:
                    z = tl.load(z_ptr + part_at, mask=(k + tl.arange(0, BLOCK_K))[:, None] < K, other=0.0)
                acc = tl.dot(signs, z, acc)
            if GROUPED:
                y += scaled(acc, scale_ptr, plane_rows * groups + k // group_size)
            elif FRESH:
                total += acc
        if not GROUPED:
            acc = scaled(total if FRESH else acc, scale_ptr, plane_rows)
            y = acc if PLANES == 1 else y + acc
    if split == 0:
        if group_shift_ptr is not None:
            for g in range(groups):
                z_sum = tl.load(z_sum_ptr + tl.minimum(tokens, M - 1).to(tl.int64) * groups + g)
                y += tl.load(group_shift_ptr + rows_at * groups + g).to(tl.float32)[:, None] * z_sum[None, :]
        if shift_ptr is not None:
            y += tl.load(shift_ptr + tokens, mask=tokens < M, other=0.0)[None, :]
    if bias_ptr is not None:
        y += load_floats(bias_ptr, rows, rows < N)[:, None]
    at = (split.to(tl.int64) * M + tokens)[:, None] * N + rows[None, :]
    y = tl.trans(y.to(out_ptr.dtype.element_ty))
    tl.store(out_ptr + at, y, mask=(tokens < M)[:, None] & (rows < N)[None, :])


@triton.jit(do_not_specialize=["M", "K", "z_stride", "group_size", "groups"])
def prepare(
    x_ptr,  # [M, K], any float
    in_scale_ptr,  # [K] or None
    in_shift_ptr,  # [K] or None
    z_ptr,  # [PARTS, M, z_stride] bfloat16, or None
    shift_ptr,  # [M] float32, with in_shift
    M,
    K,
    x_stride,
    z_stride,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Split ``in_scale * x`` into a sum of bfloat16 numbers, zero past K, and take the product with ``in_shift``."""
    token = tl.program_id(0).to(tl.int64)
    shift = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, z_stride, BLOCK):
        k = start + tl.arange(0, BLOCK)
        z = load_floats(x_ptr + token * x_stride, k, k < K)
        if in_shift_ptr is not None:
            shift += z * load_floats(in_shift_ptr, k, k < K)
        if in_scale_ptr is not None:
            z = z * load_floats(in_scale_ptr, k, k < K)
        if z_ptr is not None:
            for part in tl.static_range(PARTS):
                rounded = z.to(tl.bfloat16)
                tl.store(z_ptr + (part * M + token) * z_stride + k, rounded, mask=k < z_stride)
                z = z - rounded.to(tl.float32)
    if in_shift_ptr is not None:
        tl.store(shift_ptr + token, tl.sum(shift, 0))


@triton.jit(do_not_specialize=["K", "x_stride", "groups", "group_size"])
def sum_groups(
    x_ptr,  # [M, K], any float
    in_scale_ptr,  # [K] or None
    out_ptr,  # [M, groups] float32
    K,
    x_stride,
    groups,
    group_size,
    BLOCK: tl.constexpr,
):
    """Sum ``in_scale * x`` over the columns of each group."""
    token, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    total = tl.zeros((BLOCK,), tl.float32)
    end = min(K, (group + 1) * group_size)
    for start in range(group * group_size, end, BLOCK):
        k = start + tl.arange(0, BLOCK)
        z = load_floats(x_ptr + token * x_stride, k, k < end)
        if in_scale_ptr is not None:
            z = z * load_floats(in_scale_ptr, k, k < end)
        total += z
    tl.store(out_ptr + token * groups + group, tl.sum(total, 0))
