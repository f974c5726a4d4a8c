"""One decoder layer of the LLaMA family over a :class:`KVCache`, on the parameters of transformers' own layer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitinfer.models.cache import Span

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class DecoderLayer:
    """``h += o(attention(q(n), k(n), v(n))), n = norm(h);  h += down(silu(gate(m)) * up(m)), m = norm(h)``.

    It holds transformers' modules, not copies of them: what is done to their parameters is seen here. Queries and keys
    may have norms of their own (Qwen3), projections biases, and one of OneBit its LayerNorm.

    Args:
        layer: a ``LlamaDecoderLayer``, or one of a family with the same fields.
    """

    def __init__(self, layer: nn.Module) -> None:
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        self.input_norm: Any = layer.input_layernorm
        self.post_norm: Any = layer.post_attention_layernorm
        self.q, self.k, self.v, self.o = (layer.get_submodule(name) for name in PROJECTIONS)
        self.gate, self.up, self.down = (layer.get_submodule(name) for name in GATED)
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.act: Any = mlp.act_fn
        self.head_dim, self.scaling = int(attention.head_dim), float(attention.scaling)

    def __call__(self, hidden: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        """Return the layer's output ``[B, T, D]`` and write its keys and values.

        Args:
            hidden: ``[B, T, D]``.
            keys, values: ``[B, kv_heads, capacity, head_dim]`` of this layer.
            span: where the tokens go and what they see.
        """
        normed = self.input_norm(hidden)
        attended = self.attention(self.q(normed), self.k(normed), self.v(normed), keys, values, span)
        hidden = hidden + self.o(attended)
        normed = self.post_norm(hidden)
        return hidden + self.down(self.act(self.gate(normed)) * self.up(normed))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        """Return what the output projection multiplies, ``[B, T, heads * head_dim]``, and write keys and values.

        Args:
            q, k, v: what the projections gave, ``[B, T, heads or kv_heads * head_dim]``.
            keys, values, span: as above.
        """
        q, k, v = (self._heads(x) for x in (q, k, v))
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        q, k = rotate(q, span), rotate(k, span)
        write(keys, k, span)
        write(values, v, span)
        attended = attend(q.transpose(1, 2), keys[:, :, : span.read], values[:, :, : span.read], span, self.scaling)
        return attended.transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


def rotate(x: Tensor, span: Span) -> Tensor:
    """Return ``x [B, T, heads, head_dim]`` with its rotary embedding, rounded as transformers does."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * span.cos.unsqueeze(2) + turned * span.sin.unsqueeze(2)


def write(cache: Tensor, new: Tensor, span: Span) -> None:
    """Put ``new [B, T, kv_heads, head_dim]`` into the slots of ``span``."""
    new = new.transpose(1, 2)
    if span.start is not None:
        cache[:, :, span.start : span.start + new.shape[2]] = new
    else:
        cache.index_copy_(2, span.slots, new)


def attend(q: Tensor, keys: Tensor, values: Tensor, span: Span, scaling: float) -> Tensor:
    """Return ``softmax(q keys^T * scaling) values``, ``[B, heads, T, head_dim]``; heads in groups share keys.

    Args:
        q: ``[B, heads, T, head_dim]``.
        keys, values: ``[B, kv_heads, S, head_dim]``.
        span: its mask, or that it is causal.
    """
    groups = q.shape[1] // keys.shape[1]
    if q.shape[2] == 1 and groups > 1:
        # the heads of a group are as good as tokens that all see the same: no copies of keys
        q = q.view(q.shape[0], keys.shape[1], groups, q.shape[3])
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=span.mask, scale=scaling)
        return out.reshape(q.shape[0], -1, 1, q.shape[3])
    return F.scaled_dot_product_attention(
        q, keys, values, attn_mask=span.mask, is_causal=span.causal, scale=scaling, enable_gqa=groups > 1
    )
