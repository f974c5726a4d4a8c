"""A LLaMA forward pass in float64, straight from the tensors of a checkpoint: the independent truth for logits.

transformers computes norms and rotary angles in float32 whatever the model's dtype, so it cannot serve as one.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Linear = Callable[[str, Tensor], Tensor]  # (module name, x) -> y, by the checkpoint's own formula


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def rotate(x: Tensor, theta: float) -> Tensor:
    """Apply rotary embeddings to ``[heads, tokens, head_dim]``, halves paired as in transformers."""
    tokens, dim = x.shape[-2:]
    angles = torch.outer(
        torch.arange(tokens, dtype=torch.float64), theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    )
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
    return x * cos + half * sin


def llama_logits(config: Mapping[str, Any], tensors: Mapping[str, Tensor], linear: Linear, tokens: Tensor) -> Tensor:
    """Return float64 logits ``[tokens, vocabulary]`` of one sequence ``tokens [T]``."""
    heads, eps = config["num_attention_heads"], config.get("rms_norm_eps", 1e-6)
    kv_heads = config.get("num_key_value_heads") or heads
    x = tensors["model.embed_tokens.weight"].double()[tokens]
    mask = torch.full((len(tokens), len(tokens)), -torch.inf, dtype=torch.float64).triu(1)

    def split(y: Tensor, count: int) -> Tensor:
        return y.unflatten(-1, (count, -1)).transpose(0, 1)

    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = rms_norm(x, tensors[layer + "input_layernorm.weight"], eps)
        q, k, v = (linear(f"{layer}self_attn.{name}_proj", h) for name in "qkv")
        theta = config.get("rope_theta", 10000.0)
        q, k = rotate(split(q, heads), theta), rotate(split(k, kv_heads), theta)
        k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, split(v, kv_heads)))
        attention = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask).softmax(-1) @ v
        x = x + linear(layer + "self_attn.o_proj", attention.transpose(0, 1).flatten(1))
        h = rms_norm(x, tensors[layer + "post_attention_layernorm.weight"], eps)
        gate, up = (linear(f"{layer}mlp.{name}_proj", h) for name in ("gate", "up"))
        x = x + linear(layer + "mlp.down_proj", torch.nn.functional.silu(gate) * up)
    return rms_norm(x, tensors["model.norm.weight"], eps) @ tensors["lm_head.weight"].double().t()
