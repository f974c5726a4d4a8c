"""``popcount_gemm``: choose between popcounts and tiles of the int8 matrix units, and finish what the kernel leaves.

A kernel applies the scales itself where it holds all of a product's integers; else it writes them for a second one, so
that sums of floats keep their order. The norm takes a pass of its own.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from bitinfer.backends.reference import segment_size
from bitinfer.backends.triton.configs import Config, Product, choose, size_class
from bitinfer.backends.triton.finish import finish_integers, sum_parts
from bitinfer.backends.triton.launch import ceil_div, contiguous, describe, launch
from bitinfer.backends.triton.popcount_decode import popcount_decode
from bitinfer.backends.triton.popcount_tiled import popcount_tiled, unpack_planes
from bitinfer.weight import group_count


def popcount_gemm(
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
) -> Tensor:
    """See :func:`bitinfer.ops.popcount_gemm`."""
    n, k = weight.shape[-2], in_features
    m = prod(act_scale.shape[:-1])
    shape = (*planes.shape[:-2], n)
    if m == 0 or n == 0:
        return torch.empty(shape, dtype=dtype, device=planes.device)
    weight_planes = weight.shape[0] if weight.dim() == 3 else 1
    segment = segment_size(block_size, group_size)
    segments = group_count(k, segment)
    product = Product(f"int{planes.shape[-2]}", size_class(m), n, k, weight_planes, segment if segments > 1 else 0)
    device = describe(planes.device)
    config = choose(product, device)
    decode = config.kernel == "decode"
    direct = config.splits == 1 and (not decode or segments == 1)

    scales = (planes.contiguous(), act_scale.contiguous(), act_sum.contiguous(), contiguous(act_shift))
    weight, weight_scale, group_shift = weight.contiguous(), contiguous(weight_scale), contiguous(group_shift)
    late_bias = contiguous(bias)
    early_bias = None if norm_eps is not None else late_bias  # a norm comes before the bias
    kind = dtype if norm_eps is None else torch.float32
    if direct:
        out = torch.empty(m, n, dtype=kind, device=planes.device)
    else:
        out = torch.empty(weight_planes, segments, config.splits, m, n, dtype=torch.int32, device=planes.device)
    arguments = (*scales, weight, weight_scale, group_shift, early_bias, out)
    if decode:
        _decode(config, product, device.target, m, direct, segments, *arguments)
    else:
        _tiled(config, product, device.target, m, direct, segment, block_size, group_size, *arguments)
    if not direct:
        sizes = (segment, block_size, group_size)
        out = finish_integers(out, *scales[1:], weight_scale, group_shift, early_bias, *sizes, kind)
    if norm_eps is not None:
        out = sum_parts(out.view(1, m, n), late_bias, norm_eps, dtype)
    return out.view(shape)


def _decode(
    config: Config,
    product: Product,
    target: str,
    m: int,
    direct: bool,
    segments: int,
    planes: Tensor,
    act_scale: Tensor,
    act_sum: Tensor,
    act_shift: Tensor | None,
    weight: Tensor,
    *rows_and_out: Any,
) -> None:
    words = weight.shape[-1]
    launch(
        popcount_decode,
        (
            ceil_div(product.n, config.rows),
            segments * config.splits,
            ceil_div(m, config.tokens),
        ),
        planes,
        act_scale,
        act_sum,
        act_shift,
        weight,
        *rows_and_out,
        m,
        product.n,
        product.k,
        words,
        product.segment // 32 or words,
        segments,
        TOKENS=config.tokens,
        BITS=product.bits,
        PLANES=product.planes,
        DIRECT=direct,
        SPLITS=config.splits,
        BLOCK_N=config.rows,
        THREADS=config.columns // 32,
        TARGET=target,
        num_warps=config.warps,
    )


def _tiled(
    config: Config,
    product: Product,
    target: str,
    m: int,
    direct: bool,
    segment: int,
    block_size: int,
    group_size: int,
    planes: Tensor,
    act_scale: Tensor,
    act_sum: Tensor,
    act_shift: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    group_shift: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    n, words = product.n, weight.shape[-1]
    padded = ceil_div(words * 32, config.columns) * config.columns
    q = torch.empty(m, padded, dtype=torch.int8, device=planes.device)
    grid = (m, ceil_div(padded, 32 * 32))
    launch(unpack_planes, grid, planes, q, words, padded, BITS=product.bits, BLOCK_W=32)
    segments = act_sum.shape[-1]
    groups = next((t.shape[-1] for t in (weight_scale, group_shift) if t is not None), 1)
    launch(
        popcount_tiled,
        (ceil_div(n, config.rows) * ceil_div(m, config.tokens), config.splits),
        q,
        act_scale,
        act_sum,
        act_shift,
        weight,
        weight_scale,
        group_shift,
        bias,
        out,
        m,
        n,
        padded,
        words,
        segments,
        block_size // segment if block_size else segments,
        group_size // segment if group_size else segments,
        act_scale.shape[-1],
        groups,
        STEPS=product.segment // config.columns,
        PLANES=product.planes,
        EVEN_K=words * 32 == padded,
        DIRECT=direct,
        BLOCK_M=config.tokens,
        BLOCK_N=config.rows,
        BLOCK_K=config.columns,
        SPLIT_K=config.splits,
        TARGET=target,
        num_warps=config.warps,
        num_stages=config.stages,
    )
