"""Student layers: binary in the forward pass, with latent float weights that gradients move.

They stand in for ``nn.Linear`` during training, hold their parameters under the names of the published checkpoints, and
give their packed form at any time. A latent zero counts as +1, as a packed bit does, so that a student computes what it
will compute once packed.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitinfer.formats.latent import svid
from bitinfer.formats.onebit import NORM_EPS
from bitinfer.nn.linear import BinaryLinear
from bitinfer.nn.replace import ReplaceReport, _reasons_to_skip, model_bytes
from bitinfer.packing import pack_signs
from bitinfer.weight import BinaryWeight

Method = Literal["fbi", "onebit"]
METHODS: tuple[Method, ...] = ("fbi", "onebit")
ONEBIT_LATENT = 0.01  # magnitude of the latent weights that OneBit's scripts start from


def sign_identity(weight: Tensor) -> Tensor:
    """Return ``sign(w)`` with the gradient of the identity (FBI-LLM's straight-through estimator).

    The gradient is carried by a difference that is exactly zero rather than by an ``autograd.Function``, which not
    every release of torch compiles right.
    """
    return _signs(weight) + (weight - weight.detach())


def sign_tanh(weight: Tensor) -> Tensor:
    """Return ``sign(w)`` with OneBit's gradient ``1.001 - tanh(w)^2``: that of tanh, kept above zero."""
    fixed = weight.detach()
    return _signs(weight) + (weight - fixed) * (1.001 - torch.tanh(fixed).square())


def _signs(weight: Tensor) -> Tensor:
    return torch.where(weight < 0, -1.0, 1.0).to(weight.dtype)


class StudentLinear(nn.Module):
    """What both student layers share: a latent weight ``[N, K]``, an optional bias ``[N]``, and a packed form."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach().float().clone())
        if linear.bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(linear.bias.detach().float().clone())

    def to_packed(self) -> BinaryWeight:
        """Return the layer as signs and scales, detached copies of what it holds now."""
        raise NotImplementedError

    def _packed_bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.detach().clone()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class FBILinear(StudentLinear):
    """FBI-LLM's layer ``y = (alpha * sign(W) + beta) x + bias`` (arXiv 2407.07093), scales per input column.

    ``weight [N, K]`` is latent, ``wscale`` (alpha) and ``wbias`` (beta) are ``[1, K]``: the names of the released
    checkpoints. The gradient passes the sign as if it were the identity. alpha and beta start as the paper's: beta the
    column means of ``W``, alpha the mean absolute deviation from them.

    Args:
        linear: the dense layer to start from; it is copied, in float32.
        latent_std: rescale the latent weights to this standard deviation once alpha and beta are taken from them; only
            their ratio to the learning rate matters then. None leaves them.
    """

    def __init__(self, linear: nn.Linear, latent_std: float | None = None) -> None:
        super().__init__(linear)
        with torch.no_grad():
            mean = self.weight.mean(0, keepdim=True)
            self.wscale = nn.Parameter((self.weight - mean).abs().mean(0, keepdim=True))
            self.wbias = nn.Parameter(mean.clone())
            if latent_std is not None:
                self.weight.mul_(latent_std / self.weight.std().clamp_min(1e-12))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., N]`` for ``x [..., K]``."""
        return F.linear(x, self.wscale * sign_identity(self.weight) + self.wbias, self.bias)

    def to_packed(self) -> BinaryWeight:
        alpha, beta = self.wscale.detach().clone(), self.wbias.detach().clone()
        signs = pack_signs(self.weight.detach())
        return BinaryWeight(signs, self.in_features, in_scale=alpha, in_shift=beta, bias=self._packed_bias())


class OneBitLinear(StudentLinear):
    """OneBit's layer ``y = LayerNorm_N(h * (sign(W) (g * x))) + bias`` (arXiv 2402.11295).

    ``weight [N, K]`` is latent, ``input_factor`` (g) is ``[K]`` and ``weight_scale`` (h) ``[N]``: the names of its
    checkpoints. The LayerNorm has no parameters. The gradient passes the sign as ``1.001 - tanh(W)^2``.

    Args:
        linear: the dense layer to start from; it is copied, in float32.
        start: "nmf" and "svd" decompose its weight by SVID, ``|W| ~ h g^T``, with latent weights of +-0.01, as OneBit's
            scripts do (with "nmf"); "ones" keeps the latent weights and starts g and h at 1.

    Raises:
        ValueError: ``start`` is none of these.
    """

    def __init__(self, linear: nn.Linear, start: str = "nmf") -> None:
        if start not in ("nmf", "svd", "ones"):
            raise ValueError(f"OneBitLinear: start must be nmf, svd or ones, got {start!r}")
        super().__init__(linear)
        device = linear.weight.device
        if start == "ones":
            h, g = torch.ones(self.out_features), torch.ones(self.in_features)
        else:
            h, g = svid(linear.weight.detach().cpu(), "nmf" if start == "nmf" else "svd")
            with torch.no_grad():
                self.weight.copy_(torch.where(self.weight < 0, -ONEBIT_LATENT, ONEBIT_LATENT))
        self.weight_scale = nn.Parameter(h.to(device))
        self.input_factor = nn.Parameter(g.to(device))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., N]`` for ``x [..., K]``."""
        y = F.linear(x * self.input_factor, sign_tanh(self.weight)) * self.weight_scale
        y = F.layer_norm(y, (self.out_features,), eps=NORM_EPS)
        return y if self.bias is None else y + self.bias

    def to_packed(self) -> BinaryWeight:
        return BinaryWeight(
            pack_signs(self.weight.detach()),
            self.in_features,
            scale=self.weight_scale.detach().unsqueeze(1).clone(),
            in_scale=self.input_factor.detach().unsqueeze(0).clone(),
            bias=self._packed_bias(),
            norm_eps=NORM_EPS,
        )


def make_student(
    model: nn.Module,
    method: Method,
    *,
    skip: tuple[str, ...] = ("lm_head",),
    latent_std: float | None = None,
    start: str = "nmf",
) -> ReplaceReport:
    """Replace the linear layers of ``model`` by student layers, in place, and report as ``replace_linear`` does.

    The same layers are replaced and left as by :func:`bitinfer.replace_linear`: names that ``skip`` matches, weights
    tied to an embedding and subclasses of ``nn.Linear`` stay.

    Args:
        model: any module that holds ``nn.Linear`` layers.
        method: "fbi" for :class:`FBILinear`, "onebit" for :class:`OneBitLinear`.
        skip: see :func:`bitinfer.replace_linear`.
        latent_std: of :class:`FBILinear`.
        start: of :class:`OneBitLinear`.

    Raises:
        ValueError: ``method`` is neither, or no layer could be replaced.
    """
    if method not in METHODS:
        raise ValueError(f"make_student: method must be one of {', '.join(METHODS)}, got {method!r}")
    report = ReplaceReport(bytes_before=model_bytes(model))
    reasons = _reasons_to_skip(model, skip)
    layers: dict[int, StudentLinear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, nn.Linear):
            continue
        if id(module) in reasons:
            report.skipped[name] = reasons[id(module)]
            continue
        if id(module) not in layers:
            new = FBILinear(module, latent_std) if method == "fbi" else OneBitLinear(module, start)
            layers[id(module)] = new.train(module.training)
        model.set_submodule(name, layers[id(module)])
        report.replaced.append(name)
    if not report.replaced:
        raise ValueError(f"make_student: model has no linear layer to replace (skip={skip})")
    report.bytes_after = model_bytes(model)
    return report


def pack_students(model: nn.Module, act_bits: int | None = None, act_block: int = 0) -> list[str]:
    """Replace every student layer by a :class:`bitinfer.BinaryLinear` of the same function; return their names."""
    names = []
    for name, module in list(model.named_modules()):
        if isinstance(module, StudentLinear):
            packed = BinaryLinear.from_weight(module.to_packed(), act_bits, act_block)
            model.set_submodule(name, packed.train(module.training))
            names.append(name)
    return names


def student_layers(model: nn.Module) -> Iterator[tuple[str, StudentLinear]]:
    """Yield the student layers of a model with their dotted names."""
    for name, module in model.named_modules():
        if isinstance(module, StudentLinear):
            yield name, module


def latent_signs(model: nn.Module) -> list[Tensor]:
    """Return which latent weights are negative, one boolean ``[N, K]`` a layer."""
    return [layer.weight.detach() < 0 for _, layer in student_layers(model)]


def flip_ratio(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """Return the flip-flop ratio of FBI-LLM: the share of latent weights whose sign changed, a 0-d float32 tensor."""
    flips = torch.stack([(a != b).sum() for a, b in zip(before, after, strict=True)]).sum()
    return flips.float() / max(sum(a.numel() for a in before), 1)
