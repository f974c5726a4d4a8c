"""``popcount_gemm`` for few tokens: a logic instruction and a popcount for 32 weights and one bit of the activations.

    I[p, s, m, n] = sum_{k in s} S[p, n, k] * q[m, k] = act_sum[m, s] - 2 * sum_b c_b * popcount(w & plane_b)

with ``c_b = 2**b``, the top one negative; one-bit activations take ``columns - 2 * popcount(w ^ plane)``. A program
computes ``BLOCK_N`` rows of all tokens over one range of words; its threads lie side by side along the words, each with
all of the program's rows, so that every weight and every plane is loaded once. The popcounts are the bound.
"""

import triton
import triton.language as tl

from bitinfer.backends.triton.bits import load_floats, popcount, worth
from bitinfer.backends.triton.finish import add_scaled


@triton.jit
def count(counts, signs, plane, b: tl.constexpr, BITS: tl.constexpr, TARGET: tl.constexpr):
    """Add what bit ``b`` of the activations contributes."""
    if BITS == 1:
        counts += popcount(signs ^ plane, TARGET)
    else:
        counts += worth(popcount(signs & plane, TARGET), b, BITS)
    return counts


@triton.jit(do_not_specialize=["M", "N", "K", "W", "words", "segments"])
def popcount_decode(
    planes_ptr,  # [M, BITS, W] uint32
    act_scale_ptr,  # [M, 1] float32
    act_sum_ptr,  # [M, segments] int32
    act_shift_ptr,  # [M] or None
    w_ptr,  # [PLANES, N, W] uint32
    scale_ptr,  # [PLANES, N, 1] or None
    group_shift_ptr,  # [N, 1] or None
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N], or int32 [PLANES, segments, SPLITS, M, N] where a second kernel finishes
    M,
    N,
    K,
    W,
    words,  # to a segment
    segments,
    TOKENS: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    DIRECT: tl.constexpr,
    SPLITS: tl.constexpr,  # of a segment
    BLOCK_N: tl.constexpr,
    THREADS: tl.constexpr,
    TARGET: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    rows = rows.to(tl.int64)
    segment, split = tl.program_id(1) // SPLITS, tl.program_id(1) % SPLITS
    first_token = tl.program_id(2).to(tl.int64) * TOKENS
    share = tl.cdiv(words, SPLITS)
    begin = segment * words + split * share
    end = tl.minimum(W, tl.minimum(begin + share, (segment + 1) * words))
    columns = tl.maximum(tl.minimum(K, end * 32) - begin * 32, 0)
    counts = ()
    for _ in tl.static_range(PLANES * TOKENS):
        counts = counts + (tl.zeros((BLOCK_N, THREADS), tl.int32),)
    for first in range(begin, end, THREADS):
        word = first + tl.arange(0, THREADS)
        mask = word < end
        old_counts = counts
        counts = ()
        for p in tl.static_range(PLANES):
            at = (rows + p * N)[:, None] * W + word[None, :]
            signs = tl.load(w_ptr + at, mask=row_mask[:, None] & mask[None, :], other=0)
            for t in tl.static_range(TOKENS):
                tally = old_counts[p * TOKENS + t]
                token = tl.minimum(first_token + t, M - 1)  # the last one again, where there is no other to store
                token_ptr = planes_ptr + token * (BITS * W)
                for b in tl.static_range(BITS):
                    plane = tl.load(token_ptr + b * W + word, mask=mask, other=0)
                    tally = count(tally, signs, plane[None, :], b, BITS, TARGET)
                counts = counts + (tally,)

    for t in tl.static_range(TOKENS):
        token = first_token + t
        if token < M:
            act_sum = tl.load(act_sum_ptr + token * segments + segment)
            act_scale = tl.load(act_scale_ptr + token) if DIRECT else 1.0
            a = tl.zeros((BLOCK_N,), tl.float32)
            for p in tl.static_range(PLANES):
                integers = -2 * tl.sum(counts[p * TOKENS + t], 1)
                if BITS == 1:
                    integers += columns
                elif SPLITS == 1:
                    integers += act_sum
                else:
                    integers += tl.where(split == 0, act_sum, 0)
                if DIRECT:
                    a = add_scaled(a, integers, act_scale, scale_ptr, rows + p * N, row_mask, TARGET)
                else:
                    at = (((p * segments + segment) * SPLITS + split) * M + token) * N + rows
                    tl.store(out_ptr + at, integers, mask=row_mask)
            if DIRECT:
                if group_shift_ptr is not None:
                    a = add_scaled(a, act_sum, act_scale, group_shift_ptr, rows, row_mask, TARGET)
                if act_shift_ptr is not None:
                    a += tl.load(act_shift_ptr + token)
                if bias_ptr is not None:
                    a += load_floats(bias_ptr, rows, row_mask)
                tl.store(out_ptr + token * N + rows, a.to(out_ptr.dtype.element_ty), mask=row_mask)
