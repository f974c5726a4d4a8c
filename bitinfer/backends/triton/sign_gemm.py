"""``sign_gemm``: choose between decoding and tiles, prepare what the kernel reads, finish what it leaves."""

import torch
from torch import Tensor

from bitinfer.backends.triton.configs import Config, Product, choose, size_class
from bitinfer.backends.triton.finish import sum_parts
from bitinfer.backends.triton.launch import aligned, ceil_div, contiguous, describe, flat, launch
from bitinfer.backends.triton.sign_decode import sign_decode
from bitinfer.backends.triton.sign_tiled import prepare, sign_tiled, sum_groups
from bitinfer.weight import group_count

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def sign_gemm(
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
) -> Tensor:
    """See :func:`bitinfer.ops.sign_gemm`."""
    n = weight.shape[-2]
    shape = (*x.shape[:-1], n)
    tokens = flat(x)
    m = tokens.shape[0]
    if m == 0 or n == 0:
        return x.new_empty(shape)
    planes = weight.shape[0] if weight.dim() == 3 else 1
    device = describe(x.device)
    parts = 3 if x.dtype == torch.float32 else 1 if in_scale is None or in_scale.dtype == x.dtype else 2
    segment = group_size if group_count(in_features, group_size) > 1 else 0
    product = Product(NAMES[x.dtype], size_class(m), n, in_features, planes, segment, parts)
    config = choose(product, device)
    unfinished = norm_eps is not None or config.splits > 1
    if unfinished:
        out = torch.empty(config.splits, m, n, dtype=torch.float32, device=x.device)
    else:
        out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    run = _decode if config.kernel == "decode" else _tiled
    run(
        config,
        product,
        tokens,
        weight.contiguous(),
        contiguous(weight_scale),
        contiguous(in_scale),
        contiguous(in_shift),
        contiguous(group_shift),
        None if unfinished else contiguous(bias),
        out,
    )
    return (sum_parts(out, contiguous(bias), norm_eps, x.dtype) if unfinished else out).view(shape)


def _decode(
    config: Config,
    product: Product,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    group_shift: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    n, k = product.n, product.k
    threads = config.warps * describe(x.device).lanes
    unit = config.columns // threads
    launch(
        sign_decode,
        (ceil_div(n, config.rows), config.splits),
        x,
        weight,
        weight_scale,
        in_scale,
        in_shift,
        group_shift,
        bias,
        out,
        n,
        k,
        x.stride(0),
        weight.shape[-1] * (32 // unit),
        group_count(k, product.segment),
        product.segment,
        TOKENS=product.m,
        PLANES=product.planes,
        GROUPED=product.segment > 0,
        WIDE=k % unit == 0 and all(aligned(tensor, 8) for tensor in (x, in_scale, in_shift)),
        BLOCK_N=config.rows,
        UNIT=unit,
        THREADS=threads,
        SPLIT_K=config.splits,
        num_warps=config.warps,
    )


def _tiled(
    config: Config,
    product: Product,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    group_shift: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    m, n, k = x.shape[0], product.n, product.k
    groups = group_count(k, product.segment)
    z, shift = _prepared(x, in_scale, in_shift, product.parts)
    z_sum = None
    if group_shift is not None:
        z_sum = torch.empty(m, groups, dtype=torch.float32, device=x.device)
        launch(sum_groups, (m * groups,), x, in_scale, z_sum, k, x.stride(0), groups, product.segment or k, BLOCK=512)
    launch(
        sign_tiled,
        (ceil_div(n, config.rows) * ceil_div(m, config.tokens), config.splits),
        z,
        in_scale if product.parts == 1 else None,
        weight,
        weight_scale,
        group_shift,
        z_sum,
        shift,
        bias,
        out,
        m,
        n,
        k,
        z.stride(-2),
        weight.shape[-1],
        groups,
        product.segment,
        PARTS=product.parts,
        PLANES=product.planes,
        GROUPED=product.segment > 0,
        EVEN_K=k % config.columns == 0,
        BLOCK_M=config.tokens,
        BLOCK_N=config.rows,
        BLOCK_K=config.columns,
        SPLIT_K=config.splits,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _prepared(x: Tensor, in_scale: Tensor | None, in_shift: Tensor | None, parts: int) -> tuple[Tensor, Tensor | None]:
    """Return the 16-bit parts ``[PARTS, M, K]`` that the matrix units read, and ``in_shift . x``."""
    m, k = x.shape
    shift = None if in_shift is None else torch.empty(m, dtype=torch.float32, device=x.device)
    z = None
    if parts > 1:
        z = torch.empty(parts, m, ceil_div(k, 8) * 8, dtype=torch.bfloat16, device=x.device)
    if z is not None or shift is not None:
        stride = k if z is None else z.stride(1)
        launch(prepare, (m,), x, in_scale, in_shift, z, shift, m, k, x.stride(0), stride, PARTS=parts, BLOCK=1024)
    return x if z is None else z, shift
