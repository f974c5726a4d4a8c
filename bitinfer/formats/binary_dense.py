"""Dense checkpoints whose linear weights are binary already: two values per row, or per group of columns of a row.

Such are "unpacked" releases of binary models (Bonsai: ``+s`` and ``-s`` per 128 columns), and what libraries save after
fake quantisation. Packing them loses nothing, and is refused where it would.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from bitinfer.checkpoint import Checkpoint
from bitinfer.errors import FormatError
from bitinfer.formats.base import Format, check_matrix, dense_linear, get_bias, get_tensor
from bitinfer.formats.levels import Levels, most_values, row_binary, sample_weight
from bitinfer.formats.modules import linear_names
from bitinfer.weight import BinaryWeight

GROUP_SIZES = (0, 128, 64, 32)  # cheapest first


@dataclass(frozen=True)
class BinaryDense(Format):
    """Dense weights that take two values.

    Attributes:
        group_size: columns that share the two values; 0 tries whole rows, then 128, 64 and 32.
    """

    name = "binary_dense"
    description = "dense weights that take two values per row, or per group of 128, 64 or 32 columns"

    group_size: int = 0

    def matches(self, checkpoint: Checkpoint) -> bool:
        name = sample_weight(checkpoint)
        return name is not None and self._levels(checkpoint.tensor(name), name) is not None

    def layer_names(self, checkpoint: Checkpoint) -> list[str]:
        return linear_names(checkpoint, self.config(checkpoint))

    def read_counted(self, tensors: Mapping[str, Tensor], prefix: str) -> tuple[BinaryWeight, int]:
        name = f"{prefix}.weight"
        weight = get_tensor(tensors, name)
        check_matrix(weight, name)
        found = self._levels(weight, name)
        if found is None:
            raise FormatError(
                f"{name} {self._reason(weight)}; leave it dense with skip=[{prefix!r}], or approximate it by "
                "sign and scale with format='latent'"
            )
        levels, group_size = found
        return (
            BinaryWeight(
                levels.signs,
                weight.shape[1],
                levels.scale,
                group_shift=levels.shift,
                bias=get_bias(tensors, prefix, weight.shape[0]),
                group_size=group_size,
            ),
            levels.zeros,
        )

    def reference_linear(self, tensors: Mapping[str, Tensor], prefix: str) -> nn.Module:
        """Return the layer as it is stored."""
        return dense_linear(get_tensor(tensors, f"{prefix}.weight"), tensors.get(f"{prefix}.bias"))

    def _reason(self, weight: Tensor) -> str:
        row, values = most_values(weight)
        if len(values) > 2:
            sizes = ", ".join(str(size or "whole rows") for size in self._sizes())
            return f"is not binary: row {row} takes {len(values)} values (columns were tried in groups of {sizes})"
        return (
            "takes two values a row, but in one row no scale and shift of float32 give both back to the last bit: "
            "convert a copy in float16 or bfloat16"
        )

    def _sizes(self) -> tuple[int, ...]:
        return (self.group_size,) if self.group_size else GROUP_SIZES

    def _levels(self, weight: Tensor, name: str) -> tuple[Levels, int] | None:
        for group_size in self._sizes():
            if group_size and group_size >= weight.shape[1]:
                group_size = 0
            levels = row_binary(weight, group_size, self.zero_limit, name)
            if levels is not None:
                return levels, group_size
        return None
