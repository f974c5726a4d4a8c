"""Decoder layers on an NVIDIA GPU: for one token of each sequence eight or nine kernels, and nothing for the host.

Each kernel is launched in the shadow of the one ahead of it, which the ops in ``csrc/cuda/decoder_ops.cpp`` and
``attention_ops.cpp`` do: the sum with the residual, the norm and the packing of q, k and v; these in one product;
rotary embedding, cache and attention; packing and product of the output; the same again for gate and up; SiLU, packing
and product of down. The sum behind down is left to the next layer, and the last one to the final norm. Prompts take the
same norms, packs and products, and torch's attention.

One sequence goes through all layers in one launch, where ``csrc/cuda/decode_token.cu`` takes the model;
``BITINFER_ONE_LAUNCH=0`` leaves it to the kernels.
"""

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitinfer.backends.base import Problem
from bitinfer.dispatch import select
from bitinfer.models.cache import KVCache, Span, read_cache
from bitinfer.models.cpu_layer import linears_of, norms_of, state_of
from bitinfer.models.layers import DecoderLayer, attend
from bitinfer.nn import BinaryLinear

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128)
MAX_GROUP = 8  # csrc/cuda/decode_attention.h: query heads that share a key
MAX_HIDDEN = 8192  # csrc/cuda/decoder_rows.h: columns of a norm
ALIGNED = 8  # columns that a thread loads at a time
ONE_LAUNCH = os.environ.get("BITINFER_ONE_LAUNCH") != "0"
MANY = 256  # tokens above which packing is faster from memory than behind what comes before it


@dataclass
class Step:
    """What a step of one token knows of its place, all of it on the device.

    Attributes:
        slot: int64 ``[1]``, where the tokens go in the cache.
        padding: int64 ``[B]``, slots ahead of the first token of each sequence; None for none.
        cos, sin: ``[capacity, head_dim]``, the rotary embedding by position.
    """

    slot: Tensor
    padding: Tensor | None
    cos: Tensor
    sin: Tensor


class CudaLayer:
    """What a :class:`DecoderLayer` does to one token a sequence, by the kernels of this project.

    Args:
        layer: one that :func:`takes` accepts; its parameters are read where they are.
    """

    def __init__(self, layer: DecoderLayer) -> None:
        self.layer: Any = layer

    def __call__(
        self, x: Tensor, residual: Tensor | None, keys: Tensor, values: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        """Return two ``[B, D]`` whose sum is the layer's output for ``x + residual``, and write its keys and values.

        Nothing still under way on the stream may write the fields of ``step``, or the cache below its slot, when this
        is called: in a step, the embedding of its tokens stands between.

        Args:
            x: ``[B, D]``.
            residual: ``[B, D]``, or None for zeros.
            keys, values: ``[B, kv_heads, capacity, head_dim]`` of this layer, or rounded rows.
            step: where the tokens are.
        """
        layer = self.layer
        (q, k, v), hidden = _normed(x, residual, layer.input_norm, (layer.q, layer.k, layer.v))
        attended = torch.ops.bitinfer_native.decode_attention(
            q,
            k,
            v,
            keys,
            values,
            step.cos,
            step.sin,
            step.slot,
            step.padding,
            *_norms(layer),
            layer.scaling,
            True,
        )
        out = _project(attended, layer.o)
        gated, hidden = _normed(out, hidden, layer.post_norm, (layer.gate, layer.up))
        return _project_gated(gated, layer.down), hidden

    def prompt(
        self, x: Tensor, residual: Tensor | None, keys: Tensor, values: Tensor, span: Span
    ) -> tuple[Tensor, Tensor]:
        """Do what a call does for ``T`` tokens of each of ``B`` sequences, with torch's attention.

        Args:
            x, residual: ``[B * T, D]``.
            keys, values: of this layer.
            span: where the tokens go, which the host knows, and what they see.
        """
        layer, batch = self.layer, keys.shape[0]
        (q, k, v), hidden = _normed(x, residual, layer.input_norm, (layer.q, layer.k, layer.v))
        torch.ops.bitinfer_native.rotate_cache(q, k, v, keys, values, span.cos, span.sin, span.start, *_norms(layer))
        queries, new_keys, new_values = (
            y.unflatten(1, (-1, layer.head_dim)).unflatten(0, (batch, -1)).transpose(1, 2) for y in (q, k, v)
        )
        seen_keys, seen_values = _seen(keys, new_keys, span), _seen(values, new_values, span)
        attended = attend(queries, seen_keys, seen_values, span, layer.scaling)
        attended = attended.transpose(1, 2).flatten(2).flatten(0, 1)
        del q, k, v, queries, new_keys, new_values, seen_keys, seen_values  # long prompts need the memory
        out = _project(attended, layer.o)
        del attended
        gated, hidden = _normed(out, hidden, layer.post_norm, (layer.gate, layer.up))
        return _project_gated(gated, layer.down), hidden


def _seen(cached: Tensor, new: Tensor, span: Span) -> Tensor:
    """Return what a prompt sees of keys or values, whose last are ``new``: of a rounded cache, its own as they are."""
    if cached.dtype != torch.uint8:
        return cached[:, :, : span.read]
    if span.start == 0:
        return new
    return torch.cat((read_cache(cached[:, :, : span.start], new.shape[-1], new.dtype), new), 2)


def takes(layers: Sequence[DecoderLayer], norm: Any, cache: KVCache) -> bool:
    """Return whether :func:`run` can do what these layers and the norm behind them do over a cache."""
    dtype = cache.dtype
    if cache.keys.device.type != "cuda" or dtype not in DTYPES or cache.head_dim not in HEAD_DIMS:
        return False
    # asks the device, and what is forced
    problem = Problem("popcount_gemm", "cuda", dtype, 8, cache.batch, ALIGNED, 128)
    if select(problem).name != "cuda" or not hasattr(torch.ops.bitinfer_native, "decode_attention"):
        return False
    return _is_norm(norm, dtype) and all(_takes(layer, cache) for layer in layers)


def run(layers: Sequence[DecoderLayer], norm: Any, embedded: Tensor, cache: KVCache, step: Step) -> Tensor:
    """Run one token of each sequence through all layers and the norm behind them.

    Args:
        layers, norm: of a model that :func:`takes` accepts.
        embedded: ``[B, D]``.
        cache: which holds what came before, and gets what comes.
        step: where the tokens are.

    Returns:
        ``[B, D]``, which the head multiplies.
    """
    x, residual = embedded, None
    for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
        x, residual = CudaLayer(layer)(x, residual, keys, values, step)
    normed: Tensor = torch.ops.bitinfer_native.rms_norm(x, residual, norm.weight, norm.variance_epsilon)[0]
    return normed


def run_prompt(layers: Sequence[DecoderLayer], norm: Any, embedded: Tensor, cache: KVCache, span: Span) -> Tensor:
    """Run ``T`` tokens of each sequence through all layers, and the last of each through the norm behind them.

    Args:
        layers, norm: of a model that :func:`takes` accepts.
        embedded: ``[B, T, D]``.
        cache: which holds what came before, and gets what comes.
        span: where the tokens go and what they see.

    Returns:
        ``[B, D]``, which the head multiplies.
    """
    x, residual = embedded.flatten(0, 1), None
    for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
        x, residual = CudaLayer(layer).prompt(x, residual, keys, values, span)
    assert residual is not None
    last = (y.unflatten(0, (cache.batch, -1))[:, -1] for y in (x, residual))
    normed: Tensor = torch.ops.bitinfer_native.rms_norm(*last, norm.weight, norm.variance_epsilon)[0]
    return normed


class TokenModel:
    """All layers and the norm behind them, as the compiled library runs them for one token in one launch.

    Args:
        layers, norm: those that :func:`token_model` found fit.
        cache_bits: of keys and values.
    """

    def __init__(self, layers: Sequence[DecoderLayer], norm: Any, cache_bits: int) -> None:
        self.state = (cache_bits, state_of(layers, norm, None))
        first: Any = layers[0]
        native = torch.ops.bitinfer_native
        self.handle: int = native.token_model_new(
            norm.weight, norm.variance_epsilon, *_shape(first)[:2], first.scaling, *_shape(first)[2:], cache_bits
        )
        weakref.finalize(self, native.token_model_free, self.handle)
        names = ("weight", "weight_scale", "in_scale", "in_shift", "group_shift", "bias")
        for layer in layers:
            lists = [[getattr(p, name) for p in linears_of(layer)] for name in names]
            pairs = [(None, 0.0) if n is None else (n.weight, n.variance_epsilon) for n in norms_of(layer)]
            native.token_model_layer(self.handle, *lists, *(value for pair in pairs for value in pair))

    def step(self, x: Tensor, cache: KVCache, step: Step) -> Tensor:
        """Run one token, ``[1, D]``, through all layers, and return what the head multiplies, ``[1, D]``."""
        tables = (step.cos, step.sin, step.slot)
        normed: Tensor = torch.ops.bitinfer_native.token_model_step(self.handle, x, cache.keys, cache.values, *tables)
        return normed


def token_model(
    layers: Sequence[DecoderLayer], norm: Any, cache: KVCache, last: TokenModel | None
) -> TokenModel | None:
    """Return what runs these layers for one token in one launch, None where nothing does.

    Args:
        layers, norm: of a model.
        cache: that they write.
        last: what an earlier call returned; it is returned again if all tensors and formats are still the same.
    """
    if not ONE_LAUNCH or cache.batch != 1 or not takes(layers, norm, cache):
        return None
    if not hasattr(torch.ops.bitinfer_native, "token_model_step"):  # a library built before it
        return None
    first: Any = layers[0]
    formats = {(p.act_bits, p.act_block, p.group_size, p.norm_eps) for layer in layers for p in linears_of(layer)}
    dtype = norm.weight.dtype
    if formats not in ({(bits, 0, 0, None)} for bits in (None, 8, 4, 2)):
        return None
    for layer in layers:
        for p in linears_of(layer):
            factors = (f for f in (p.in_scale, p.in_shift) if f is not None)
            if any(f.dtype != dtype for f in factors) or (p.weight.dim() == 3 and p.weight.shape[0] > 1):
                return None
        if _shape(layer) != _shape(first) or first.q.out_features != layer.k.out_features:
            return None
    cache_bits = cache.bits or 16
    if not torch.ops.bitinfer_native.token_model_takes(norm.weight, *_shape(first), cache_bits):
        return None
    if last is not None and last.state == (cache_bits, state_of(layers, norm, None)):
        return last
    return TokenModel(layers, norm, cache_bits)


def _shape(layer: Any) -> tuple[int, int, int, int]:
    """Return what token_model_takes wants to know: heads, their size, the inner size, bits, 0 for floating point."""
    return layer.q.out_features // layer.head_dim, layer.head_dim, layer.down.in_features, layer.down.act_bits or 0


def _norms(layer: Any) -> tuple[Any, ...]:
    """Return the weights of the norms of queries and keys, then their epsilons; None and 0 for none."""
    norms = (layer.q_norm, layer.k_norm)
    return (
        *(None if n is None else n.weight for n in norms),
        *(0.0 if n is None else n.variance_epsilon for n in norms),
    )


def _takes(layer: Any, cache: KVCache) -> bool:
    dtype, kv_heads, head_dim = cache.dtype, cache.keys.shape[2], cache.head_dim
    groups = ((layer.q, layer.k, layer.v), (layer.o,), (layer.gate, layer.up), (layer.down,))
    if not all(_alike(group) for group in groups):
        return False
    norms = (layer.input_norm, layer.post_norm, *(n for n in (layer.q_norm, layer.k_norm) if n is not None))
    if not all(_is_norm(norm, dtype) for norm in norms):
        return False
    hidden, inner = layer.q.in_features, layer.down.in_features
    if hidden % ALIGNED or hidden > MAX_HIDDEN or inner % ALIGNED:
        return False
    heads = int(layer.q.out_features) // head_dim
    return heads % kv_heads == 0 and heads // kv_heads <= MAX_GROUP


def _alike(projections: tuple[Any, ...]) -> bool:
    """Return whether projections are packed, and go in one launch."""
    if not all(isinstance(p, BinaryLinear) for p in projections):
        return False
    return len({(p.in_features, p.act_bits, p.act_block, p.group_size, p.norm_eps) for p in projections}) == 1


def _is_norm(norm: Any, dtype: torch.dtype) -> bool:
    weight = getattr(norm, "weight", None)
    return isinstance(weight, Tensor) and weight.dtype == dtype and hasattr(norm, "variance_epsilon")


def _normed(
    x: Tensor, residual: Tensor | None, norm: Any, projections: tuple[BinaryLinear, ...]
) -> tuple[list[Tensor], Tensor]:
    """Return the projections of ``norm(x + residual)``, and ``x + residual``."""
    native, first = torch.ops.bitinfer_native, projections[0]
    weights = [p.weight for p in projections]
    scales = [p.weight_scale for p in projections]
    shifts = [p.group_shift for p in projections]
    biases = [p.bias for p in projections]
    if first.act_bits is None:
        normed, hidden = native.rms_norm(x, residual, norm.weight, norm.variance_epsilon)
        in_scales, in_shifts = [p.in_scale for p in projections], [p.in_shift for p in projections]
        outputs = native.sign_gemm_several(
            normed,
            weights,
            first.in_features,
            scales,
            in_scales,
            in_shifts,
            shifts,
            biases,
            first.group_size,
            first.norm_eps,
        )
    else:
        # those that scale columns alike, or not at all, share what is packed
        packs = {(id(p.in_scale), id(p.in_shift)): (p.in_scale, p.in_shift) for p in projections}
        places = [list(packs).index((id(p.in_scale), id(p.in_shift))) for p in projections]
        planes, scale, total, shift, hidden = native.rms_norm_packs(
            x,
            residual,
            norm.weight,
            norm.variance_epsilon,
            [in_scale for in_scale, _ in packs.values()],
            [in_shift for _, in_shift in packs.values()],
            first.act_bits,
            first.act_block,
            first.group_size,
        )
        outputs = native.popcount_gemm_several(
            [planes[i] for i in places],
            [scale[i] for i in places],
            [total[i] for i in places],
            [None if p.in_shift is None else shift[i] for p, i in zip(projections, places, strict=True)],
            weights,
            first.in_features,
            scales,
            shifts,
            biases,
            first.group_size,
            first.act_block,
            first.norm_eps,
            x.dtype,
        )
    return outputs, x if residual is None else hidden


def _project(x: Tensor, projection: BinaryLinear) -> Tensor:
    if projection.act_bits is None:
        return _multiply(x, projection)
    packed = torch.ops.bitinfer_native.pack_activations_settled(x, *_packing(projection))
    return _multiply_packed(packed, projection, x.dtype)


def _project_gated(gated: list[Tensor], projection: BinaryLinear) -> Tensor:
    """Return the projection of ``silu(gate) * up``; with many tokens the list is emptied, for the memory."""
    native = torch.ops.bitinfer_native
    if projection.act_bits is None or len(gated[0]) > MANY:
        inner = native.silu_mul(*gated)
        gated.clear()
        return _project(inner, projection)
    packed = native.silu_mul_pack_activations_settled(*gated, *_packing(projection))
    return _multiply_packed(packed, projection, gated[0].dtype)


def _packing(p: BinaryLinear) -> tuple[Any, ...]:
    return p.in_scale, p.in_shift, p.act_bits, p.act_block, p.group_size


def _multiply(x: Tensor, p: BinaryLinear) -> Tensor:
    y: Tensor = torch.ops.bitinfer_native.sign_gemm_settled(
        x,
        p.weight,
        p.in_features,
        p.weight_scale,
        p.in_scale,
        p.in_shift,
        p.group_shift,
        p.bias,
        p.group_size,
        p.norm_eps,
    )
    return y


def _multiply_packed(packed: tuple[Tensor, ...], p: BinaryLinear, dtype: torch.dtype) -> Tensor:
    planes, scale, total, shift = packed
    y: Tensor = torch.ops.bitinfer_native.popcount_gemm_settled(
        planes,
        scale,
        total,
        None if p.in_shift is None else shift,
        p.weight,
        p.in_features,
        p.weight_scale,
        p.group_shift,
        p.bias,
        p.group_size,
        p.act_block,
        p.norm_eps,
        dtype,
    )
    return y
