"""A step of one token a sequence, all layers and the head, in one call of the compiled CPU library (``decoder.cpp``).

The library holds a model as a handle: which tensors its layers have, not copies of them. Threads go through a whole
step together, so that nothing waits for Python, for torch's dispatcher, or for a thread to wake up.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitinfer.backends.base import Problem
from bitinfer.dispatch import select
from bitinfer.models.cache import KVCache
from bitinfer.models.layers import DecoderLayer
from bitinfer.nn import BinaryLinear

FEW_TOKENS = 3  # whose products with the head wait for memory and not for arithmetic
Head = Callable[[Tensor], Tensor]


class CpuLayers:
    """The layers of a model, with the norm and the head behind them, as the compiled library holds them.

    Args:
        layers, norm, head: those that :func:`cpu_layers` found fit.
    """

    def __init__(self, layers: Sequence[DecoderLayer], norm: Any, head: Head) -> None:
        self.state, self.head = state_of(layers, norm, head), head
        self.weight = _dense_weight(head, norm.weight.dtype)
        native = torch.ops.bitinfer_native
        first: Any = layers[0]
        heads, kv_heads = (linear.out_features // first.head_dim for linear in (first.q, first.k))
        last = (norm.weight, norm.variance_epsilon, self.weight)
        self.handle: int = native.decoder_new(heads, kv_heads, first.head_dim, first.scaling, *last)
        weakref.finalize(self, native.decoder_free, self.handle)
        for layer in layers:
            for linear in linears_of(layer):
                native.decoder_linear(self.handle, *_arguments(linear))
            pairs = [(None, 0.0) if n is None else (n.weight, n.variance_epsilon) for n in norms_of(layer)]
            native.decoder_layer(self.handle, *(value for pair in pairs for value in pair))

    def step(
        self, hidden: Tensor, cache: KVCache, cos: Tensor, sin: Tensor, slot: int, padding: Tensor | None
    ) -> Tensor:
        """Run one token of each sequence and return the logits behind it, ``[B, V]``.

        Args:
            hidden: ``[B, D]``, contiguous, the embedded tokens; what the head multiplies is written over them.
            cache: of all layers; it gets the tokens' keys and values.
            cos, sin: ``[capacity, head_dim]``, the rotary embedding by position.
            slot: where the tokens go.
            padding: int64 ``[B]``, slots ahead of the first token of each sequence; None for none.
        """
        logits: Tensor | None = None
        if self.weight is not None and len(hidden) <= FEW_TOKENS:
            logits = hidden.new_empty(len(hidden), len(self.weight))
        arguments = (cache.keys, cache.values, cos, sin, slot, padding, logits)
        torch.ops.bitinfer_native.decoder_step(self.handle, hidden, *arguments)
        return self.head(hidden) if logits is None else logits


def cpu_layers(
    layers: Sequence[DecoderLayer],
    norm: nn.Module,
    head: Head,
    dtype: torch.dtype,
    device: torch.device,
    last: CpuLayers | None,
) -> CpuLayers | None:
    """Return what runs these layers in one call, None where nothing does.

    Args:
        layers, norm, head: of a model.
        dtype, device: of its activations.
        last: what an earlier call returned; it is returned again if all tensors and formats are still the same.
    """
    # asks what is forced, too
    if device.type != "cpu" or select(Problem("sign_gemm", "cpu", dtype)).name != "cpu":
        return None
    if not hasattr(torch.ops.bitinfer_native, "decoder_step"):  # a library built before it
        return None
    norms = [norm, *(n for layer in layers for n in norms_of(layer) if n is not None)]
    linears = [linear for layer in layers for linear in linears_of(layer)]
    if not all(_is_norm(n, dtype) for n in norms) or not all(_is_packed(linear) for linear in linears):
        return None
    return last if last is not None and last.state == state_of(layers, norm, head) else CpuLayers(layers, norm, head)


def state_of(layers: Sequence[DecoderLayer], norm: Any, head: Head | None) -> tuple[Any, ...]:
    """Return what changes when a tensor is replaced or cast, or another activation format is set."""
    values: list[Any] = [norm.weight, norm.variance_epsilon, head, _dense_weight(head, norm.weight.dtype)]
    for layer in layers:
        for linear in linears_of(layer):
            values += _arguments(linear)
        for n in norms_of(layer):
            values += () if n is None else (n.weight, n.variance_epsilon)
    return tuple((v.data_ptr(), v.dtype, v.shape) if isinstance(v, Tensor) else v for v in values)


def linears_of(layer: DecoderLayer) -> tuple[Any, ...]:
    """Return the seven projections, in the order of the compiled libraries."""
    return layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down


def norms_of(layer: DecoderLayer) -> tuple[Any, ...]:
    """Return the norms, in the order of the compiled libraries; those of queries and keys may be None."""
    return layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm


def _arguments(linear: Any) -> list[Any]:
    return [
        linear.weight,
        linear.in_features,
        linear.weight_scale,
        linear.in_scale,
        linear.in_shift,
        linear.group_shift,
        linear.bias,
        linear.group_size,
        linear.norm_eps,
        linear.act_bits or 0,
        linear.act_block,
    ]


def _is_packed(linear: nn.Module) -> bool:
    return type(linear) is BinaryLinear and not _has_hooks(linear)


def _is_norm(norm: nn.Module, dtype: torch.dtype) -> bool:
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or not isinstance(eps, float) or _has_hooks(norm):
        return False
    return weight.dtype == dtype and weight.is_contiguous()


def _dense_weight(head: Any, dtype: torch.dtype) -> Tensor | None:
    """Return the weight of a head that is a plain linear layer."""
    if type(head) is not nn.Linear or head.bias is not None or _has_hooks(head):
        return None
    return head.weight if head.weight.dtype == dtype and head.weight.is_contiguous() else None


def _has_hooks(module: nn.Module) -> bool:
    """Return whether someone wants to know when a module is called, as adapters and offloading do."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)
