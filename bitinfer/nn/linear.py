"""BinaryLinear: a drop-in for ``nn.Linear`` that holds packed signs and their scales."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bitinfer.checks import ACT_BITS, BLOCK_SIZE
from bitinfer.ops import binary_linear
from bitinfer.weight import FLOAT_DTYPES, OPTIONAL_TENSORS, BinaryWeight, WeightLayout


class BinaryLinear(nn.Module):
    """Apply ``y = norm(W x) + bias`` with a one-bit W; see :class:`bitinfer.BinaryWeight` for the whole formula.

    ``weight`` holds uint32 sign words; ``weight_scale``, ``in_scale``, ``in_shift``, ``group_shift`` and ``bias`` are
    floating parameters, or None where the layout has none. None of them needs a gradient. ``.to(dtype)`` casts the
    scales and leaves the words.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a bias ``[N]``.
        layout: which tensors there are besides; by default one scale per row.
        act_bits: None computes with activations as they come; 8, 4, 2 or 1 quantises them first.
        act_block: 0 for one activation scale per token, 256 for one per block of 256 columns.
        device, dtype: of the parameters; ``dtype`` of the scales alone.

    Raises:
        ValueError: ``act_bits`` or ``act_block`` is not one of the above.
    """

    # transformers hands quantised layers plain local tensors under tensor parallelism when this is set
    _hf_quantized_needs_local_tp = True

    in_features: int
    weight: nn.Parameter
    weight_scale: nn.Parameter | None
    in_scale: nn.Parameter | None
    in_shift: nn.Parameter | None
    group_shift: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        layout: WeightLayout | None = None,
        act_bits: int | None = None,
        act_block: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if act_bits is not None and act_bits not in ACT_BITS:
            raise ValueError(f"BinaryLinear: act_bits must be None or one of {ACT_BITS}, got {act_bits!r}")
        if act_block not in (0, BLOCK_SIZE):
            raise ValueError(f"BinaryLinear: act_block must be 0 or {BLOCK_SIZE}, got {act_block!r}")
        dtype = dtype or torch.get_default_dtype()
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"BinaryLinear: dtype must be float32, float16 or bfloat16, got {dtype}")
        self.in_features = in_features
        self.out_features = out_features
        self.layout = layout or WeightLayout()
        self.act_bits = act_bits
        self.act_block = act_block
        shapes = self.layout.shapes(in_features, out_features)
        for name in ("weight", *OPTIONAL_TENSORS):
            if name in shapes:
                kind = torch.uint32 if name == "weight" else dtype
                self._set(name, torch.empty(shapes[name], dtype=kind, device=device))
            else:
                self.register_parameter(name, None)
        if bias:
            self._set("bias", torch.empty(out_features, dtype=dtype, device=device))
        else:
            self.register_parameter("bias", None)

    def _set(self, name: str, tensor: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    @classmethod
    def from_weight(cls, weight: BinaryWeight, act_bits: int | None = None, act_block: int = 0) -> "BinaryLinear":
        """Wrap a packed weight; its tensors are shared, not copied."""
        module = cls(
            weight.in_features,
            weight.out_features,
            weight.bias is not None,
            layout=weight.layout,
            act_bits=act_bits,
            act_block=act_block,
            device="meta",
        )
        for name, tensor in weight.tensors().items():
            module._set(name, tensor.detach())
        return module

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, act_bits: int | None = None, act_block: int = 0, group_size: int = 0
    ) -> "BinaryLinear":
        """Binarise a dense layer: the signs of its weight and the mean absolute value per row (or group of columns).

        Lossless if the weight already takes two values ``+s`` and ``-s`` per row or group; an approximation otherwise.

        Raises:
            ValueError: the weight is on the meta device, or not a floating point matrix.
        """
        if linear.weight.is_meta:
            raise ValueError("BinaryLinear.from_linear: the layer is on the meta device and has no values to pack")
        bias = None if linear.bias is None else linear.bias.detach()
        weight = BinaryWeight.from_dense(linear.weight.detach(), bias, group_size)
        return cls.from_weight(weight, act_bits, act_block).train(linear.training)

    @property
    def binary_weight(self) -> BinaryWeight:
        """The parameters as a :class:`bitinfer.BinaryWeight`, sharing memory."""
        named = {n: p.detach() for n, p in self.named_parameters(recurse=False)}
        return BinaryWeight.from_tensors(named, self.in_features, self.layout)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return a dense module that computes the same: an ``nn.Linear``, followed by a LayerNorm if there is one.

        Args:
            dtype: of the dense weight; by default that of the scales, or the default dtype where there are none.
        """
        weight = self.binary_weight
        scales = [t for name, t in weight.tensors().items() if name != "weight"]
        dtype = dtype or (scales[0].dtype if scales else torch.get_default_dtype())
        has_bias = weight.bias is not None and weight.norm_eps is None  # a norm's bias comes after it
        linear = nn.Linear(self.in_features, self.out_features, bias=has_bias, device="meta")
        linear.weight = nn.Parameter(weight.to_dense(torch.float32).to(dtype), requires_grad=False)
        if weight.norm_eps is None:
            if weight.bias is not None:
                linear.bias = nn.Parameter(weight.bias.to(dtype, copy=True), requires_grad=False)
            return linear.train(self.training)
        # LayerNorm without a scale: ones for its weight, so that its bias can be ours
        norm = nn.LayerNorm(self.out_features, eps=weight.norm_eps, device=weight.signs.device, dtype=dtype)
        if weight.bias is not None:
            norm.bias = nn.Parameter(weight.bias.to(dtype, copy=True))
        return nn.Sequential(linear, norm.requires_grad_(False)).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., out_features]`` in the dtype of ``x [..., in_features]``."""
        return binary_linear(x, self, self.act_bits, self.act_block)

    # the names under which binary_linear() reads a weight
    @property
    def signs(self) -> Tensor:
        return self.weight

    @property
    def scale(self) -> Tensor | None:
        return self.weight_scale

    @property
    def group_size(self) -> int:
        return self.layout.group_size

    @property
    def norm_eps(self) -> float | None:
        return self.layout.norm_eps

    # torch's pickle of a bare tensor knows no uint32, so the words travel as int32; copies need no such detour
    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        words = self.weight.detach()
        state["_parameters"] = {**self._parameters, "weight": words if words.is_meta else words.view(torch.int32)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        words = self._parameters["weight"]
        assert words is not None
        self._set("weight", words.detach() if words.is_meta else words.detach().view(torch.uint32))

    def __deepcopy__(self, memo: dict[int, Any]) -> "BinaryLinear":
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}", f"out_features={self.out_features}"]
        parts.append(f"bias={self.bias is not None}")
        if self.layout.planes > 1:
            parts.append(f"planes={self.layout.planes}")
        if self.layout.group_size:
            parts.append(f"group_size={self.layout.group_size}")
        if self.layout.tensors:
            parts.append(f"tensors=({', '.join(self.layout.tensors)})")
        if self.layout.norm_eps is not None:
            parts.append(f"norm_eps={self.layout.norm_eps}")
        parts.append("activations=" + ("fp" if self.act_bits is None else f"int{self.act_bits}"))
        if self.act_block:
            parts.append(f"act_block={self.act_block}")
        return ", ".join(parts)
