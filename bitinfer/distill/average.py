"""Average checkpoints before the sign is taken: SWA, EMA, LAWA, and WARM's mean of separately trained models.

A binary weight has no mean, but its latent weight does: ``sign(mean of W)`` is a vote weighted by confidence. The scale
of a column may be negative, and ``(alpha, S)`` and ``(-alpha, -S)`` are the same column, so first every scale is made
non-negative by turning the column round; otherwise two equal models can average to nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bitinfer.checkpoint import Checkpoint
from bitinfer.errors import FormatError
from bitinfer.formats import FORMATS
from bitinfer.output_folder import new_folder

Kind = Literal["swa", "ema", "lawa", "warm"]
KINDS: tuple[Kind, ...] = ("swa", "ema", "lawa", "warm")


@dataclass
class AverageReport:
    """What :func:`average_checkpoints` did.

    Attributes:
        path: the new folder.
        weights: how much each source counts; they sum to 1.
        turned: share of scales that were negative, over all sources.
        flipped: for each source, the share of its signs that the average does not keep.
        layers: binary layers that were averaged.
    """

    path: Path
    weights: list[float]
    turned: float = 0.0
    flipped: list[float] = field(default_factory=list)
    layers: int = 0

    def __str__(self) -> str:
        shares = ", ".join(f"{share:.2%}" for share in self.flipped)
        return (
            f"averaged {len(self.weights)} checkpoints, {self.layers} binary layers; {self.turned:.2%} of the scales "
            f"were negative and turned round; signs that differ from the average's: {shares}: {self.path}"
        )


def source_weights(kind: Kind, count: int, *, decay: float = 0.9, last: int = 5) -> list[float]:
    """Return how much each of ``count`` checkpoints, the oldest first, counts in an average.

    - "swa" (arXiv 1803.05407) and "warm" (arXiv 2401.12187): all alike; the first over one run, the second over models
      trained separately from one start.
    - "ema": ``m = decay * m + (1 - decay) * w``, in order, from the first on.
    - "lawa" (arXiv 2209.14981): the ``last`` ones alike, the others not at all.

    Raises:
        ValueError: ``kind`` is unknown, or a number is out of range.
    """
    if kind not in KINDS:
        raise ValueError(f"average: method must be one of {', '.join(KINDS)}, got {kind!r}")
    if count < 1 or not 0 <= decay < 1 or last < 1:
        raise ValueError(f"average: count, decay or last is out of range: {count}, {decay}, {last}")
    if kind == "ema":
        return [decay ** (count - 1 - i) * (1 - decay if i else 1.0) for i in range(count)]
    used = min(last, count) if kind == "lawa" else count
    return [0.0] * (count - used) + [1 / used] * used


def average_checkpoints(
    sources: Sequence[str | Path],
    dst: str | Path,
    *,
    method: Kind = "swa",
    decay: float = 0.9,
    last: int = 5,
    overwrite: bool = False,
) -> AverageReport:
    """Average folders with latent weights, FBI-LLM's or OneBit's, into a folder of the same layout.

    Tensors are read one by one; what is not binary (embedding, head, norms) is averaged too, all in float32.

    Args:
        sources: the folders, the oldest first.
        dst: the folder to make.
        method, decay, last: see :func:`source_weights`.
        overwrite: replace ``dst``.

    Raises:
        FormatError: a folder holds no latent weights, or the folders do not hold the same tensors.
        FileExistsError: ``dst`` is there and ``overwrite`` is False.
    """
    if len(sources) < 2:
        raise ValueError(f"average: expected at least two checkpoints, got {len(sources)}")
    dst = Path(dst)
    if dst.exists() and not overwrite:
        raise FileExistsError(17, "the folder exists; pass overwrite=True, or another folder", str(dst))
    weights = source_weights(method, len(sources), decay=decay, last=last)
    checkpoints = [Checkpoint(source) for source in sources]
    layers = _layers(checkpoints)
    report = AverageReport(dst, weights, layers=len(layers))
    turned = scales = signs = 0
    differing = [0] * len(sources)
    state: dict[str, Tensor] = {}
    for name, (column, row) in layers.items():
        parts = []
        for checkpoint in checkpoints:
            weight, by_column, by_row = (
                None if part is None else checkpoint[part].float() for part in (f"{name}.weight", column, row)
            )
            assert weight is not None
            for scale, lead in ((by_column, 0), (by_row, 1)):
                if scale is not None:
                    turn = torch.where(scale < 0, -1.0, 1.0)
                    weight = weight * turn.reshape((1, -1) if lead == 0 else (-1, 1))
                    turned, scales = turned + int((scale < 0).sum()), scales + scale.numel()
            parts.append(weight)
        mean = _mean(parts, weights)
        state[f"{name}.weight"] = mean
        signs += mean.numel()
        for index, part in enumerate(parts):
            differing[index] += int(((part < 0) != (mean < 0)).sum())
        for scale_name in (column, row):
            if scale_name is not None:
                state[scale_name] = _mean([c[scale_name].float().abs() for c in checkpoints], weights)
    for name in checkpoints[0]:
        if name not in state:
            state[name] = _mean([c[name].float() for c in checkpoints], weights)
    report.turned = turned / max(scales, 1)
    report.flipped = [count / max(signs, 1) for count in differing]
    with new_folder(dst, overwrite) as partial:
        torch.save({name: state[name].clone() for name in checkpoints[0]}, partial / "pytorch_model.bin")
        (partial / "config.json").write_text(json.dumps(checkpoints[-1].config, indent=2) + "\n")
        for file in checkpoints[-1].aux_files():
            (partial / file.name).write_bytes(file.read_bytes())
    return report


def _layers(checkpoints: list[Checkpoint]) -> dict[str, tuple[str | None, str | None]]:
    """Return for every binary layer the names of its scale by column and of its scale by row."""
    first = checkpoints[0]
    for other in checkpoints[1:]:
        shapes = [{name: c.shape(name) for name in c} for c in (first, other)]
        if shapes[0] != shapes[1]:
            names = sorted(n for n in {*shapes[0], *shapes[1]} if shapes[0].get(n) != shapes[1].get(n))
            raise FormatError(
                f"average: {first.path} and {other.path} hold different tensors ({', '.join(names[:3])}); only "
                "checkpoints of one model can be averaged"
            )
    for name in ("onebit", "fbi_llm"):
        if FORMATS[name].matches(first):
            stems = FORMATS[name].layer_names(first)
            break
    else:
        raise FormatError(f"{first.path}: expected an FBI-LLM or OneBit checkpoint with latent weights")
    for stem in stems:
        if not first[f"{stem}.weight"].is_floating_point():
            raise FormatError(
                f"{first.path}: {stem}.weight holds packed signs, which have no mean; average the latent checkpoints"
            )
    if name == "onebit":
        return {stem: (f"{stem}.input_factor", f"{stem}.weight_scale") for stem in stems}
    return {stem: _fbi_scales(first, stem) for stem in stems}


def _fbi_scales(checkpoint: Checkpoint, stem: str) -> tuple[str | None, str | None]:
    scale = f"{stem}.wscale"
    rows = checkpoint.shape(f"{stem}.weight")[0]
    return (None, scale) if checkpoint.shape(scale) == (rows, 1) else (scale, None)


def _mean(parts: list[Tensor], weights: list[float]) -> Tensor:
    total = torch.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        total += weight * part
    return total
