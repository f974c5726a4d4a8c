"""Find the two levels of a dense weight that is binary: per row, per group of columns of a row, or per column.

A result is exact: ``scale * S + shift``, computed in float32 and rounded to the dtype of the source, gives every source
value back, but for the few that lie halfway between the levels (``sign(0) = 0`` before the weight was materialised),
which are counted.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from bitinfer.checkpoint import Checkpoint
from bitinfer.formats.base import allowed_zeros, check_finite, row_chunks
from bitinfer.packing import pack_bits, words_per_row
from bitinfer.weight import FLOAT_DTYPES, group_count


@dataclass(frozen=True)
class Levels:
    """Signs, scale and shift of a dense binary weight.

    Attributes:
        signs: uint32 ``[N, ceil(K/32)]``.
        scale: ``[N, G]``, or ``[1, K]`` per column.
        shift: of the shape of ``scale``, or None where the levels are ``+scale`` and ``-scale``.
        zeros: how many values lay halfway and became +1.
    """

    signs: Tensor
    scale: Tensor
    shift: Tensor | None
    zeros: int


def sample_weight(checkpoint: Checkpoint) -> str | None:
    """Return the name of the linear weight with the most rows, by which a format is told, or None.

    Few rows or columns would take two values by chance.
    """
    names = [
        name
        for name in checkpoint
        if name.endswith("_proj.weight")
        and len(checkpoint.shape(name)) == 2
        and checkpoint.dtype(name) in FLOAT_DTYPES
        and min(checkpoint.shape(name)) > 2
    ]
    return max(names, key=lambda name: checkpoint.shape(name)[0], default=None)


def most_values(weight: Tensor) -> tuple[int, Tensor]:
    """Return the row that takes the most values, and these values."""
    counts = torch.cat([1 + (rows.sort(1).values.diff(dim=1) != 0).sum(1) for _, rows in row_chunks(weight)])
    row = int(counts.argmax())
    return row, weight[row].unique()


def row_binary(weight: Tensor, group_size: int, zero_limit: float, name: str) -> Levels | None:
    """Return the levels of each row (``group_size`` 0) or group of columns, or None if there are more than two.

    Levels ``+s`` and ``-s`` are preferred, for they need no shift.
    """
    return _symmetric(weight, group_size, zero_limit, name) or _asymmetric(weight, group_size, zero_limit, name)


def column_binary(weight: Tensor, zero_limit: float, name: str) -> Levels | None:
    """Return the two levels of each column, or None if a column takes more. One level has scale 0."""
    low = high = weight[0]
    for _, rows in row_chunks(weight):
        check_finite(rows, name)
        low, high = torch.minimum(low, rows.amin(0)), torch.maximum(high, rows.amax(0))
    found = _solve(low, high)
    if found is None:
        return None
    packed = _Packer(weight, zero_limit)
    for start, rows in row_chunks(weight):
        if not packed.add(start, rows, low, high):
            return None
    scale, shift = found
    return Levels(packed.words, scale.unsqueeze(0), shift.unsqueeze(0), packed.zeros)


def _symmetric(weight: Tensor, group_size: int, zero_limit: float, name: str) -> Levels | None:
    packed = _Packer(weight, zero_limit)
    scale = torch.empty(weight.shape[0], group_count(weight.shape[1], group_size), dtype=weight.dtype)
    for start, rows in row_chunks(weight):
        check_finite(rows, name)
        grouped = _grouped(rows, group_size).abs()
        top = grouped.amax(-1)
        scale[start : start + len(rows)] = top
        spread = _spread(top, group_size, rows.shape[1])
        if not packed.add(start, rows, -spread, spread):
            return None
    return Levels(packed.words, scale, None, packed.zeros)


def _asymmetric(weight: Tensor, group_size: int, zero_limit: float, name: str) -> Levels | None:
    packed = _Packer(weight, zero_limit)
    shape = (weight.shape[0], group_count(weight.shape[1], group_size))
    low, high = torch.empty(shape, dtype=weight.dtype), torch.empty(shape, dtype=weight.dtype)
    for start, rows in row_chunks(weight):
        check_finite(rows, name)
        grouped = _grouped(rows, group_size)
        lo, hi = grouped.amin(-1), grouped.amax(-1)
        low[start : start + len(rows)], high[start : start + len(rows)] = lo, hi
        spread = (_spread(level, group_size, rows.shape[1]) for level in (lo, hi))
        if not packed.add(start, rows, *spread):
            return None
    found = _solve(low, high)
    return None if found is None else Levels(packed.words, *found, packed.zeros)


class _Packer:
    """Collects the sign words of a weight chunk by chunk, and counts the values halfway between the levels."""

    def __init__(self, weight: Tensor, zero_limit: float) -> None:
        self.words = torch.empty(weight.shape[0], words_per_row(weight.shape[1]), dtype=torch.uint32)
        self.zeros = 0
        self.allowed = allowed_zeros(weight, zero_limit)

    def add(self, start: int, rows: Tensor, low: Tensor, high: Tensor) -> bool:
        """Pack ``rows`` by their levels, which broadcast against them; False if a value is neither level."""
        is_low, is_high = rows == low, rows == high
        other = ~(is_low | is_high)
        if other.any():
            middle = (low.float() + high.float()) / 2
            # the middle was rounded apart from the levels: within one unit in the last place of the larger
            slack = torch.maximum(low.float().abs(), high.float().abs()) * torch.finfo(rows.dtype).eps
            if (other & ((rows.float() - middle).abs() > slack)).any():
                return False
            self.zeros += int(other.sum())
            if self.zeros > self.allowed:
                return False
        self.words[start : start + len(rows)] = pack_bits(is_low & ~is_high)
        return True


def _grouped(rows: Tensor, group_size: int) -> Tensor:
    """View ``[n, K]`` as ``[n, G, group]``; a short last group is filled up with its own last column."""
    if not group_size:
        return rows.unsqueeze(1)
    missing = -rows.shape[1] % group_size
    if missing:
        rows = torch.cat([rows, rows[:, -1:].expand(-1, missing)], dim=1)
    return rows.unflatten(1, (-1, group_size))


def _spread(levels: Tensor, group_size: int, columns: int) -> Tensor:
    return levels.repeat_interleave(group_size, 1)[:, :columns] if group_size else levels


def _solve(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return scale and shift with ``shift - scale -> low`` and ``shift + scale -> high`` exactly, or None.

    In the dtype of the levels where that is possible, else in float32. Levels that were themselves rounded from a sum
    hide the scale and shift that they came from by about half a unit in their last place: that neighbourhood is
    searched, nearest first, in eighths of a unit.
    """
    scale, shift = (high.double() - low.double()) / 2, (high.double() + low.double()) / 2
    unit = torch.maximum(low.double().abs(), high.double().abs()) * torch.finfo(low.dtype).eps / 8
    steps = sorted(product(range(-4, 5), repeat=2), key=lambda pair: abs(pair[0]) + abs(pair[1]))
    for dtype in dict.fromkeys((low.dtype, torch.float32)):
        found_scale, found_shift = scale.to(dtype), shift.to(dtype)
        solved = torch.zeros_like(low, dtype=torch.bool)
        for i, j in steps:
            a, b = (scale + i * unit).to(dtype), (shift + j * unit).to(dtype)
            minus, plus = b.float() - a.float(), b.float() + a.float()
            new = (minus.to(low.dtype) == low) & (plus.to(low.dtype) == high) & ~solved
            found_scale, found_shift = torch.where(new, a, found_scale), torch.where(new, b, found_shift)
            solved |= new
            if solved.all():
                return found_scale, found_shift
    return None
