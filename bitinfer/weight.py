"""BinaryWeight: every field of the packed algebra, its shapes checked once.

For input ``x [M, K]`` and output ``y [M, N]``, planes ``p`` and column groups ``g``::

    z[m, k] = in_scale[k] * x[m, k]
    a[m, n] = sum_p sum_g scale[p, n, g] * sum_{k in g} S[p, n, k] * z[m, k]
            + sum_g group_shift[n, g] * sum_{k in g} z[m, k]
            + sum_k in_shift[k] * x[m, k]
    y[m, n] = norm(a)[m, n] + bias[n]

Every term but the sign product is optional.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from bitinfer.packing import WORD_BITS, pack_signs, unpack_signs, words_per_row

# field of BinaryWeight -> name of the parameter in modules and of the tensor on disk
TENSOR_NAMES = {
    "signs": "weight",
    "scale": "weight_scale",
    "in_scale": "in_scale",
    "in_shift": "in_shift",
    "group_shift": "group_shift",
    "bias": "bias",
}
OPTIONAL_TENSORS = ("weight_scale", "in_scale", "in_shift", "group_shift")
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def group_count(in_features: int, group_size: int) -> int:
    """Return the number of column groups: 1 for ``group_size`` 0, else ``ceil(in_features / group_size)``."""
    return -(-in_features // group_size) if group_size else 1


@dataclass(frozen=True)
class WeightLayout:
    """What a packed layer holds beside its signs: enough to build the module before its tensors are read.

    Attributes:
        planes: number of sign planes P.
        group_size: columns that share a scale; 0 for one group per row.
        tensors: which of ``weight_scale``, ``in_scale``, ``in_shift``, ``group_shift`` are there.
        norm_eps: epsilon of the LayerNorm over the outputs (no affine); None for no norm.
    """

    planes: int = 1
    group_size: int = 0
    tensors: tuple[str, ...] = ("weight_scale",)
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        for name in ("planes", "group_size"):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"WeightLayout: {name} must be an int, got {getattr(self, name)!r}")
        if self.planes < 1:
            raise ValueError(f"WeightLayout: planes must be at least 1, got {self.planes}")
        if self.group_size < 0 or self.group_size % WORD_BITS:
            raise ValueError(f"WeightLayout: group_size must be 0 or a multiple of 32, got {self.group_size}")
        unknown = set(self.tensors) - set(OPTIONAL_TENSORS)
        if unknown:
            raise ValueError(f"WeightLayout: unknown tensors {sorted(unknown)}; known are {list(OPTIONAL_TENSORS)}")
        if self.norm_eps is not None and not self.norm_eps >= 0:
            raise ValueError(f"WeightLayout: norm_eps must be None or a number from 0, got {self.norm_eps}")
        # one spelling for equal layouts
        object.__setattr__(self, "tensors", tuple(t for t in OPTIONAL_TENSORS if t in self.tensors))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary that :meth:`from_dict` reads."""
        return {
            "planes": self.planes,
            "group_size": self.group_size,
            "tensors": list(self.tensors),
            "norm_eps": self.norm_eps,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "WeightLayout":
        """Build a layout from what :meth:`to_dict` wrote; an unknown key is a ValueError."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"WeightLayout: unknown keys {sorted(unknown)}")
        return cls(**{**values, "tensors": tuple(values.get("tensors", ("weight_scale",)))})

    def shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of a layer, ``weight`` first, without the bias."""
        groups = group_count(in_features, self.group_size)
        lead = (self.planes,) if self.planes > 1 else ()
        one = (1,) * len(lead)
        shapes = {
            "weight": (*lead, out_features, words_per_row(in_features)),
            "weight_scale": (*lead, out_features, groups),
            "in_scale": (*one, 1, in_features),
            "in_shift": (*one, 1, in_features),
            "group_shift": (*one, out_features, groups),
        }
        return {name: shape for name, shape in shapes.items() if name == "weight" or name in self.tensors}


@dataclass(frozen=True, eq=False)
class BinaryWeight:
    """A binary weight matrix ``[N, K]`` with its scales, as modules and checkpoints hold it.

    Attributes:
        signs: uint32 ``[N, ceil(K/32)]``, or ``[P, N, ceil(K/32)]`` for P > 1 planes; see :mod:`bitinfer.packing`.
        in_features: K.
        scale: ``[N, G]`` (``[P, N, G]``); None stands for 1.
        in_scale: ``[1, K]`` (``[1, 1, K]``), or None.
        in_shift: ``[1, K]`` (``[1, 1, K]``), or None.
        group_shift: ``[N, G]`` (``[1, N, G]``), or None.
        bias: ``[N]``, or None.
        group_size: columns to a group, a multiple of 32; 0 for one group (G = 1). The last group may be shorter.
        norm_eps: epsilon of the LayerNorm over the N outputs, None for no norm.

    Scales are float32, float16 or bfloat16; all arithmetic on them is float32.

    Raises:
        ValueError, TypeError: a field has the wrong shape or dtype. The message names it.
    """

    signs: Tensor
    in_features: int
    scale: Tensor | None = None
    in_scale: Tensor | None = None
    in_shift: Tensor | None = None
    group_shift: Tensor | None = None
    bias: Tensor | None = None
    group_size: int = 0
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        if self.signs.dtype != torch.uint32:
            raise TypeError(f"BinaryWeight: signs must be torch.uint32, got {self.signs.dtype}")
        if self.signs.dim() not in (2, 3):
            raise ValueError(
                f"BinaryWeight: signs must be [N, K/32] or [P, N, K/32], got shape {tuple(self.signs.shape)}"
            )
        if self.in_features < 1:
            raise ValueError(f"BinaryWeight: in_features must be at least 1, got {self.in_features}")
        if self.signs.dim() == 3 and self.planes == 1:
            raise ValueError("BinaryWeight: a single plane is held as [N, K/32], not [1, N, K/32]; squeeze dim 0")
        expected = self.layout.shapes(self.in_features, self.out_features)
        if self.bias is not None:
            expected["bias"] = (self.out_features,)
        for field, name in TENSOR_NAMES.items():
            tensor = getattr(self, field)
            if tensor is None:
                continue
            if tuple(tensor.shape) != expected[name]:
                raise ValueError(
                    f"BinaryWeight: {field} has shape {tuple(tensor.shape)} but in_features={self.in_features}, "
                    f"out_features={self.out_features}, planes={self.planes}, group_size={self.group_size} "
                    f"need {expected[name]}"
                )
            if field != "signs" and tensor.dtype not in FLOAT_DTYPES:
                raise TypeError(f"BinaryWeight: {field} must be float32, float16 or bfloat16, got {tensor.dtype}")

    @property
    def planes(self) -> int:
        """Number of sign planes P."""
        return self.signs.shape[0] if self.signs.dim() == 3 else 1

    @property
    def out_features(self) -> int:
        """Number of output features N."""
        return self.signs.shape[-2]

    @property
    def layout(self) -> WeightLayout:
        """The layout that a module needs to hold this weight."""
        present = tuple(TENSOR_NAMES[f] for f in TENSOR_NAMES if getattr(self, f) is not None)
        return WeightLayout(
            self.planes, self.group_size, tuple(t for t in present if t in OPTIONAL_TENSORS), self.norm_eps
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, scales and bias included."""
        return sum(t.nbytes for t in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Average bits per weight, scales included and the bias left out."""
        total = self.nbytes - (self.bias.nbytes if self.bias is not None else 0)
        return 8 * total / (self.in_features * self.out_features)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the tensors that are there, by their name in modules and on disk (``prefix`` put before)."""
        pairs = ((TENSOR_NAMES[f], getattr(self, f)) for f in TENSOR_NAMES)
        return {prefix + name: tensor for name, tensor in pairs if tensor is not None}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], in_features: int, layout: WeightLayout, prefix: str = ""
    ) -> "BinaryWeight":
        """Build a weight from tensors named as :meth:`tensors` names them.

        Raises:
            KeyError: a tensor that ``layout`` asks for is missing.
        """
        named: dict[str, Any] = {
            f: tensors[prefix + n] if n in ("weight", *layout.tensors) else tensors.get(prefix + n)
            for f, n in TENSOR_NAMES.items()
            if n not in OPTIONAL_TENSORS or n in layout.tensors
        }
        return cls(in_features=in_features, group_size=layout.group_size, norm_eps=layout.norm_eps, **named)

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, group_size: int = 0) -> "BinaryWeight":
        """Binarise a dense matrix: ``sign(W)`` and the mean of ``|W|`` per row, or per group of columns.

        The mean absolute value is the scale that minimises the squared error for given signs (XNOR-Net,
        arXiv 1603.05279, equation 6). Zeros become +1.

        Args:
            weight: floating point ``[N, K]``.
            bias: ``[N]`` or None, kept as it is.
            group_size: 0 for one scale per row, or a multiple of 32.
        """
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(
                f"BinaryWeight.from_dense: weight must be a floating point [N, K], "
                f"got {weight.dtype} {tuple(weight.shape)}"
            )
        in_features = weight.shape[1]
        sums = sum_groups(weight.float().abs(), group_size)
        counts = sum_groups(torch.ones(1, in_features, device=weight.device), group_size)
        dtype = weight.dtype if weight.dtype in FLOAT_DTYPES else torch.float32
        return cls(pack_signs(weight), in_features, (sums / counts).to(dtype), bias=bias, group_size=group_size)

    def to(self, *args: Any, **kwargs: Any) -> "BinaryWeight":
        """Move or cast as ``Tensor.to`` does; the sign words are moved and never cast."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        moved: dict[str, Any] = {
            f: None if (t := getattr(self, f)) is None else t.to(device, None if f == "signs" else dtype, non_blocking)
            for f in TENSOR_NAMES
        }
        return BinaryWeight(in_features=self.in_features, group_size=self.group_size, norm_eps=self.norm_eps, **moved)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dense matrix ``[N, K]``, computed in ``dtype``; the norm and the bias are not part of it.

        ``W[n, k] = in_scale[k] * (sum_p scale[p, n, g(k)] * S[p, n, k] + group_shift[n, g(k)]) + in_shift[k]``
        """
        dense: Tensor | float = 0.0
        signs = self.signs if self.signs.dim() == 3 else self.signs.unsqueeze(0)
        for p in range(self.planes):
            plane = unpack_signs(signs[p], self.in_features, dtype)
            if self.scale is not None:
                scale = self.scale if self.scale.dim() == 2 else self.scale[p]
                plane = plane * self._per_column(scale.to(dtype))
            dense = dense + plane
        if self.group_shift is not None:
            dense = dense + self._per_column(
                self.group_shift.to(dtype).view(self.out_features, self.group_shift.shape[-1])
            )
        if self.in_scale is not None:
            dense = dense * self.in_scale.to(dtype).flatten()
        if self.in_shift is not None:
            dense = dense + self.in_shift.to(dtype).flatten()
        assert isinstance(dense, Tensor)
        return dense

    def _per_column(self, grouped: Tensor) -> Tensor:
        """Spread ``[N, G]`` to ``[N, K]``, or leave ``[N, 1]`` to broadcast."""
        if not self.group_size:
            return grouped
        return grouped.repeat_interleave(self.group_size, dim=-1)[..., : self.in_features]


def sum_groups(values: Tensor, group_size: int) -> Tensor:
    """Sum ``[..., K]`` over groups of ``group_size`` columns (0: all of them), the last one possibly shorter."""
    if not group_size:
        return values.sum(-1, keepdim=True)
    padding = -values.shape[-1] % group_size
    return torch.nn.functional.pad(values, (0, padding)).unflatten(-1, (-1, group_size)).sum(-1)
