"""A student in few bits, to go on training elsewhere: latent weights in 4 bits, everything else as it is.

What matters of a latent weight is its sign and how far it is from turning. Both fit into 4 bits: the sign, and one of
eight magnitudes ``s * ((c + 0.5) / 8)^2`` whose steps are finest near zero, with ``s`` the largest of the row. The
student that comes back computes exactly what the one that was stored does; only the optimizer's moments are lost, so
training goes on with a warm-up.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitinfer.distill.students import student_layers
from bitinfer.errors import FormatError

LEVELS = 8
MAX_BYTES = 15 << 20
INDEX = "snapshot.json"


def encode_latent(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(uint8 [N, ceil(K/2)], float32 [N, 1])``: two weights to a byte, the first in the low half."""
    largest = weight.abs().amax(1, keepdim=True).clamp_min(1e-12)
    level = ((weight.abs() / largest).sqrt() * LEVELS).floor().clamp(0, LEVELS - 1).to(torch.uint8)
    codes = torch.nn.functional.pad(level | ((weight < 0).to(torch.uint8) << 3), (0, weight.shape[1] % 2))
    return codes[:, 0::2] | (codes[:, 1::2] << 4), largest


def decode_latent(codes: Tensor, largest: Tensor, in_features: int) -> Tensor:
    """Invert :func:`encode_latent` up to the rounding of magnitudes: float32 ``[N, in_features]``."""
    pairs = torch.stack([codes & 15, codes >> 4], -1).flatten(1)[:, :in_features]
    magnitude = largest * (((pairs & 7).float() + 0.5) / LEVELS).square()
    return torch.where(pairs >= LEVELS, -magnitude, magnitude)


def save_snapshot(student: Any, folder: str | Path, *, max_bytes: int = MAX_BYTES, about: Any = None) -> list[Path]:
    """Write a student into files of at most about ``max_bytes``; return them. A folder that is there is replaced.

    The embedding and the head are stored in bfloat16, vectors in float32.
    """
    latent = {f"{name}.weight" for name, _ in student_layers(student)}
    files: list[dict[str, Tensor]] = [{}]
    size = 0
    seen: set[int] = set()
    for name, tensor in student.state_dict().items():
        if tensor.data_ptr() in seen:  # tied
            continue
        seen.add(tensor.data_ptr())
        tensor = tensor.detach().cpu()
        if name in latent:
            codes, largest = encode_latent(tensor)
            parts = {f"{name}.codes": codes, f"{name}.largest": largest}
        else:
            parts = {name: tensor.bfloat16() if tensor.dim() == 2 and min(tensor.shape) > 1 else tensor}
        added = sum(t.nbytes for t in parts.values())
        if size and size + added > max_bytes:
            files.append({})
            size = 0
        files[-1] |= {key: part.contiguous() for key, part in parts.items()}
        size += added
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, tensors in enumerate(files):
        save_file(tensors, partial / f"latent-{number}.safetensors")
    (partial / INDEX).write_text(json.dumps({"files": len(files), "about": about}) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return sorted(folder.iterdir())


def load_snapshot(student: Any, folder: str | Path) -> Any:
    """Put what :func:`save_snapshot` stored into a student of the same shape; return what was noted with it.

    Raises:
        FormatError: a file is missing, or the shapes differ.
    """
    folder = Path(folder)
    index = json.loads((folder / INDEX).read_text())
    stored: dict[str, Tensor] = {}
    for number in range(index["files"]):
        file = folder / f"latent-{number}.safetensors"
        if not file.exists():
            raise FormatError(f"{file}: this file of the snapshot is missing")
        stored |= load_file(file)
    state = student.state_dict()
    latent = {f"{name}.weight" for name, _ in student_layers(student)}
    tied = {n for n in state if n not in stored and n not in latent}
    if tied - ({"lm_head.weight"} if student.config.tie_word_embeddings else set()):
        raise FormatError(f"{folder}: the snapshot is of another student; it lacks {sorted(tied)[:3]}")
    loaded = {name: stored[name].float() for name in state if name in stored}
    for name in latent:
        loaded[name] = decode_latent(stored[f"{name}.codes"], stored[f"{name}.largest"], state[name].shape[1])
    wrong = [name for name, tensor in loaded.items() if tensor.shape != state[name].shape]
    if wrong:
        raise FormatError(f"{folder}: the snapshot is of another shape ({wrong[0]})")
    student.load_state_dict(loaded, strict=False)
    return index["about"]
