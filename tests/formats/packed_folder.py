"""Read a packed folder with safetensors and numpy alone: what the tests compare bitinfer's writing with."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor


def load_packed(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all tensors of a folder and its config.json."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors, json.loads((folder / "config.json").read_text())


def signs_of(words: Tensor, columns: int) -> Tensor:
    """Return the float64 signs that uint32 words hold: bit j of word w is column 32 w + j, set for -1."""
    assert words.dtype == torch.uint32
    octets = words.contiguous().view(torch.uint8).numpy()
    bits = np.unpackbits(octets, axis=-1, bitorder="little")
    assert not bits[..., columns:].any(), "bits past the last column must be 0"
    return torch.from_numpy(1.0 - 2.0 * bits[..., :columns])


def sign(weight: Tensor) -> Tensor:
    """Return the float64 signs of a latent weight, +1 for zero."""
    return torch.where(weight < 0, -1.0, 1.0).double()


def linears(tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of the linear layers of a LLaMA or Qwen3 decoder."""
    return [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]
