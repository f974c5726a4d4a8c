"""Weight files opened lazily: safetensors, and ``torch.save`` files that hold nothing but tensors."""

import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitinfer.errors import FormatError

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
ZIP_MAGIC = b"PK\x03\x04"
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that is not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFile(Protocol):
    """An open weight file."""

    path: Path

    def infos(self) -> dict[str, TensorInfo]:
        """Return shape and dtype of every tensor by name."""
        ...

    def tensor(self, name: str) -> Tensor:
        """Return one tensor."""
        ...


def open_weight_file(path: Path) -> WeightFile:
    """Open a ``.safetensors`` file, or any other as one of ``torch.save``.

    Raises:
        FormatError: it is truncated, damaged, a Git LFS pointer, or holds more than tensors.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(LFS_POINTER):
        raise FormatError(f"{path}: a Git LFS pointer, not the weights themselves; run: git lfs pull")
    return _Safetensors(path) if path.suffix == ".safetensors" else _TorchSave(path, head)


class _Safetensors:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, "pt")
        except SafetensorError as error:
            raise FormatError(f"{path}: truncated or damaged safetensors file ({error}); download it again") from None

    def infos(self) -> dict[str, TensorInfo]:
        result = {}
        for name in self._file.keys():  # noqa: SIM118 (safe_open is not iterable)
            part = self._file.get_slice(name)
            kind = part.get_dtype()
            if kind not in SAFETENSORS_DTYPES:
                raise FormatError(f"{self.path}: tensor {name} has dtype {kind}, which is not supported")
            result[name] = TensorInfo(tuple(part.get_shape()), SAFETENSORS_DTYPES[kind])
        return result

    def tensor(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


class _TorchSave:
    """A pickle restricted to tensors (``weights_only``); mapped unless it is in the old format without a zip."""

    def __init__(self, path: Path, head: bytes) -> None:
        self.path = path
        try:
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(ZIP_MAGIC))
        except pickle.UnpicklingError as error:
            foreign = re.search(r"GLOBAL (\S+)", str(error))
            if foreign is None:
                raise FormatError(
                    f"{path}: damaged, or no file that torch.save wrote with tensors alone; download it again, or get "
                    "the weights as safetensors"
                ) from None
            raise FormatError(
                f"{path}: holds Python objects that are not tensors ({foreign[1]}), or is damaged; it is not loaded, "
                "since unpickling could run any code: get the weights as safetensors, or load it where you trust it "
                "and save its tensors alone"
            ) from None
        except (OSError, MemoryError):
            raise
        except Exception as error:  # the old format's reader raises whatever the broken bytes lead to
            text = str(error).strip().splitlines()
            raise FormatError(
                f"{path}: truncated or damaged ({text[0] if text else type(error).__name__}); download it again"
            ) from None
        self._tensors = _state_dict(values, path)

    def infos(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()


def _state_dict(values: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict, or of the one inside a trainer's checkpoint."""
    nested = isinstance(values, dict) and isinstance(values.get("state_dict"), dict)
    if nested:
        values = values["state_dict"]
    if not isinstance(values, dict) or not any(isinstance(v, Tensor) for v in values.values()):
        held = (
            f"{type(values).__name__} with {', '.join(map(str, list(values)[:5]))}" if isinstance(values, dict) else ""
        )
        raise FormatError(
            f"{path}: expected a state dict (names and tensors), got {held}; save model.state_dict() itself"
        )
    tensors = {str(name): value for name, value in values.items() if isinstance(value, Tensor)}
    # Lightning puts the attribute that holds the model, "model", before the model's own names
    if nested and all(name.startswith("model.") for name in tensors):
        inner = {name.removeprefix("model."): value for name, value in tensors.items()}
        if any(name.startswith(("model.", "lm_head.")) for name in inner):
            return inner
    return tensors
