"""Keys and values of all layers in memory that is allocated once, and what a step reads and writes of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitinfer import huge_pages

CAPACITY_STEP = 256  # slots: generations of similar length share a cache, and on a GPU a graph
SCALE_COLUMNS = 32  # of a rounded row, that share a scale
SCALE_BYTES = 8  # behind its codes


class KVCache:
    """Keys and values ``[B, kv_heads, capacity, head_dim]`` of each layer, or rounded rows of these.

    A sequence that is shorter than others of its batch is padded on the left, so all of them write the same slot in a
    step. The slots of the padding hold whatever was computed there and are never read.

    Args:
        layers, batch, kv_heads, capacity, head_dim: the shape.
        dtype, device: of the entries.
        bits: 8 or 4 holds them as :func:`round_cache` makes them, uint8; None as they are.
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
        bits: int | None = None,
    ) -> None:
        self.head_dim, self.dtype, self.bits = head_dim, dtype, bits
        shape = (layers, batch, kv_heads, capacity, head_dim if bits is None else cache_row_bytes(head_dim, bits))
        held = dtype if bits is None else torch.uint8
        # zeros: a masked score times NaN left by whoever had this memory would still be NaN
        self.keys, self.values = (
            huge_pages.zeros(shape, held) if device.type == "cpu" else torch.zeros(shape, dtype=held, device=device)
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


def cache_row_bytes(head_dim: int, bits: int) -> int:
    """Return how long a row of ``head_dim`` numbers is, rounded to ``bits`` bits: codes, scales, padding."""
    return head_dim * bits // 8 + SCALE_BYTES


def round_cache(x: Tensor, bits: int) -> Tensor:
    """Round rows to 8 or 4 bits, as ``csrc/cuda/cache_row.cuh`` does it.

    Args:
        x: ``[..., head_dim]``, 64 or 128 columns; 32 of them share a scale, their largest magnitude over 127 or 7.
        bits: 8 or 4.

    Returns:
        uint8 ``[..., cache_row_bytes(head_dim, bits)]``: codes, float16 scales, zeros.

    Raises:
        ValueError: ``head_dim`` is no multiple of 32 up to 128.
    """
    head_dim = x.shape[-1]
    if head_dim % SCALE_COLUMNS or head_dim > SCALE_COLUMNS * SCALE_BYTES // 2:
        raise ValueError(f"a rounded cache needs a head_dim that is a multiple of 32 up to 128, got {head_dim}")
    largest = (1 << (bits - 1)) - 1
    groups = x.float().unflatten(-1, (-1, SCALE_COLUMNS))
    scale = (groups.abs().amax(-1, keepdim=True) / largest).clamp_max(torch.finfo(torch.float16).max).half()
    factor = torch.where(scale == 0, 0.0, 1.0 / scale.float())
    codes = (groups * factor).clamp(-largest, largest).round().add(1 << (bits - 1)).to(torch.uint8).flatten(-2)
    if bits == 4:  # columns 2i and 2i + 1 of eight are nibbles i and i + 4 of their word
        octets = codes.unflatten(-1, (-1, 8))
        order = octets[..., [0, 2, 4, 6, 1, 3, 5, 7]].unflatten(-1, (4, 2))
        codes = (order[..., 0] | order[..., 1] << 4).flatten(-2)
    tail = codes.new_zeros(*x.shape[:-1], SCALE_BYTES)
    scales = scale.squeeze(-1).contiguous().view(torch.uint8)
    tail[..., : scales.shape[-1]] = scales
    return torch.cat((codes, tail), -1)


def read_cache(rows: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Return what :func:`round_cache` has made of rows, ``[..., head_dim]`` of a dtype."""
    bits = (rows.shape[-1] - SCALE_BYTES) * 8 // head_dim
    codes, tail = rows[..., :-SCALE_BYTES], rows[..., -SCALE_BYTES:]
    if bits == 4:
        nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).unflatten(-1, (-1, 8))
        codes = nibbles[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(-2)
    scales = tail[..., : 2 * (head_dim // SCALE_COLUMNS)].contiguous().view(torch.float16)
    groups = (codes.to(torch.float32) - (1 << (bits - 1))).unflatten(-1, (-1, SCALE_COLUMNS))
    return (groups * scales.float().unsqueeze(-1)).flatten(-2).to(dtype)


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
