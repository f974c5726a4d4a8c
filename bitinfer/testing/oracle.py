"""The float64 oracle, written from the formula and apart from every backend, and the error bounds."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bitinfer.weight import BinaryWeight

# A few roundings of each dtype, relative to the outputs' size: their root mean square or a quarter of the largest.
FP_SLACK = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def exact_linear(x: Tensor, weight: BinaryWeight) -> Tensor:
    """Return ``norm(W x) + bias`` in float64, with W the dequantised weight: ``[..., N]``."""
    y = F.linear(x.double(), weight.to_dense(torch.float64))
    if weight.norm_eps is not None and weight.out_features:
        centred = y - y.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + weight.norm_eps).sqrt()
    return y if weight.bias is None else y + weight.bias.double()


def fp_error_bound(x: Tensor, weight: BinaryWeight) -> float:
    """Return the largest absolute error that the ``fp`` contract allows on these inputs.

    It is the largest of a dense ``F.linear``'s own error in the dtype of ``x``, a few roundings of that dtype, and the
    rounding of the largest output, which the best of products may meet where the dense one had luck.
    """
    exact = exact_linear(x, weight)
    if exact.numel() == 0:
        return 0.0
    dense = F.linear(x, weight.to_dense(torch.float64).to(x.dtype))
    if weight.norm_eps is not None:
        dense = F.layer_norm(dense, dense.shape[-1:], eps=weight.norm_eps)
    if weight.bias is not None:
        dense = dense + weight.bias.to(dense.dtype)
    own = (dense.double() - exact).abs().max().item()
    largest = exact.abs().max().item()
    # half a unit in the last place, and a hundredth of it: the sum that is rounded is one of float32
    rounding = 0.505 * torch.finfo(x.dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest else 0.0
    return max(own, rounding, FP_SLACK[x.dtype] * max(exact.square().mean().sqrt().item(), largest / 4))
