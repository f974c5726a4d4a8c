"""A model for decoding: embeddings, layers over a cache, head; prefill in chunks and steps of one token."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from bitinfer import huge_pages
from bitinfer.int8_rows import RowsLinear
from bitinfer.models import cuda_layer
from bitinfer.models.cache import KVCache, Span, round_capacity
from bitinfer.models.cpu_layer import CpuLayers, cpu_layers
from bitinfer.models.layers import GATED, PROJECTIONS, DecoderLayer
from bitinfer.nn import BinaryLinear

CHUNK = 2048  # tokens of a prompt that go through the layers at a time
MOST_TOKENS = 32768  # of all prompts together
FAMILIES = ("llama", "qwen3")  # transformers' model types
STATIC_ROPES = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the length


def obstacle(model: Any) -> str | None:
    """Return why a model cannot be decoded here, None if it can."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        return f"it is of type {kind!r}, and only {', '.join(FAMILIES)} are known"
    if not hasattr(model, "lm_head") or not hasattr(getattr(model, "model", None), "layers"):
        return "it is no causal language model: expected ...ForCausalLM"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"its activation is {config.hidden_act!r} and not silu"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return "some of its layers have sliding windows"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in STATIC_ROPES:
        return f"its rotary embedding is {rope!r}, which depends on the length of the text"
    for number, layer in enumerate(model.model.layers):
        for name in (*PROJECTIONS, *GATED):
            try:
                layer.get_submodule(name)
            except AttributeError:
                return f"layer {number} has no {name}"
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1:
        return f"it is spread over {', '.join(sorted(devices))}"
    return None


class Decoder:
    """A causal language model over a :class:`KVCache`.

    Args:
        model: a transformers model that :func:`obstacle` has nothing against. Its modules are used, not copied.
        head_bits: 8 rounds the rows of the head to 8 bits, as they are now; None takes it as it is.
        cache_bits: 8 or 4 rounds keys and values; None keeps them as they are.

    Raises:
        ValueError: one of these is something else, or not possible for this model.
    """

    def __init__(self, model: Any, head_bits: int | None = None, cache_bits: int | None = None) -> None:
        if cache_bits not in (None, 8, 4):
            raise ValueError(f"cache_bits must be None, 8 or 4, got {cache_bits!r}")
        config = model.config
        self.cache_bits = cache_bits
        self.embed: nn.Module = model.model.embed_tokens
        self.norm: nn.Module = model.model.norm
        self.head: Callable[[Tensor], Tensor] = (
            model.lm_head if head_bits is None else _rounded(model.lm_head, head_bits)
        )
        self.rope: nn.Module = model.model.rotary_emb
        self.layers = [DecoderLayer(layer) for layer in model.model.layers]
        self.kv_heads = int(config.num_key_value_heads)
        self.head_dim = self.layers[0].head_dim
        self.cache: KVCache | None = None
        self.native: CpuLayers | None = None
        self.token_model: cuda_layer.TokenModel | None = None
        self.loop: Any = None  # of generation.py, over this cache
        self.cos = self.sin = torch.empty(0)
        head = self.head.codes if isinstance(self.head, RowsLinear) else getattr(self.head, "weight", None)
        huge_pages.move(m.weight for m in model.modules() if isinstance(m, BinaryLinear))
        huge_pages.move([head] if isinstance(head, Tensor) else [])

    @property
    def dtype(self) -> torch.dtype:
        parameter: Tensor = next(self.embed.parameters())
        return parameter.dtype

    @property
    def device(self) -> torch.device:
        parameter: Tensor = next(self.embed.parameters())
        return parameter.device

    def reserve(self, batch: int, slots: int) -> KVCache:
        """Return a cache for ``batch`` sequences of up to ``slots`` tokens: the last one, if it fits.

        The layers are looked at anew: they may have been cast, or given another activation format.
        """
        self.native = cpu_layers(self.layers, self.norm, self.head, self.dtype, self.device, self.native)
        cache = self.cache
        fits = cache is not None and cache.batch == batch and slots <= cache.capacity <= 2 * round_capacity(slots)
        if cache is None or not fits or cache.dtype != self.dtype or cache.keys.device != self.device:
            self.cache = self.loop = cache = None  # the old one goes before the new one comes
            capacity = round_capacity(slots)
            shape = (len(self.layers), batch, self.kv_heads, capacity, self.head_dim)
            cache = KVCache(*shape, self.dtype, self.device, self.cache_bits)
            positions = torch.arange(capacity, device=self.device).unsqueeze(0)
            with torch.no_grad():
                cos, sin = self.rope(torch.empty(0, dtype=self.dtype, device=self.device), positions)
            self.cache, self.cos, self.sin = cache, cos[0], sin[0]
        if self.cache_bits is not None and not cuda_layer.takes(self.layers, self.norm, cache):
            self.cache = None
            raise ValueError(
                f"cache_bits={self.cache_bits} needs an NVIDIA GPU, bitinfer's compiled CUDA kernels and a float16 or "
                f"bfloat16 model whose layers these take, got {self.dtype} on {self.device}; see bitinfer doctor, or "
                "leave cache_bits at None"
            )
        last = self.token_model
        self.token_model = cuda_layer.token_model(self.layers, self.norm, cache, last)
        if self.token_model is not last:
            self.loop = None  # whose graph has the last one's memory
        return cache

    @torch.no_grad()
    def prefill(self, ids: Tensor, padding: Tensor | None) -> Tensor:
        """Run prompts through the model and return the logits behind their last tokens, ``[B, V]``.

        Args:
            ids: int64 ``[B, T]``, padded on the left.
            padding: int64 ``[B]``, how many of them are padding; None for none.
        """
        last = torch.empty(0)
        chunk = max(1, min(CHUNK, MOST_TOKENS // len(ids)))
        for start in range(0, ids.shape[1], chunk):
            part = ids[:, start : start + chunk]
            last = self._run(part, self._span(start, part.shape[1], padding))
        return self.head(last)

    @torch.no_grad()
    def step(self, tokens: Tensor, slot: int, padding: Tensor | None) -> Tensor:
        """Run one token of each sequence, which goes to ``slot``, and return the logits behind it, ``[B, V]``.

        Args:
            tokens: int64 ``[B]``.
        """
        if self.native is not None and self.cache is not None:
            return self.native.step(self.embed(tokens), self.cache, self.cos, self.sin, slot, padding)
        return self.head(self._run(tokens.unsqueeze(1), self._span(slot, 1, padding)))

    @torch.no_grad()
    def step_anywhere(self, tokens: Tensor, slot: Tensor, padding: Tensor | None) -> Tensor:
        """Do what :meth:`step` does with a slot that the device alone knows, int64 ``[1]``: for a graph."""
        assert self.cache is not None
        if cuda_layer.takes(self.layers, self.norm, self.cache):
            step = cuda_layer.Step(slot, padding, self.cos, self.sin)
            if self.token_model is not None and padding is None:
                return self.head(self.token_model.step(self.embed(tokens), self.cache, step))
            return self.head(cuda_layer.run(self.layers, self.norm, self.embed(tokens), self.cache, step))
        return self.head(self._run(tokens.unsqueeze(1), self._span_anywhere(slot, padding)))

    def _run(self, ids: Tensor, span: Span) -> Tensor:
        """Return what the head multiplies for the last of the tokens ``ids [B, T]``, ``[B, D]``."""
        assert self.cache is not None
        hidden: Tensor = self.embed(ids)
        if cuda_layer.takes(self.layers, self.norm, self.cache):
            return cuda_layer.run_prompt(self.layers, self.norm, hidden, self.cache, span)
        for layer, keys, values in zip(self.layers, self.cache.keys, self.cache.values, strict=True):
            hidden = layer(hidden, keys, values, span)
        last: Tensor = self.norm(hidden[:, -1])
        return last

    def _span(self, start: int, count: int, padding: Tensor | None) -> Span:
        slots = torch.arange(start, start + count, device=self.device)
        read = start + count
        mask: Tensor | None = None
        if padding is None and count > 1 and start > 0 and self.device.type == "cuda":
            mask = causal_lower_right(count, read)  # which flash attention takes, and no mask of numbers
        elif padding is not None or (count > 1 and start > 0):
            seen = torch.arange(read, device=self.device) <= slots.unsqueeze(1)
            mask = self._mask(seen, padding)
        cos, sin = self._rotary(slots, padding)
        return Span(slots, read, mask, mask is None and count > 1, cos, sin, start)

    def _span_anywhere(self, slot: Tensor, padding: Tensor | None) -> Span:
        assert self.cache is not None
        read = self.cache.capacity
        seen = torch.arange(read, device=self.device) <= slot.unsqueeze(1)
        cos, sin = self._rotary(slot, padding)
        return Span(slot, read, self._mask(seen, padding), False, cos, sin, None)

    def _mask(self, seen: Tensor, padding: Tensor | None) -> Tensor:
        """Return ``[B or 1, 1, T, S]`` from ``seen [T, S]``, without the slots of padding."""
        if padding is None:
            return seen[None, None]
        real = torch.arange(seen.shape[1], device=self.device) >= padding.unsqueeze(1)
        # a row of padding sees itself: softmax over nothing is NaN
        own = torch.eye(seen.shape[0], dtype=torch.bool, device=self.device)
        own = torch.nn.functional.pad(own, (seen.shape[1] - seen.shape[0], 0)) if seen.shape[0] > 1 else own[:, :0]
        allowed = seen & real.unsqueeze(1)
        if seen.shape[0] > 1:
            allowed = allowed | own
        return allowed.unsqueeze(1)

    def _rotary(self, slots: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        positions = slots.unsqueeze(0) if padding is None else (slots - padding.unsqueeze(1)).clamp_min(0)
        return self.cos[positions], self.sin[positions]


def _rounded(head: nn.Module, bits: int) -> Callable[[Tensor], Tensor]:
    if bits != 8:
        raise ValueError(f"head_bits must be None or 8, got {bits!r}")
    if type(head) is not nn.Linear or head.bias is not None:
        raise ValueError(
            f"head_bits=8 needs a head that is a plain nn.Linear without a bias, got {type(head).__name__}"
        )
    return RowsLinear(head.weight)
