"""The gradient with respect to the activations, so that adapters and prompts can be trained around packed layers.

The packed tensors themselves get none. Quantised activations pass it straight through, as if they had been exact.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitinfer.weight import BinaryWeight


class BinaryLinearFunction(torch.autograd.Function):
    """``y = norm(a) + bias``, ``a = W x``, computed by the ops; ``dx = W^T da`` by a dense W that lives for one call.

    With a norm over the N outputs, ``h`` the normalised ``a`` and ``r`` the reciprocal of its deviation,
    ``da = r * (dy - mean(dy) - h * mean(dy * h))``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, act_bits: int | None, act_block: int, *fields: Any) -> Tensor:
        from bitinfer.ops import apply_weight  # ops imports this module

        signs, in_features, scale, in_scale, in_shift, group_shift, _bias, group_size, norm_eps = fields
        ctx.sizes = (in_features, group_size, norm_eps)
        ctx.save_for_backward(x, signs, scale, in_scale, in_shift, group_shift)
        return apply_weight(x, BinaryWeight(*fields), act_bits, act_block)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, signs, scale, in_scale, in_shift, group_shift = ctx.saved_tensors
        in_features, group_size, norm_eps = ctx.sizes
        weight = BinaryWeight(signs, in_features, scale, in_scale, in_shift, group_shift, None, group_size)
        dense = weight.to_dense(torch.float32)
        grad = grads[0].float()
        if norm_eps is not None:
            a = F.linear(x.float(), dense)
            centred = a - a.mean(-1, keepdim=True)
            reciprocal = (centred.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
            h = centred * reciprocal
            grad = reciprocal * (grad - grad.mean(-1, keepdim=True) - h * (grad * h).mean(-1, keepdim=True))
        return (grad @ dense).to(x.dtype), *(None,) * 11
