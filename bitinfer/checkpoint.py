"""Checkpoint: a folder with ``config.json`` and weights, read tensor by tensor and never whole.

The weights are one safetensors or ``torch.save`` file, or shards of either kind, as the Hugging Face libraries name
them. Files are mapped into memory, so that a tensor costs nothing until it is read.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitinfer.errors import FormatError
from bitinfer.weight_files import TensorInfo, WeightFile, open_weight_file

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin)")
# what trainers leave beside the weights under the same suffixes
NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state|adapter_|scaler).*")
AUX_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".md", ".py", ".tiktoken", ".vocab", ".merges"}
AUX_NAMES = re.compile(r"(LICENSE|NOTICE|COPYING|USE_POLICY).*", re.IGNORECASE)
NOT_AUX = re.compile(r"config\.json|.*\.index\.json|trainer_state\.json|optimizer.*|scheduler.*")


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a model folder by name, and its configuration.

    It is a mapping ``name -> Tensor``, so that format readers take it as it is. At most one weight file is open at a
    time; a tensor keeps its own file mapped for as long as it lives. ``rotary_emb.inv_freq`` buffers, which some
    trainers store and which every model computes anew, are left out.

    Attributes:
        path: the folder.
        config: ``config.json`` as a dictionary.
        shards: the weight files, in the order of their names.

    Args:
        path: a folder. Names of the Hub are not downloaded.

    Raises:
        FormatError: no folder, no or several sets of weights, a missing, truncated or foreign file, a tensor that the
            index promises and the file does not hold. The message names the file or tensor and says what to do.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise FormatError(_not_a_folder(self.path))
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        promised = self._find()
        self._open: WeightFile | None = None
        self._info: dict[str, TensorInfo] = {}
        self._shard: dict[str, Path] = {}
        for shard in self.shards:
            self._read_names(shard, promised)
        for name, file in promised.items():
            if name not in self._info and not is_ignored(name):
                raise FormatError(
                    f"{self.path}: the index says that {file} holds {name}, but it does not; the files are of "
                    "different versions or damaged: download the folder again"
                )
        if not self._info:
            raise FormatError(f"{self.path}: {', '.join(s.name for s in self.shards)} hold no tensors")

    # reading

    def __getitem__(self, name: str) -> Tensor:
        shard = self._shard[name]
        if self._open is None or self._open.path != shard:
            self._open = None  # unmap the last file before mapping the next
            self._open = open_weight_file(shard)
        return self._open.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._info)

    def __len__(self) -> int:
        return len(self._info)

    def __contains__(self, name: object) -> bool:
        return name in self._info

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, mapped from its file where the kind of file allows.

        Raises:
            FormatError: there is no such tensor.
        """
        if name not in self._info:
            raise FormatError(f"{self.path}: there is no tensor {name}")
        return self[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self._info[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor without reading it."""
        return self._info[name].dtype

    def nbytes(self, name: str) -> int:
        """Return the bytes that a tensor takes in the file."""
        return self._info[name].nbytes

    def shard_of(self, name: str) -> Path:
        """Return the weight file that holds a tensor."""
        return self._shard[name]

    def close(self) -> None:
        """Unmap the open weight file; the next access maps it again."""
        self._open = None

    def aux_files(self) -> list[Path]:
        """Return the files that belong to the model beside weights and ``config.json``: tokenizer, licence, ..."""
        return sorted(
            file
            for file in self.path.iterdir()
            if (file.suffix in AUX_SUFFIXES or AUX_NAMES.fullmatch(file.name))
            and not NOT_AUX.fullmatch(file.name)
            and file.is_file()
        )

    # finding the weights

    def _find(self) -> dict[str, str]:
        """Set ``shards`` and return what the index promises: tensor name -> file name."""
        for index in INDEXES:
            if (self.path / index).is_file():
                return self._read_index(self.path / index)
            single = self.path / index.removesuffix(".index.json")
            if single.is_file():
                self.shards = [single]
                return {}
        others = sorted(self.path.glob("*.index.json"))
        if len(others) == 1:
            return self._read_index(others[0])
        for suffix in (".safetensors", ".bin"):
            files = sorted(f for f in self.path.glob(f"*{suffix}") if not NOT_WEIGHTS.match(f.name))
            if files:
                self.shards = self._without_index(files)
                return {}
        seen = sorted(f.name for f in self.path.iterdir() if f.name != "config.json")[:8]
        raise FormatError(
            f"{self.path}: no weights found; expected {', '.join(SINGLES + INDEXES)}, "
            f"but the folder holds {', '.join(seen) or 'nothing else'}"
        )

    def _without_index(self, files: list[Path]) -> list[Path]:
        if len(files) == 1 and not SHARD_NAME.fullmatch(files[0].name):
            return files
        matches = [SHARD_NAME.fullmatch(f.name) for f in files]
        sets = {(m["stem"], m["count"]) if m else (f.name, "") for m, f in zip(matches, files, strict=True)}
        if len(sets) > 1:
            raise FormatError(
                f"{self.path}: several sets of weights and none with a name that is looked for first "
                f"({', '.join(SINGLES)}): {', '.join(f.name for f in files)}; leave one of them"
            )
        first = matches[0]
        assert first is not None
        for number in range(1, int(first["count"]) + 1):
            name = f"{first['stem']}-{number:05d}-of-{first['count']}{first['suffix']}"
            if not (self.path / name).is_file():
                raise FormatError(f"{self.path / name}: this shard is missing; download it")
        return files

    def _read_index(self, index: Path) -> dict[str, str]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(f"{index}: weight_map is missing or empty; download the file again")
        for name, file in weight_map.items():
            # a plain name: nothing outside the folder is opened, whatever an index says. Links are fine: the cache of
            # the Hub is made of them
            if not isinstance(file, str) or not file or file in (".", "..") or re.search(r"[/\\\0:]", file):
                raise FormatError(
                    f"{index}: tensor {name} is said to be in {file!r}; only plain file names inside the folder are "
                    "allowed: this index is damaged or hostile"
                )
        self.shards = [self.path / file for file in sorted(set(weight_map.values()))]
        for shard in self.shards:
            if not shard.is_file():
                raise FormatError(f"{shard}: this shard is missing, {index.name} needs it; download it")
        return weight_map

    def _read_names(self, shard: Path, promised: Mapping[str, str]) -> None:
        opened = open_weight_file(shard)
        for name, info in opened.infos().items():
            if is_ignored(name) or promised.get(name, shard.name) != shard.name:
                continue
            if name in self._info:
                raise FormatError(f"{self.path}: tensor {name} is in {self._shard[name].name} and in {shard.name}")
            self._info[name] = info
            self._shard[name] = shard
        if len(self.shards) == 1:
            self._open = opened


def is_ignored(name: str) -> bool:
    """Whether a stored tensor is one that every model computes itself."""
    return name.endswith("rotary_emb.inv_freq")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; FormatError names the file when it is missing or is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path}: this file is missing; a model folder needs it") from None
    except ValueError as error:
        raise FormatError(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _not_a_folder(path: Path) -> str:
    if path.is_file():
        return f"{path}: expected a model folder, got a file; pass the folder that holds it and config.json"
    hint = ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        hint = f"; to download it from the Hub: hf download {path} --local-dir {path.name}"
    return f"{path}: no such folder{hint}"


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
