"""The reference backend: the algebra in pure torch, for any device. It is the oracle of every other backend.

``sign_gemm`` accumulates in float64. ``popcount_gemm`` computes the integers exactly and then the float32 epilogue in
the order that ``bitinfer.ops.popcount_gemm`` fixes, so that other backends can be compared with it bit for bit.
Weights are unpacked a slice of rows at a time: no dense copy of a matrix is ever made.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bitinfer.backends.base import Backend, Problem
from bitinfer.packing import pack_bits, pack_signs, unpack_bits, unpack_signs
from bitinfer.weight import group_count, sum_groups

SLICE_ELEMENTS = 1 << 22  # unpacked weights held at a time: 32 MiB of float64
SMALLEST_ABSMAX = 2.0**-96  # smaller tokens count as zero: 127 / absmax must stay finite in float32


class ReferenceBackend(Backend):
    """Pure torch, on every device that torch has."""

    name = "reference"

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def pack_signs(self, weight: Tensor) -> Tensor:
        return pack_signs(weight)

    def pack_activations(
        self, x: Tensor, in_scale: Tensor | None, in_shift: Tensor | None, bits: int, block_size: int, group_size: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = x.float()
        z = x if in_scale is None else x * in_scale.float().flatten()
        scale, inverse = _activation_scales(z, bits, block_size)
        values = _quantise(z, inverse, bits, block_size)
        if bits == 1:
            planes = pack_bits(values < 0).unsqueeze(-2)
        else:
            shifts = torch.arange(bits, device=x.device, dtype=torch.int32).unsqueeze(-1)
            planes = pack_bits(((values.unsqueeze(-2) >> shifts) & 1).bool())
        sums = sum_groups(values, segment_size(block_size, group_size)).to(torch.int32)
        if in_shift is None:
            shift = x.new_empty(*x.shape[:-1], 0)
        else:
            shift = (x.double() * in_shift.double().flatten()).sum(-1, keepdim=True).float()
        return planes, scale, sums, shift

    def sign_gemm(
        self,
        x: Tensor,
        weight: Tensor,
        in_features: int,
        weight_scale: Tensor | None,
        in_scale: Tensor | None,
        in_shift: Tensor | None,
        group_shift: Tensor | None,
        bias: Tensor | None,
        group_size: int,
        norm_eps: float | None,
    ) -> Tensor:
        x64 = x.double()
        z = x64 if in_scale is None else x64 * in_scale.double().flatten()
        signs, scale = _with_plane_dim(weight), _with_plane_dim(weight_scale)
        assert signs is not None
        outputs = []
        for rows in _row_slices(signs.shape[1], in_features):
            part = x64.new_zeros(())
            for p in range(signs.shape[0]):
                dense = unpack_signs(signs[p, rows], in_features, torch.float64)
                if scale is not None:
                    dense *= _spread(scale[p, rows].double(), group_size, in_features)
                part = part + F.linear(z, dense)
            outputs.append(part)
        a = torch.cat(outputs, -1) if outputs else x64.new_empty(*x.shape[:-1], 0)
        if group_shift is not None:
            a = a + F.linear(sum_groups(z, group_size), group_shift.double().reshape(-1, group_shift.shape[-1]))
        if in_shift is not None:
            a = a + (x64 * in_shift.double().flatten()).sum(-1, keepdim=True)
        return _finish(a, bias, norm_eps, x.dtype)

    def popcount_gemm(
        self,
        planes: Tensor,
        act_scale: Tensor,
        act_sum: Tensor,
        act_shift: Tensor | None,
        weight: Tensor,
        in_features: int,
        weight_scale: Tensor | None,
        group_shift: Tensor | None,
        bias: Tensor | None,
        group_size: int,
        block_size: int,
        norm_eps: float | None,
        dtype: torch.dtype,
    ) -> Tensor:
        values = unpack_activations(planes, in_features).double()
        signs, scale = _with_plane_dim(weight), _with_plane_dim(weight_scale)
        assert signs is not None
        scale = None if scale is None else scale.float()
        shift = None if group_shift is None else group_shift.float().reshape(-1, group_shift.shape[-1])
        segment = segment_size(block_size, group_size)
        outputs = []
        for rows in _row_slices(signs.shape[1], in_features):
            a = act_scale.new_zeros(*values.shape[:-1], rows.stop - rows.start)
            dense = [unpack_signs(plane, in_features, torch.float64) for plane in signs[:, rows]]
            for s in range(group_count(in_features, segment)):
                columns = slice(s * segment, (s + 1) * segment) if segment else slice(None)
                token = act_scale[..., s * segment // block_size if block_size else 0].unsqueeze(-1)
                group = s * segment // group_size if group_size else 0
                for p, plane in enumerate(dense):
                    integers = F.linear(values[..., columns], plane[:, columns]).float()
                    a = a + (token if scale is None else token * scale[p, rows, group]) * integers
                if shift is not None:
                    a = a + (token * shift[rows, group]) * act_sum[..., s].unsqueeze(-1).float()
            outputs.append(a)
        a = torch.cat(outputs, -1) if outputs else act_scale.new_empty(*values.shape[:-1], 0)
        if act_shift is not None:
            a = a + act_shift
        return _finish(a, bias, norm_eps, dtype)


def segment_size(block_size: int, group_size: int) -> int:
    """Columns whose integers are summed before any scale applies: the smaller of the two sizes, 0 for all columns."""
    return min(size for size in (block_size, group_size) if size) if block_size or group_size else 0


def unpack_activations(planes: Tensor, in_features: int) -> Tensor:
    """Return the integers int32 ``[..., K]`` that bit planes ``[..., bits, W]`` hold: +-1 for one plane, else two's
    complement."""
    bits = unpack_bits(planes, in_features).to(torch.int32)
    if bits.shape[-2] == 1:
        return 1 - 2 * bits.squeeze(-2)
    top = bits.shape[-2] - 1
    powers = [1 << b for b in range(top)] + [-(1 << top)]
    return (bits * torch.tensor(powers, dtype=torch.int32, device=planes.device).unsqueeze(-1)).sum(-2).to(torch.int32)


def _activation_scales(z: Tensor, bits: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Return the scale and the factor that quantises, float32 ``[..., blocks]`` each, of float32 ``z [..., K]``."""
    k = z.shape[-1]
    magnitude = z.abs()
    if bits == 1:
        counts = sum_groups(torch.ones(k, dtype=torch.float64, device=z.device), block_size)
        scale = (sum_groups(magnitude.double(), block_size) / counts).float()
        bad = ~scale.isfinite()
        inverse = torch.ones_like(scale)
    else:
        size = block_size or max(k, 1)
        absmax = F.pad(magnitude, (0, -k % size)).unflatten(-1, (-1, size)).amax(-1) if k else magnitude.sum(-1, True)
        bad = ~absmax.isfinite()
        # a tensor, since torch turns division of or by a number into a reciprocal, which rounds twice
        highest = torch.full_like(absmax, (1 << (bits - 1)) - 1)
        zero = absmax < SMALLEST_ABSMAX
        scale = torch.where(zero, 0.0, absmax / highest)
        inverse = torch.where(zero, 0.0, highest / absmax)
    nan = torch.full_like(scale, float("nan"))
    return torch.where(bad, nan, scale), torch.where(bad, torch.zeros_like(inverse), inverse)


def _quantise(z: Tensor, inverse: Tensor, bits: int, block_size: int) -> Tensor:
    """Return the integers int32 ``[..., K]``: ``rint(z * inverse)``, or for one bit -1 where ``z < 0`` and else +1."""
    if block_size:
        inverse = inverse.repeat_interleave(block_size, -1)[..., : z.shape[-1]]
    z = torch.where(inverse == 0, torch.zeros_like(z), z)  # also drops what is not finite
    if bits == 1:
        return torch.where(z < 0, -1, 1).to(torch.int32)
    return (z * inverse).round().to(torch.int32)


def _row_slices(rows: int, columns: int) -> list[slice]:
    """Cut ``rows`` so that a slice unpacks to at most SLICE_ELEMENTS."""
    step = max(1, SLICE_ELEMENTS // max(columns, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _with_plane_dim(tensor: Tensor | None) -> Tensor | None:
    return tensor.unsqueeze(0) if tensor is not None and tensor.dim() == 2 else tensor


def _spread(grouped: Tensor, group_size: int, columns: int) -> Tensor:
    return grouped.repeat_interleave(group_size, -1)[..., :columns] if group_size else grouped


def _finish(a: Tensor, bias: Tensor | None, norm_eps: float | None, dtype: torch.dtype) -> Tensor:
    """Apply the LayerNorm over the outputs, then the bias, in the dtype of ``a``; round once."""
    if norm_eps is not None:
        a = F.layer_norm(a.double(), a.shape[-1:], eps=norm_eps).to(a.dtype)
    if bias is not None:
        a = a + bias.to(a.dtype)
    return a.to(dtype)
