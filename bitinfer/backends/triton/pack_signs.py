"""``pack_signs``: bit ``j`` of ``out[r, w]`` is set where ``weight[r, 32*w + j] < 0``.

A program packs ``BLOCK_W`` words of one row; reading the dense matrix is the bound.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitinfer.backends.triton.launch import ceil_div, flat, launch
from bitinfer.packing import words_per_row

BLOCK_W = 64


@triton.jit(do_not_specialize=["K", "W"])
def pack_rows(weight_ptr, out_ptr, K, W, row_stride, BLOCK_W: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * (BLOCK_W * 32) + tl.arange(0, BLOCK_W * 32)
    values = tl.load(weight_ptr + row * row_stride + columns, mask=columns < K, other=0.0)
    bits = tl.reshape((values < 0).to(tl.uint32), (BLOCK_W, 32))
    words = tl.sum(bits << tl.arange(0, 32).to(tl.uint32)[None, :], 1)
    at = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    tl.store(out_ptr + row * W + at, words, mask=at < W)


def pack_signs(weight: Tensor) -> Tensor:
    """See :func:`bitinfer.ops.pack_signs`."""
    k = weight.shape[-1]
    words = words_per_row(k)
    out = torch.empty(*weight.shape[:-1], words, dtype=torch.uint32, device=weight.device)
    if out.numel():
        rows = flat(weight)
        grid = (rows.shape[0], ceil_div(words, BLOCK_W))
        launch(pack_rows, grid, rows, out, k, words, rows.stride(0), BLOCK_W=BLOCK_W)
    return out
