"""ShardWriter: write safetensors shards one tensor at a time, so that no shard is ever held in memory.

A safetensors file starts with its header, and the header may end in spaces. So room for it is left at the front, the
tensors are streamed behind, and the header is put in when the shard is full.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from bitinfer.weight_files import SAFETENSORS_DTYPES

ENTRY_BYTES = 256  # room for a tensor's name, shape and place
MAX_HEADER_BYTES = 1 << 18
MAX_SHARD_BYTES = 1_000_000_000
CHUNK_BYTES = 1 << 26
INDEX = "model.safetensors.index.json"
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def header_size(tensors: int) -> int:
    """Return the bytes set aside for the header of a shard where ``tensors`` are to be written in all."""
    return min(MAX_HEADER_BYTES, 4096 + ENTRY_BYTES * tensors)


class ShardWriter:
    """Write ``model.safetensors``, or numbered shards and their index, into a folder.

    Use it as a context manager and call :meth:`finish` at the end; left without that, the files stay partial, under
    names that nothing loads.

    Attributes:
        total: bytes of all tensors written.
        weight_map: tensor name -> file name, complete after :meth:`finish`.

    Args:
        folder: an existing folder.
        tensors: about how many there will be, for the size of the header; a shard whose header is full is closed.
        max_bytes: size at which a new shard starts; a single larger tensor gets one of its own.
    """

    def __init__(self, folder: Path, tensors: int = 1000, max_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.header_bytes = header_size(tensors)
        self.total = 0
        self.weight_map: dict[str, str] = {}
        self._shards: list[list[str]] = []
        self._file: BinaryIO | None = None
        self._header: dict[str, object] = {}
        self._header_size = 0
        self._offset = 0
        self._last: list[tuple[str, Tensor]] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
        """Write one tensor, cast to ``dtype`` chunk by chunk.

        Raises:
            OSError: the disk is full, or cannot be written for another reason.
        """
        dtype = dtype or tensor.dtype
        size = tensor.numel() * dtype.itemsize
        entry = len(json.dumps([name, _NAMES[dtype], list(tensor.shape)])) + 100
        if self._file is not None and (
            self._offset + size > self.max_bytes or self._header_size + entry > self.header_bytes
        ):
            self._close_shard()
        if self._file is None:
            self._open_shard()
        self._header_size += entry
        self.total += size
        self._shards[-1].append(name)
        if size % 8:
            # the format allows no gaps, and a reader maps tensors at their offset: odd sizes would leave what follows
            # unaligned, so they come last
            self._last.append((name, tensor.to(dtype, copy=True)))
        else:
            self._write(name, tensor, dtype)

    def finish(self) -> None:
        """Complete the last shard, give the files their names and write the index where there are several."""
        if self._file is not None:
            self._close_shard()
        count = len(self._shards)
        for number, names in enumerate(self._shards, 1):
            file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._partial(number).rename(self.folder / file)
            self.weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": self.weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _partial(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.partial"

    def _open_shard(self) -> None:
        self._shards.append([])
        self._file = self._partial(len(self._shards)).open("wb")
        self._file.seek(8 + self.header_bytes)
        self._header = {"__metadata__": {"format": "pt"}}
        self._header_size = 100
        self._offset = 0

    def _write(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        assert self._file is not None
        start = self._offset
        for chunk in _chunks(tensor):
            data = chunk.to(dtype).contiguous().view(torch.uint8).numpy()
            self._file.write(data.data)
            self._offset += data.nbytes
        self._header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, self._offset],
        }

    def _close_shard(self) -> None:
        assert self._file is not None
        for name, tensor in sorted(self._last, key=lambda pair: -pair[1].element_size()):
            self._write(name, tensor, tensor.dtype)
        self._last = []
        header = json.dumps(self._header, separators=(",", ":")).encode().ljust(self.header_bytes)
        assert len(header) == self.header_bytes
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self.header_bytes) + header)
        self._file.close()
        self._file = None


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the values in order, in pieces whose copies stay small."""
    if tensor.dim() < 2:
        yield tensor.reshape(-1)
    elif tensor.numel():
        step = max(1, CHUNK_BYTES // max(1, tensor[0].numel() * tensor.element_size()))
        for start in range(0, tensor.shape[0], step):
            yield tensor[start : start + step].reshape(-1)
