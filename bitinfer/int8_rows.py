"""Embeddings and heads in 8 bits: int8 codes ``[V, D]`` with a float32 scale per row.

One bit per weight leaves a small model with an embedding that outweighs the rest. In a packed folder the codes stand
under the matrix's own name and the scales under ``<name>.row_scale``; loading makes floats of them again.
"""

import torch
from torch import Tensor

ROW_SCALE = ".row_scale"
DEVICES = ("cpu", "cuda")  # whose backends, of the same names, have compiled kernels
SMALLEST_SCALE = 2.0**-126  # rows of zeros get it


def round_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(codes int8 [V, D], scale float32 [V, 1])`` with ``codes * scale`` nearest to ``matrix [V, D]``.

    The largest magnitude of a row becomes 127.
    """
    wide = matrix.float()
    scale = (wide.abs().amax(1, keepdim=True) / 127).clamp_min(SMALLEST_SCALE)
    return (wide / scale).round().to(torch.int8), scale


def restore_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 matrix ``[V, D]`` that codes and scales stand for."""
    return codes.float() * scale.float()


def restore_all(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return named tensors with every matrix in 8 bits made float32, and no scales of rows."""
    scales = {name.removesuffix(ROW_SCALE): t for name, t in tensors.items() if name.endswith(ROW_SCALE)}
    kept = {name: t for name, t in tensors.items() if not name.endswith(ROW_SCALE)}
    return kept | {name: restore_rows(kept[name], scale) for name, scale in scales.items()}


class RowsLinear:
    """A linear layer whose rows are rounded to 8 bits: ``y = (codes x) * scale``, sums in float32.

    Args:
        weight: floating ``[V, K]``; it is rounded here, and not kept.

    Raises:
        ValueError: there are no compiled kernels for the device that it is on.
    """

    def __init__(self, weight: Tensor) -> None:
        from bitinfer.dispatch import BACKENDS

        device = weight.device.type
        reason = BACKENDS[device].unavailable() if device in DEVICES else f"the model is on {device}"
        if reason is not None:
            raise ValueError(f"a head in 8 bits is for CPUs and NVIDIA GPUs with compiled kernels alone: {reason}")
        codes, scale = round_rows(weight.detach())
        self.codes, self.scale = codes.contiguous(), scale.flatten()

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``[..., V]`` in the dtype of ``x [..., K]``."""
        y: Tensor = torch.ops.bitinfer_native.rows_linear(x, self.codes, self.scale)
        return y
