"""Token corpora: rows of equal length in shards, a manifest that says what they are, and a split that is held out.

A corpus is a folder with ``manifest.json``, the tokenizer, ``vocabulary.json`` where the vocabulary was reduced, and
shards ``shard-00000.safetensors`` with ``tokens`` (uint16, or uint32 for vocabularies past 65536, ``[rows, length]``)
and ``scored`` (bool, the same shape): which tokens were written by the teacher, or come from a text, and are therefore
targets; prompts are not. A shard enters the manifest once it is complete, so that an interrupted corpus goes on where
it stopped.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from bitinfer.checkpoint import read_json
from bitinfer.errors import FormatError

MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.json"
TRAIN, HELD_OUT = "train", "held_out"
VERSION = 1


class Corpus:
    """A corpus folder, opened for reading and for adding shards.

    Attributes:
        path: the folder.
        manifest: what ``manifest.json`` says.

    Raises:
        FormatError: the folder is no corpus, or a shard that the manifest lists is missing or of another shape.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest: dict[str, Any] = read_json(self.path / MANIFEST)
        if self.manifest.get("version") != VERSION:
            raise FormatError(
                f"{self.path}: expected a corpus of version {VERSION}, got {self.manifest.get('version')}"
            )
        self._rows: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def create(
        cls, path: str | Path, *, vocab_size: int, row_length: int, about: dict[str, Any], tokenizer: Any | None = None
    ) -> "Corpus":
        """Make an empty corpus, or open one that was begun with the same settings.

        Args:
            path: the folder.
            vocab_size: ids are below this.
            row_length: tokens to a row.
            about: JSON-ready settings that determine its content; they must agree with those of a corpus that is there.
            tokenizer: saved beside the shards.

        Raises:
            FormatError: a corpus with other settings is there.
        """
        path = Path(path)
        head = {"version": VERSION, "vocab_size": vocab_size, "row_length": row_length, "about": about}
        if (path / MANIFEST).exists():
            corpus = cls(path)
            wanted = json.loads(json.dumps(head))
            stored = {name: corpus.manifest.get(name) for name in head}
            if stored != wanted:
                old, new = ({**values, **(values["about"] or {})} for values in (stored, wanted))
                different = sorted(n for n in {*old, *new} - {"about"} if old.get(n) != new.get(n))
                raise FormatError(f"{path}: a corpus with other settings is there ({', '.join(different)}); remove it")
            return corpus
        path.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        write_json(path / MANIFEST, {**head, "shards": []})
        return cls(path)

    @property
    def vocab_size(self) -> int:
        return int(self.manifest["vocab_size"])

    @property
    def row_length(self) -> int:
        return int(self.manifest["row_length"])

    @property
    def shards(self) -> list[dict[str, Any]]:
        return list(self.manifest["shards"])

    @property
    def kept(self) -> list[int] | None:
        """The teacher's id of each token, or None where the vocabulary is the teacher's own."""
        return read_vocabulary(self.path)

    def count(self, split: str) -> int:
        """Return the number of rows of a split."""
        return sum(shard["rows"] for shard in self.shards if shard["split"] == split)

    def add(self, name: str, tokens: np.ndarray, scored: np.ndarray, split: str) -> None:
        """Write a shard and then list it in the manifest; ``tokens`` and ``scored`` are ``[rows, row_length]``.

        Raises:
            ValueError: the shape or an id does not fit the corpus.
        """
        if tokens.shape[1:] != (self.row_length,) or scored.shape != tokens.shape:
            raise ValueError(
                f"Corpus.add: tokens and scored must be [rows, {self.row_length}], got {tokens.shape}, {scored.shape}"
            )
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise ValueError(f"Corpus.add: ids must be below {self.vocab_size}, got {tokens.min()} to {tokens.max()}")
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        partial = self.path / f".{name}.partial"
        save_file({"tokens": tokens.astype(dtype), "scored": scored.astype(np.bool_)}, partial)
        os.replace(partial, self.path / f"{name}.safetensors")
        self.manifest["shards"].append({"name": name, "rows": len(tokens), "split": split})
        write_json(self.path / MANIFEST, self.manifest)
        self._rows.clear()

    def has(self, name: str) -> bool:
        """Whether a shard is complete."""
        return any(shard["name"] == name for shard in self.shards)

    def rows(self, split: str, indices: Sequence[int] | np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Return rows of a split: ids int64 and marks bool, ``[rows, row_length]``; all of them by default."""
        if split not in self._rows:
            shards = [self._read(shard) for shard in self.shards if shard["split"] == split]
            if not shards:
                raise FormatError(f"{self.path}: the corpus has no rows in split {split}")
            self._rows[split] = tuple(np.concatenate(parts) for parts in zip(*shards, strict=True))  # type: ignore
        tokens, scored = self._rows[split]
        chosen: Any = slice(None) if indices is None else np.asarray(indices)
        return torch.from_numpy(tokens[chosen].astype(np.int64)), torch.from_numpy(scored[chosen])

    def token_counts(self, split: str | None = None) -> np.ndarray:
        """Return how often each token stands in the corpus, or a split of it: int64 ``[vocab_size]``."""
        counts = np.zeros(self.vocab_size, np.int64)
        for shard in self.shards:
            if split in (None, shard["split"]):
                counts += np.bincount(self._read(shard)[0].ravel(), minlength=self.vocab_size)
        return counts

    def _read(self, shard: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        file = self.path / f"{shard['name']}.safetensors"
        if not file.exists():
            raise FormatError(f"{file}: this shard is missing; make the corpus again, or copy it whole")
        tensors = load_file(file)
        if tensors["tokens"].shape != (shard["rows"], self.row_length):
            raise FormatError(
                f"{file}: tokens have shape {tensors['tokens'].shape}, the manifest says "
                f"{(shard['rows'], self.row_length)}"
            )
        return tensors["tokens"], tensors["scored"]


class Batches:
    """The order in which training reads rows: a fresh shuffle each epoch, given by the seed and the position alone.

    Args:
        count: rows of the split.
        rows: rows to a batch; an epoch's last, smaller batch is left out.
        seed: of the shuffles.

    Raises:
        ValueError: there are fewer rows than one batch takes.
    """

    def __init__(self, count: int, rows: int, seed: int) -> None:
        if count < rows:
            raise ValueError(f"Batches: the corpus has {count} training rows, fewer than one batch of {rows}")
        self.count, self.rows, self.seed = count, rows, seed
        self.per_epoch = count // rows
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __getitem__(self, position: int) -> np.ndarray:
        """Return the row numbers of the batch at ``position``, counted from 0 over all epochs."""
        epoch, place = divmod(position, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.count)
        return self._order[place * self.rows : (place + 1) * self.rows]


def corpus_from_text(
    files: Sequence[str | Path],
    tokenizer: Any,
    path: str | Path,
    *,
    row_length: int = 512,
    held_out: float = 0.02,
    vocab_size: int | None = None,
) -> Corpus:
    """Make a corpus of text files; the last part of each is held out.

    The ids of a file, with the tokenizer's end token behind, are cut into rows, and what does not fill one is left out.
    All tokens are targets.

    Args:
        files: UTF-8 text files.
        tokenizer: a transformers tokenizer.
        path: the folder to make, or to go on with.
        row_length: tokens to a row.
        held_out: share of each file's rows that training never sees, at least one row.
        vocab_size: of the model; by default that of the tokenizer.

    Raises:
        ValueError: an argument is out of range, or a file has fewer than two rows of tokens.
    """
    if row_length < 2 or not 0 < held_out < 1:
        raise ValueError(
            f"corpus_from_text: row_length must be at least 2 and held_out between 0 and 1, "
            f"got {row_length}, {held_out}"
        )
    about = {"files": [Path(f).name for f in files], "held_out": held_out}
    size = vocab_size or len(tokenizer)
    corpus = Corpus.create(path, vocab_size=size, row_length=row_length, about=about, tokenizer=tokenizer)
    for number, file in enumerate(files):
        if corpus.has(f"text-{number:05d}"):
            continue
        ids = list(tokenizer(Path(file).read_text(encoding="utf-8"), verbose=False)["input_ids"])
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        rows = np.array(ids[: len(ids) // row_length * row_length], np.int64).reshape(-1, row_length)
        if len(rows) < 2:
            raise ValueError(f"{file}: {len(ids)} tokens are fewer than two rows of {row_length}; lower row_length")
        kept_back = max(1, round(len(rows) * held_out))
        parts = (
            (f"held-out-{number:05d}", rows[-kept_back:], HELD_OUT),
            (f"text-{number:05d}", rows[:-kept_back], TRAIN),
        )
        for name, part, split in parts:
            if not corpus.has(name):
                corpus.add(name, part, np.ones_like(part, np.bool_), split)
    return corpus


def write_vocabulary(folder: Path, kept: Sequence[int], teacher_size: int) -> None:
    """Note which of the teacher's tokens a corpus uses."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / VOCABULARY, {"teacher_vocab_size": teacher_size, "teacher_ids": [int(i) for i in kept]})


def read_vocabulary(folder: Path) -> list[int] | None:
    """Return the teacher's id of each token, or None where the vocabulary is the teacher's own."""
    file = folder / VOCABULARY
    return list(read_json(file)["teacher_ids"]) if file.exists() else None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write JSON so that a reader sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
