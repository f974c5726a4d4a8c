"""The bit layout in pure torch: 32 signs to a word, least significant bit first, a set bit means -1.

Column ``32*w + j`` of a row is bit ``j`` of word ``w``; bits past the last column are 0. ``csrc/packing.h`` states the
same layout for C++, and hand-written golden words in the tests hold both to it.
"""

import sys

import torch
from torch import Tensor

WORD_BITS = 32

if sys.byteorder != "little":  # words are assembled from bytes, as checkpoints store them
    raise ImportError("bitinfer needs a little-endian machine: packed checkpoints hold little-endian uint32 words")


def words_per_row(in_features: int) -> int:
    """Return the number of 32-bit words that hold one row of ``in_features`` signs."""
    return -(-in_features // WORD_BITS)


def pack_bits(bits: Tensor) -> Tensor:
    """Pack booleans into words: bit ``j`` of ``out[..., w]`` is ``bits[..., 32*w + j]``.

    Args:
        bits: bool ``[..., K]``, any K.

    Returns:
        uint32 ``[..., ceil(K/32)]``; bits past K are 0.
    """
    width = words_per_row(bits.shape[-1]) * WORD_BITS
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, width - bits.shape[-1]))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    octets = (padded.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
    return octets.contiguous().view(torch.int32).view(torch.uint32)


def unpack_bits(words: Tensor, length: int) -> Tensor:
    """Invert :func:`pack_bits`.

    Args:
        words: uint32 or int32 ``[..., W]``.
        length: number of bits K to return, at most ``32*W``.

    Returns:
        uint8 ``[..., K]`` of zeros and ones.
    """
    octets = words.contiguous().view(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    return ((octets.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :length]


def pack_signs(weight: Tensor) -> Tensor:
    """Pack the signs of a matrix: a set bit where ``weight < 0``.

    Zero (of either sign) and NaN pack as +1, since a bit cannot hold ``sign(0) = 0``; checkpoint readers count them.

    Args:
        weight: any real dtype, ``[..., K]``.

    Returns:
        uint32 ``[..., ceil(K/32)]``.
    """
    return pack_bits(weight < 0)


def unpack_signs(words: Tensor, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the +1 and -1 that ``words`` hold.

    Args:
        words: uint32 or int32 ``[..., W]``.
        in_features: number of columns K, at most ``32*W``.
        dtype: dtype of the result, any signed one.

    Returns:
        ``[..., K]`` of +1 and -1.
    """
    return 1 - 2 * unpack_bits(words, in_features).to(dtype)
