"""``sign_gemm`` for few tokens: every weight is read once and applied to the float's sign bit.

    y[m, n] = sum_p sum_g scale[p, n, g] * sum_{k in g} S[p, n, k] * z[m, k] + shifts + bias,  z = in_scale * x

For M up to 8. A program computes ``BLOCK_N`` rows of all tokens. Its threads lie side by side along K: each holds
``UNIT`` neighbouring columns (a byte, a half or a whole word of signs) of all of the program's rows, so that a column
of ``x`` is loaded and scaled once for ``BLOCK_N`` weights, and the sums stay in registers until the end. A weight costs
a shift, and for each token a logic instruction and an addition, all in float32: instruction issue is the bound, not
memory.
"""

import triton
import triton.language as tl

from bitinfer.backends.triton.bits import flip, load_floats, load_four


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return ``COUNT`` tensors of zeros."""
    tensors = ()
    for _ in tl.static_range(COUNT):
        tensors = tensors + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    return tensors


# what is known of no alignment is loaded a unit to a thread, as the header says
@triton.jit(do_not_specialize=["N", "K", "x_stride", "row_units", "groups", "group_size"])
def sign_decode(
    x_ptr,  # [TOKENS, K], any float
    w_ptr,  # [PLANES, N, W] uint32
    scale_ptr,  # [PLANES, N, groups] or None
    in_scale_ptr,  # [K] or None
    in_shift_ptr,  # [K] or None
    group_shift_ptr,  # [N, groups] or None
    bias_ptr,  # [N] or None
    out_ptr,  # [TOKENS, N], or [SPLIT_K, TOKENS, N] float32 where a second kernel finishes
    N,
    K,
    x_stride,
    row_units,  # UNITs to a row of words
    groups,
    group_size,
    TOKENS: tl.constexpr,
    PLANES: tl.constexpr,
    GROUPED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    THREADS: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    late: tl.constexpr = PLANES == 1 and not GROUPED  # one scale a row: it can wait for the sum
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    rows = rows.to(tl.int64)
    w_ptr = w_ptr.to(tl.pointer_type(tl.uint8 if UNIT == 8 else tl.uint16 if UNIT == 16 else tl.uint32))
    units = tl.cdiv(K, UNIT)

    sums = zeros(TOKENS, BLOCK_N, THREADS)
    group_shifts = zeros(TOKENS, BLOCK_N, THREADS)
    shifts = zeros(TOKENS, 1, THREADS)
    for start in range(tl.program_id(1) * THREADS, units, SPLIT_K * THREADS):
        unit = start + tl.arange(0, THREADS)
        group = unit * UNIT // group_size if GROUPED else unit * 0
        unit_mask = unit < units
        x_mask = unit_mask[None, :]
        w_mask = row_mask[:, None] & unit_mask[None, :]
        z_sums = zeros(TOKENS, 1, THREADS)
        for p in tl.static_range(PLANES):
            plane_rows = (rows + p * N)[:, None]
            signs = tl.load(w_ptr + plane_rows * row_units + unit[None, :], mask=w_mask, other=0).to(tl.uint32)
            parts = zeros(TOKENS, BLOCK_N, THREADS)
            for c in tl.static_range(0, UNIT, 4):
                columns = (unit * UNIT + c)[None, :]
                if in_scale_ptr is not None:
                    in_scale = load_four(in_scale_ptr, columns, K, x_mask, WIDE)
                if in_shift_ptr is not None and p == 0:
                    in_shift = load_four(in_shift_ptr, columns, K, x_mask, WIDE)
                old_parts, old_shifts, old_sums = parts, shifts, z_sums
                parts, shifts, z_sums = (), (), ()
                for t in tl.static_range(TOKENS):
                    x = load_four(x_ptr + t * x_stride.to(tl.int64), columns, K, x_mask, WIDE)
                    part, shift, z_sum = old_parts[t], old_shifts[t], old_sums[t]
                    for i in tl.static_range(4):
                        z = x[i]
                        if in_shift_ptr is not None and p == 0:
                            shift += z * in_shift[i]
                        if in_scale_ptr is not None:
                            z = z * in_scale[i]
                        if group_shift_ptr is not None and p == 0:
                            z_sum += z
                        part += flip(z, signs, c + i)
                    parts = parts + (part,)
                    shifts = shifts + (shift,)
                    z_sums = z_sums + (z_sum,)
            scale = 1.0
            if scale_ptr is not None and not late:
                scale = load_floats(scale_ptr, plane_rows * groups + group[None, :], w_mask)
            old_sums = sums
            sums = ()
            for t in tl.static_range(TOKENS):
                sums = sums + (old_sums[t] + scale * parts[t],)
        if group_shift_ptr is not None:
            group_shift = load_floats(group_shift_ptr, rows[:, None] * groups + group[None, :], w_mask)
            old_sums = group_shifts
            group_shifts = ()
            for t in tl.static_range(TOKENS):
                group_shifts = group_shifts + (old_sums[t] + group_shift * z_sums[t],)

    for t in tl.static_range(TOKENS):
        y = tl.sum(sums[t], 1)
        if late and scale_ptr is not None:
            y = y * load_floats(scale_ptr, rows, row_mask)
        if group_shift_ptr is not None:
            y += tl.sum(group_shifts[t], 1)
        if in_shift_ptr is not None:
            y += tl.sum(tl.sum(shifts[t], 1), 0)
        if bias_ptr is not None:
            y += load_floats(bias_ptr, rows, row_mask)
        at = (tl.program_id(1).to(tl.int64) * TOKENS + t) * N + rows
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=row_mask)
