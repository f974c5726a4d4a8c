"""LlamaDecoder: token by token through a dense LLaMA for thousands of rows at once, with one cache of fixed size.

All rows stand at the same position, so that a step is the same few hundred kernels whatever the rows hold; on a GPU
they are captured once per cache length as a CUDA graph. transformers' own loop spends more time between kernels than in
them for a small model, and copies the cache for grouped queries.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitinfer.distill.models import check_llama

BUCKET = 64  # cache lengths are read in multiples of this


class LlamaDecoder:
    """The weights of a LLaMA, laid out for decoding, and a cache for ``rows`` sequences of up to ``length`` tokens.

    Args:
        model: a dense transformers ``LlamaForCausalLM``; its tensors are shared where they need not be joined.
        rows: number of sequences B.
        length: tokens that the cache holds for each.
    """

    def __init__(self, model: Any, rows: int, length: int) -> None:
        check_llama(model.config, "teacher")
        config = model.config
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps, self.rows = config.rms_norm_eps, rows
        self.length = -(-length // BUCKET) * BUCKET
        self.embedding, self.head = model.model.embed_tokens.weight, model.lm_head.weight
        self.norm = model.model.norm.weight
        self.layers = [self._layer(layer) for layer in model.model.layers]
        device, dtype = self.embedding.device, self.embedding.dtype
        shape = (len(self.layers), rows, self.groups, self.length, self.width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        positions = torch.arange(self.length, device=device).unsqueeze(0)
        cos, sin = model.model.rotary_emb(self.embedding[:1].unsqueeze(0), positions)
        self.cos, self.sin = cos[0], sin[0]  # [length, width]
        self.places = positions[0]
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def _layer(self, layer: Any) -> tuple[Tensor, ...]:
        attention, mlp = layer.self_attn, layer.mlp
        return (
            layer.input_layernorm.weight,
            torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
            attention.o_proj.weight,
            layer.post_attention_layernorm.weight,
            torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            mlp.down_proj.weight,
        )

    @torch.no_grad()
    def step(self, tokens: Tensor, position: Tensor, span: int) -> Tensor:
        """Feed one token to every row, and return the logits ``[B, V]`` of the next.

        Args:
            tokens: ``[B]``.
            position: ``[1]``, where the tokens stand; a tensor, so that a captured step can be replayed further on.
            span: how much of the cache is read, a multiple of 64 above the position.
        """
        hidden = self.embedding[tokens]
        cos, sin = self.cos[position], self.sin[position]  # [1, width]
        # what lies ahead in the cache is left over from before
        mask = torch.where(self.places[:span] <= position, 0.0, -torch.inf).to(hidden.dtype)
        mask = mask.expand(self.rows, self.groups, self.heads // self.groups, span)
        for index, (norm_in, qkv, out, norm_mlp, gate_up, down) in enumerate(self.layers):
            x = F.rms_norm(hidden, norm_in.shape, norm_in, self.eps)
            x = F.linear(x, qkv).unflatten(-1, (self.heads + 2 * self.groups, self.width))
            rotated, value = x.split([self.heads + self.groups, self.groups], 1)
            rotated = rotated * cos + _turn(rotated) * sin
            query, key = rotated.split([self.heads, self.groups], 1)
            self.keys[index].index_copy_(2, position, key.unsqueeze(2))
            self.values[index].index_copy_(2, position, value.unsqueeze(2))
            # the queries of a group take the place of successive tokens, so that keys are read once for all of them
            attended = F.scaled_dot_product_attention(
                query.unflatten(1, (self.groups, -1)),
                self.keys[index, :, :, :span],
                self.values[index, :, :, :span],
                attn_mask=mask,
            )
            hidden = hidden + F.linear(attended.flatten(1), out)
            x = F.rms_norm(hidden, norm_mlp.shape, norm_mlp, self.eps)
            gate, up = F.linear(x, gate_up).chunk(2, -1)
            hidden = hidden + F.linear(F.silu(gate) * up, down)
        return F.linear(F.rms_norm(hidden, self.norm.shape, self.norm, self.eps), self.head)

    def run(self, advance: Callable[[int], None], position: Tensor, steps: int) -> None:
        """Call ``advance(span)`` for the positions 0 to ``steps`` - 1; it takes a step and moves ``position`` on.

        On a GPU the calls are captured, one CUDA graph for each cache length, and replayed, in later runs too: so
        ``advance`` must keep all its state in tensors, and be the same each time.
        """
        if not position.is_cuda:
            for at in range(steps):
                advance(at - at % BUCKET + BUCKET)
            return
        if not self.graphs:
            self.pool = torch.cuda.graph_pool_handle()  # one for all: nothing outlives a step but the state
        for at in range(steps):
            span = at - at % BUCKET + BUCKET
            if at == 0 and not self.graphs:
                advance(span)  # once outside of a graph: libraries set themselves up on first use
                continue
            if span not in self.graphs:
                self.graphs[span] = graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool):
                    advance(span)
            self.graphs[span].replay()


def _turn(x: Tensor) -> Tensor:
    """Return the other half of a rotary pair: ``(-second, first)``."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
