"""FBI-LLM: fp32 latent weights with a scale and a shift per input column (arXiv 2407.07093).

``W~[n, k] = alpha[k] * sign(W[n, k]) + beta[k]``, ``y = W~ x + bias``, with ``weight`` W, ``wscale`` alpha and
``wbias`` beta. ``wbias`` shifts the weight and is no bias. The shapes ``[1, K]`` (the released models), ``[N, 1]`` and
``[1]`` tell the patterns column, row and single apart. alpha is learned and may be negative.

The same model already materialised, dense with two values per column, is read too where that loses nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitinfer.checkpoint import Checkpoint
from bitinfer.errors import FormatError
from bitinfer.formats.base import (
    Format,
    check_matrix,
    dense_linear,
    get_bias,
    get_tensor,
    get_vector,
    pack_latent,
)
from bitinfer.formats.levels import column_binary, row_binary, sample_weight
from bitinfer.formats.modules import check_one_way, linear_names
from bitinfer.weight import BinaryWeight

SUFFIXES = (".wscale", ".wbias")


@dataclass(frozen=True)
class FbiLlm(Format):
    """The released FBI-LLM checkpoints, and what the same training code can save."""

    name = "fbi_llm"
    description = "FBI-LLM: latent weights with wscale and wbias per input column (or two values per column)"

    def matches(self, checkpoint: Checkpoint) -> bool:
        if any(key.endswith(SUFFIXES) for key in checkpoint):
            return True
        name = sample_weight(checkpoint)
        if name is None:
            return False
        weight = checkpoint.tensor(name)
        # a weight that is binary by rows as well needs no scale per column
        return (
            column_binary(weight, self.zero_limit, name) is not None
            and row_binary(weight, 0, self.zero_limit, name) is None
        )

    def layer_names(self, checkpoint: Checkpoint) -> list[str]:
        stems = dict.fromkeys(
            key.removesuffix(suffix) for suffix in SUFFIXES for key in checkpoint if key.endswith(suffix)
        )
        if not stems:
            return [n for n in linear_names(checkpoint, self.config(checkpoint)) if not n.endswith("lm_head")]
        for stem in stems:
            for part in ("weight", "wscale", "wbias"):
                if f"{stem}.{part}" not in checkpoint:
                    raise FormatError(f"{stem}.{part} is missing, though the layer's other FBI-LLM tensors are there")
        others = [
            n.removesuffix(".weight") for n in checkpoint if n.endswith(".weight") and n[: -len(".weight")] not in stems
        ]
        check_one_way(stems, others, self.name, "wscale and wbias")
        return [name for key in checkpoint if (name := key.removesuffix(".weight")) != key and name in stems]

    def consumed(self, prefix: str) -> tuple[str, ...]:
        return tuple(f"{prefix}.{part}" for part in ("weight", "wscale", "wbias", "bias"))

    def read_counted(self, tensors: Mapping[str, Tensor], prefix: str) -> tuple[BinaryWeight, int]:
        weight = get_tensor(tensors, f"{prefix}.weight")
        check_matrix(weight, f"{prefix}.weight")
        rows, columns = weight.shape
        bias = get_bias(tensors, prefix, rows)
        if f"{prefix}.wscale" not in tensors:
            return _read_materialised(weight, bias, prefix, self.zero_limit)
        alpha, beta, by_column = _scales(tensors, prefix, rows, columns)
        signs, zeros = pack_latent(weight, f"{prefix}.weight", self.zero_limit)
        if by_column:
            return BinaryWeight(signs, columns, in_scale=alpha, in_shift=beta, bias=bias), zeros
        alpha, beta = (t.expand(rows, 1).contiguous() for t in (alpha, beta))
        return BinaryWeight(signs, columns, scale=alpha, group_shift=beta, bias=bias), zeros

    def reference_linear(self, tensors: Mapping[str, Tensor], prefix: str) -> nn.Module:
        """Return ``nn.Linear`` with ``wscale * sign(W) + wbias``, where ``sign(0) = 0`` as in the training code."""
        weight = get_tensor(tensors, f"{prefix}.weight").float()
        if f"{prefix}.wscale" in tensors:
            weight = tensors[f"{prefix}.wscale"].float() * torch.sign(weight) + tensors[f"{prefix}.wbias"].float()
        return dense_linear(weight, tensors.get(f"{prefix}.bias"))


def _scales(tensors: Mapping[str, Tensor], prefix: str, rows: int, columns: int) -> tuple[Tensor, Tensor, bool]:
    """Return alpha and beta as ``[1, K]`` (third: True), or as ``[N, 1]`` or ``[1, 1]`` (False)."""
    scale, shift = (f"{prefix}.wscale", f"{prefix}.wbias")
    shape = tuple(get_tensor(tensors, scale).shape)
    if tuple(get_tensor(tensors, shift).shape) != shape:
        raise FormatError(
            f"{shift} has shape {tuple(tensors[shift].shape)}, but {scale} has {shape}; they must be equal"
        )
    if shape == (1, columns) and columns > 1:
        target = (1, columns)
    elif shape == (rows, 1):
        target = (rows, 1)
    elif shape in ((1,), (), (1, 1)):
        target = (1, 1)
    else:
        raise FormatError(
            f"{scale} has shape {shape}, expected (1, {columns}) (per column), ({rows}, 1) (per row) or (1,) for a "
            f"weight of shape {(rows, columns)}"
        )
    alpha, beta = (get_vector(tensors, name, target, (shape,)) for name in (scale, shift))
    return alpha, beta, target == (1, columns) and columns > 1


def _read_materialised(weight: Tensor, bias: Tensor | None, prefix: str, zero_limit: float) -> tuple[BinaryWeight, int]:
    found = column_binary(weight, zero_limit, f"{prefix}.weight")
    if found is None:
        raise FormatError(
            f"{prefix}.weight has no wscale and wbias beside it, and its columns do not take two values each "
            f"that a scale and a shift give back exactly (column 0 takes {len(weight[:, 0].unique())}): it is no "
            "FBI-LLM layer"
        )
    return BinaryWeight(
        found.signs, weight.shape[1], in_scale=found.scale, in_shift=found.shift, bias=bias
    ), found.zeros
