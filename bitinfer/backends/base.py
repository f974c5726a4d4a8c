"""The contract of a backend, and the description of a problem that it is asked about."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Problem(NamedTuple):
    """One call of an op, as far as the choice of a backend depends on it.

    Attributes:
        op: ``pack_signs``, ``pack_activations``, ``sign_gemm`` or ``popcount_gemm``.
        device: device type, ``"cpu"`` or ``"cuda"``.
        dtype: dtype of the floating point input, or of the output for ``popcount_gemm``.
        bits: bits of an integer activation; 0 for floating point ones.
        m, n, k: tokens, output features and input features; 0 where the op has none.
        planes: sign planes of the weight.
        group_size: columns that share a weight scale; 0 for all.
    """

    op: str
    device: str
    dtype: torch.dtype
    bits: int = 0
    m: int = 0
    n: int = 0
    k: int = 0
    planes: int = 1
    group_size: int = 0


class Backend(ABC):
    """One way to compute the ops. Arguments and results are those of :mod:`bitinfer.ops`, already checked."""

    name: str

    @abstractmethod
    def unavailable(self) -> str | None:
        """Return why this backend cannot run on this machine at all, or None if it can."""

    @abstractmethod
    def unsupported(self, problem: Problem) -> str | None:
        """Return why this backend cannot run ``problem``, or None if it can."""

    def traced(self, op: str) -> Callable[..., Any] | None:
        """Return the op that ``torch.compile`` is given in place of ``op``, to see inside; None leaves it opaque."""
        return None

    @abstractmethod
    def pack_signs(self, weight: Tensor) -> Tensor: ...

    @abstractmethod
    def pack_activations(
        self, x: Tensor, in_scale: Tensor | None, in_shift: Tensor | None, bits: int, block_size: int, group_size: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    @abstractmethod
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
    ) -> Tensor: ...

    @abstractmethod
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
    ) -> Tensor: ...

    # fused where a backend overrides these; else torch's own kernels come ahead of pack_activations
    def rms_norm_pack_activations(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        in_scale: Tensor | None,
        in_shift: Tensor | None,
        bits: int,
        block_size: int,
        group_size: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        hidden = x if residual is None else x + residual
        wide = hidden.float()
        normalised = (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
        packed = self.pack_activations(norm_weight * normalised, in_scale, in_shift, bits, block_size, group_size)
        return (*packed, x.new_empty(0) if residual is None else hidden)

    def silu_mul_pack_activations(
        self,
        gate: Tensor,
        up: Tensor,
        in_scale: Tensor | None,
        in_shift: Tensor | None,
        bits: int,
        block_size: int,
        group_size: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.pack_activations(F.silu(gate) * up, in_scale, in_shift, bits, block_size, group_size)
