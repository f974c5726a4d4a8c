"""Our own folders, read back: what :func:`bitinfer.convert` wrote."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitinfer.checkpoint import Checkpoint
from bitinfer.errors import FormatError
from bitinfer.formats.base import Format, check_finite, dense_linear, get_tensor
from bitinfer.formats.modules import model_modules
from bitinfer.packing import WORD_BITS
from bitinfer.weight import OPTIONAL_TENSORS, BinaryWeight, WeightLayout

QUANT_METHOD = "bitinfer"
LAYOUT_VERSION = 1


@dataclass(frozen=True)
class Packed(Format):
    """A folder that is packed already."""

    name = "packed"
    description = "a folder that bitinfer packed"

    def matches(self, checkpoint: Checkpoint) -> bool:
        return quantization(checkpoint.config).get("quant_method") == QUANT_METHOD

    def layer_names(self, checkpoint: Checkpoint) -> list[str]:
        check_version(checkpoint)
        names = [
            key.removesuffix(".weight")
            for key in checkpoint
            if key.endswith(".weight") and checkpoint.dtype(key) == torch.uint32
        ]
        if not names:
            raise FormatError(f"{checkpoint.path}: config.json says it is packed, but no uint32 weight is stored")
        return names

    def consumed(self, prefix: str) -> tuple[str, ...]:
        return tuple(f"{prefix}.{part}" for part in ("weight", *OPTIONAL_TENSORS, "bias"))

    def config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return dict(checkpoint.config)

    def layout(self, checkpoint: Checkpoint, prefix: str) -> WeightLayout:
        """Return the layout that ``config.json`` gives for a layer."""
        values = quantization(checkpoint.config)
        layout = values.get("layouts", {}).get(prefix, values.get("layout"))
        try:
            return WeightLayout.from_dict(layout)
        except (TypeError, ValueError, AttributeError) as error:
            raise FormatError(
                f"{checkpoint.path / 'config.json'}: the layout of {prefix} is not valid: {error}"
            ) from None

    def read_counted(self, tensors: Mapping[str, Tensor], prefix: str) -> tuple[BinaryWeight, int]:
        """Return the layer and the zeros that its conversion counted. ``tensors`` must be a Checkpoint."""
        if not isinstance(tensors, Checkpoint):
            raise TypeError(f"packed: tensors must be a Checkpoint, whose config has the layout, got {type(tensors)}")
        check_version(tensors)
        layout = self.layout(tensors, prefix)
        words = get_tensor(tensors, f"{prefix}.weight")
        if words.dtype != torch.uint32 or words.dim() != (3 if layout.planes > 1 else 2):
            raise FormatError(
                f"{prefix}.weight is {words.dtype} {tuple(words.shape)}, expected uint32 [N, K / 32] "
                f"with {layout.planes} plane(s) as config.json says"
            )
        parts = {"weight": words}
        for part in (*layout.tensors, *(("bias",) if f"{prefix}.bias" in tensors else ())):
            parts[part] = get_tensor(tensors, f"{prefix}.{part}")
            if parts[part].is_floating_point():
                check_finite(parts[part], f"{prefix}.{part}")
        extra = [t for t in OPTIONAL_TENSORS if t not in layout.tensors and f"{prefix}.{t}" in tensors]
        if extra:
            raise FormatError(f"{prefix}.{extra[0]} is stored, but the layout in config.json does not have it")
        columns = self.in_features(tensors, prefix)
        try:
            weight = BinaryWeight.from_tensors(parts, columns, layout)
        except (ValueError, TypeError) as error:
            raise FormatError(f"{prefix}: the stored tensors do not fit together: {error}") from None
        tail = columns % WORD_BITS
        if tail and (words[..., -1].view(torch.int32) & ~((1 << tail) - 1)).any():
            raise FormatError(f"{prefix}.weight has bits set past column {columns}: the words are damaged")
        return weight, int(quantization(tensors.config).get("zeros", {}).get(prefix, 0))

    def reference_linear(self, tensors: Mapping[str, Tensor], prefix: str) -> nn.Module:
        """Return the dequantised layer: a packed folder has no other formula."""
        weight = self.read(tensors, prefix)
        if weight.norm_eps is None:
            return dense_linear(weight.to_dense(), weight.bias)
        norm = nn.LayerNorm(weight.out_features, eps=weight.norm_eps).requires_grad_(False)
        if weight.bias is not None:
            norm.bias = nn.Parameter(weight.bias.float(), requires_grad=False)
        return nn.Sequential(dense_linear(weight.to_dense(), None), norm)

    @staticmethod
    def in_features(checkpoint: Checkpoint, prefix: str) -> int:
        """Return K of a layer.

        The words give it only up to the next multiple of 32, so a scale per column tells it, or else the model that
        ``config.json`` describes.
        """
        for part in ("in_scale", "in_shift"):
            if f"{prefix}.{part}" in checkpoint:
                return checkpoint.shape(f"{prefix}.{part}")[-1]
        modules = model_modules(checkpoint.config)
        if modules is not None and prefix in modules.linears:
            return modules.linears[prefix][1]
        return checkpoint.shape(f"{prefix}.weight")[-1] * WORD_BITS


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the ``quantization_config`` of a ``config.json``; empty without one."""
    values = config.get("quantization_config")
    return values if isinstance(values, dict) else {}


def check_version(checkpoint: Checkpoint) -> None:
    """Raise FormatError if a newer bitinfer wrote the folder, or if the version is missing."""
    version = quantization(checkpoint.config).get("layout_version")
    if not isinstance(version, int) or version < 1:
        raise FormatError(
            f"{checkpoint.path / 'config.json'}: quantization_config has layout_version {version!r}, expected 1"
        )
    if version > LAYOUT_VERSION:
        raise FormatError(
            f"{checkpoint.path}: layout_version {version}, written by a newer bitinfer; this one reads up to "
            f"{LAYOUT_VERSION}: pip install -U bitinfer"
        )
