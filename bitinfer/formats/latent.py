"""Any dense model, approximated: the signs of each linear weight and scales that fit its magnitudes.

Nothing is detected as this format, for it changes the model: most models need distillation afterwards.

- ``absmean``: the mean of ``|W|`` per row or group, the best scale for given signs (XNOR-Net, arXiv 1603.05279, eq. 6).
- ``nmf``, ``svd``: OneBit's sign-value-independent decomposition (arXiv 2402.11295, section 3.2): ``|W| ~ h g^T`` by a
  non-negative factorisation of rank one or by the first singular vectors, hence ``W ~ h S g``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bitinfer.checkpoint import Checkpoint
from bitinfer.formats.base import Format, dense_linear, get_bias, get_tensor, pack_latent, row_chunks
from bitinfer.formats.modules import linear_names
from bitinfer.weight import BinaryWeight, group_count, sum_groups

Method = Literal["absmean", "nmf", "svd"]
METHODS: tuple[Method, ...] = ("absmean", "nmf", "svd")


@dataclass(frozen=True)
class Latent(Format):
    """Sign and scale of dense weights.

    Attributes:
        method: how the magnitudes are fitted, see above.
        group_size: columns that share a scale, a multiple of 32, or 0 for a whole row; ``absmean`` alone.
    """

    name = "latent"
    description = "any dense model, approximated by sign and scale (absmean, nmf or svd); has to be asked for"
    approximates = True

    method: Method = "absmean"
    group_size: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"latent: method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.group_size and self.method != "absmean":
            raise ValueError(f"latent: group_size={self.group_size} needs method 'absmean', got {self.method!r}")

    def matches(self, checkpoint: Checkpoint) -> bool:
        return False

    def layer_names(self, checkpoint: Checkpoint) -> list[str]:
        return linear_names(checkpoint, self.config(checkpoint))

    def read_counted(self, tensors: Mapping[str, Tensor], prefix: str) -> tuple[BinaryWeight, int]:
        name = f"{prefix}.weight"
        weight = get_tensor(tensors, name)
        signs, zeros = pack_latent(weight, name, self.zero_limit)
        rows, columns = weight.shape
        bias = get_bias(tensors, prefix, rows)
        if self.method == "absmean":
            group_size = self.group_size if self.group_size < columns else 0
            scale = _absmean(weight, group_size)
            return BinaryWeight(signs, columns, scale, bias=bias, group_size=group_size), zeros
        h, g = svid(weight, self.method)
        scale, in_scale = h.unsqueeze(1).to(weight.dtype), g.unsqueeze(0).to(weight.dtype)
        return BinaryWeight(signs, columns, scale, in_scale, bias=bias), zeros

    def reference_linear(self, tensors: Mapping[str, Tensor], prefix: str) -> nn.Module:
        """Return the approximation, dense: what the packed layer should compute."""
        weight = get_tensor(tensors, f"{prefix}.weight").float()
        bias = tensors.get(f"{prefix}.bias")
        signs = torch.where(weight < 0, -1.0, 1.0)
        if self.method != "absmean":
            h, g = svid(weight, self.method)
            return dense_linear(h.unsqueeze(1) * signs * g.unsqueeze(0), bias)
        size = self.group_size or weight.shape[1]
        means = torch.cat([part.abs().mean(1, keepdim=True).expand_as(part) for part in weight.split(size, 1)], 1)
        return dense_linear(signs * means, bias)


def _absmean(weight: Tensor, group_size: int) -> Tensor:
    scale = torch.empty(weight.shape[0], group_count(weight.shape[1], group_size), dtype=weight.dtype)
    counts = sum_groups(torch.ones(1, weight.shape[1]), group_size)
    for start, rows in row_chunks(weight):
        scale[start : start + len(rows)] = sum_groups(rows.float().abs(), group_size) / counts
    return scale


def svid(weight: Tensor, method: Method) -> tuple[Tensor, Tensor]:
    """Fit ``|W| ~ h g^T`` and return ``(h [N], g [K])``, float32 and non-negative.

    ``nmf`` is the recipe of OneBit's scripts (one component, random start from seed 0); ``svd`` gives the least squares
    fit. Both factors get the same mean: their product is small, and as a pair they stay clear of the ends of float16.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.decomposition import NMF, TruncatedSVD
    except ImportError:
        raise ImportError(f"method {method!r} needs scikit-learn: pip install scikit-learn") from None
    magnitudes = weight.float().abs().numpy()
    if not magnitudes.any():
        return torch.zeros(weight.shape[0]), torch.zeros(weight.shape[1])
    if method == "nmf":
        model = NMF(n_components=1, init="random", random_state=0)
        h, g = model.fit_transform(magnitudes)[:, 0], model.components_[0]
    else:
        svd = TruncatedSVD(n_components=1, random_state=0)
        h, g = svd.fit_transform(magnitudes)[:, 0], svd.components_[0]
        # the first singular vectors of a non-negative matrix are non-negative (Perron-Frobenius) but for a common sign
        h, g = abs(h), abs(g)
    balance = (h.mean() / g.mean()) ** 0.5
    return torch.from_numpy(h / balance).float(), torch.from_numpy(g * balance).float()
