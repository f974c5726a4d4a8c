"""Keys and values of all layers in memory that is allocated once, and what a step reads and writes of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitinfer import huge_pages

CAPACITY_STEP = 256  # slots: generations of similar length share a cache, and on a GPU a graph


class KVCache:
    """Keys and values ``[B, kv_heads, capacity, head_dim]`` of each layer.

    A sequence that is shorter than others of its batch is padded on the left, so all of them write the same slot in a
    step. The slots of the padding hold whatever was computed there and are never read.

    Args:
        layers, batch, kv_heads, capacity, head_dim: the shape.
        dtype, device: of the entries.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, batch, kv_heads, capacity, head_dim)
        # zeros: a masked score times NaN left by whoever had this memory would still be NaN
        self.keys, self.values = (
            huge_pages.zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)
            for _ in range(2)
        )

    @property
    def batch(self) -> int:
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]


def round_capacity(slots: int) -> int:
    """Return the capacity of a cache that is to hold ``slots``."""
    return -(-slots // CAPACITY_STEP) * CAPACITY_STEP


@dataclass
class Span:
    """The slots that a forward pass over ``T`` tokens writes and reads.

    Attributes:
        slots: int64 ``[T]``, the slots written; on the device, so that a graph can be replayed for others.
        read: how many slots attention reads: those before the last one written, or all of a static cache.
        mask: bool ``[B, 1, T, read]``, which of them count; None where all do.
        causal: whether the mask is that of a causal pass that starts at slot 0 with no padding.
        cos, sin: ``[B or 1, T, head_dim]``, the rotary embedding of the tokens.
        start: the first slot written where the host knows it, else None.
    """

    slots: Tensor
    read: int
    mask: Tensor | None
    causal: bool
    cos: Tensor
    sin: Tensor
    start: int | None
