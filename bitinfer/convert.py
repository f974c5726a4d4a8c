"""convert: pack a checkpoint folder into one that holds one bit per weight.

The source is read tensor by tensor and the result written as it comes: no more than one weight file is mapped at a
time, and no more than a layer is held. The new folder appears under its name when it is complete, or not at all.
"""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitinfer.checkpoint import Checkpoint, sha256_of
from bitinfer.checks import ACT_BITS, BLOCK_SIZE
from bitinfer.errors import FormatError
from bitinfer.formats import FORMATS, ZERO_LIMIT, Format, detect
from bitinfer.formats.modules import Modules, kind_of, model_modules
from bitinfer.formats.packed import LAYOUT_VERSION, QUANT_METHOD, quantization
from bitinfer.int8_rows import ROW_SCALE, round_rows
from bitinfer.output_folder import DISK_FULL, check_places, check_space, new_folder, no_space
from bitinfer.packing import WORD_BITS, words_per_row
from bitinfer.shard_writer import ShardWriter, header_size
from bitinfer.weight import FLOAT_DTYPES, BinaryWeight, WeightLayout

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
MARKS = (".wscale", ".wbias", ".input_factor", ".weight_scale")  # scales of some binary format
EMBEDDINGS = ("embed", "wte", "wpe")  # parts of names
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tiktoken.model")
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class LayerReport:
    """One packed layer: bytes with scales and bias; bits per weight with scales and without the bias."""

    name: str
    shape: tuple[int, int]
    layout: WeightLayout
    bytes: int
    bits_per_weight: float
    zeros: int


@dataclass
class ConversionReport:
    """What :func:`convert` did.

    Attributes:
        path: the new folder.
        format: name of the source's format.
        layers: the packed layers, in the order of the source.
        layout: the layout that most of them share.
        bytes_before, bytes_after: bytes of all tensors, in the source and in the new folder.
        kept_dense: names of the linear layers that stay dense.
        notes: what a user should know, in sentences.
    """

    path: Path
    format: str
    layers: list[LayerReport] = field(default_factory=list)
    layout: WeightLayout = field(default_factory=WeightLayout)
    bytes_before: int = 0
    bytes_after: int = 0
    kept_dense: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def weights(self) -> int:
        """Number of weights that are packed."""
        return sum(math.prod(layer.shape) for layer in self.layers)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed layers, scales and biases included."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Average over the packed layers, scales included and biases left out."""
        return sum(x.bits_per_weight * math.prod(x.shape) for x in self.layers) / max(self.weights, 1)

    @property
    def zeros(self) -> int:
        """Exact zeros that became +1."""
        return sum(layer.zeros for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        layers = [{**asdict(layer), "layout": layer.layout.to_dict()} for layer in self.layers]
        totals = {name: getattr(self, name) for name in ("weights", "packed_bytes", "bits_per_weight", "zeros")}
        return {**asdict(self), "path": str(self.path), "layers": layers, "layout": self.layout.to_dict(), **totals}

    def __str__(self) -> str:
        ratio = self.bytes_before / max(self.bytes_after, 1)
        lines = [
            f"{self.format}: packed {len(self.layers)} layers at {self.bits_per_weight:.4f} bits per weight, "
            f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB ({ratio:.1f} x smaller): {self.path}"
        ]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    format: str = "auto",
    dtype: torch.dtype | str | None = None,
    act_bits: int | None = None,
    act_block: int = 0,
    embedding_bits: int | None = None,
    skip: Iterable[str] = ("lm_head",),
    group_size: int = 0,
    method: str = "absmean",
    zero_limit: float = ZERO_LIMIT,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Pack the binary layers of a model folder into a new folder, which ``bitinfer.load`` and transformers read.

    Signs are those of the source tensor as stored, whatever ``dtype`` is. Everything else is copied, tokenizer files
    included. ``dst`` appears when it is complete: an error or an interruption leaves nothing behind, and a killed
    process a folder ``<dst>.incomplete-...`` that nothing loads.

    Args:
        src: folder with ``config.json`` and weights, see :class:`bitinfer.checkpoint.Checkpoint`.
        dst: the folder to make.
        format: a name in ``bitinfer.formats.FORMATS``, or "auto" to detect it. "latent" is never detected, for it
            approximates.
        dtype: of the scales and of all that stays dense: a torch dtype or its name. None keeps each tensor's own.
        act_bits, act_block: recorded for loading: how activations are quantised, see :class:`bitinfer.BinaryLinear`.
        embedding_bits: 8 rounds the embedding and a dense head to int8 with a scale per row (see
            :mod:`bitinfer.int8_rows`), which is not lossless; None keeps them.
        skip: linear layers to leave dense: whole components of the dotted name (``"lm_head"``, ``"layers.0"``), or
            patterns with ``*`` over the whole name.
        group_size: columns that share a scale, for "latent" (0: a row) and "binary_dense" (0: found out).
        method: how "latent" fits scales: "absmean", "nmf" or "svd".
        zero_limit: share of a tensor that may be exactly zero and becomes +1; more is an error.
        overwrite: replace ``dst`` if it is a folder that bitinfer packed.
        progress: called with (bytes of the source done, all of them, name of the tensor).

    Returns:
        What was packed, and what to know about it.

    Raises:
        FormatError: ``src`` is damaged, of no known format, packed already, or not binary. The message names
            the tensor.
        FileExistsError: ``dst`` exists.
        OSError: the disk is full or not writable.
        ValueError, TypeError: an argument is wrong.
    """
    if act_bits is not None and act_bits not in ACT_BITS:
        raise ValueError(f"convert: act_bits must be None or one of {ACT_BITS}, got {act_bits!r}")
    if act_block not in (0, BLOCK_SIZE):
        raise ValueError(f"convert: act_block must be 0 or {BLOCK_SIZE}, got {act_block!r}")
    if embedding_bits not in (None, 8):
        raise ValueError(f"convert: embedding_bits must be None or 8, got {embedding_bits!r}")
    target = _dtype(dtype)
    src, dst = Path(src), Path(dst)
    check_places(src, dst, overwrite)
    source = Checkpoint(src)
    reader = _reader(source, format, group_size, method, zero_limit)
    plan = _Plan.make(source, reader, tuple([skip] if isinstance(skip, str) else skip))
    if embedding_bits is not None:
        plan.int8_rows = plan.matrices_of_tokens()
    check_space(dst, plan.estimate(target))
    report = ConversionReport(dst, reader.name)
    with new_folder(dst, overwrite) as folder:
        try:
            written, hashes = _write_weights(plan, folder, target, report, progress)
            _finish_report(plan, report)
            for file in source.aux_files():
                shutil.copyfile(file, folder / file.name)
            config = _config(plan, report, written, hashes, act_bits, act_block)
            # last: without it nothing takes the folder for a model
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            if error.errno in DISK_FULL:
                raise no_space(error.errno or 0, dst, f"writing failed: {error.strerror}") from error
            raise
    return report


@dataclass
class _Plan:
    """What to do with every tensor of the source."""

    source: Checkpoint
    reader: Format
    layers: list[str]
    config: dict[str, Any]
    modules: Modules | None
    owner: dict[str, str]  # tensor -> the packed layer that it belongs to
    int8_rows: list[str] = field(default_factory=list)  # modules whose weights are rounded to 8 bits

    @classmethod
    def make(cls, source: Checkpoint, reader: Format, skip: tuple[str, ...]) -> "_Plan":
        found = reader.layer_names(source)
        layers = [name for name in found if not _is_skipped(name, skip)]
        config = reader.config(source)
        if not layers:
            raise FormatError(f"{source.path}: no {reader.name} layer to pack was found, skip={list(skip)} left aside")
        for name in (n for n in found if _is_skipped(n, skip)):
            extra = [t for t in reader.consumed(name) if t in source and not t.endswith((".weight", ".bias"))]
            if extra:
                raise ValueError(
                    f"convert: skip={list(skip)} names {name}, which the {reader.name} checkpoint holds as binary with "
                    f"{extra[0]}: it has no dense weight to keep; leave it out of skip"
                )
        owner = {t: name for name in layers for t in reader.consumed(name) if t in source}
        strays = [t for t in source if t.endswith(MARKS) and t not in owner]
        if strays:
            raise FormatError(
                f"{source.path}: {strays[0]} belongs to no {reader.name} layer; without it the model would be "
                "another one: leave out format=, and see what is detected"
            )
        plan = cls(source, reader, layers, config, model_modules(config), owner)
        plan._check_shapes()
        return plan

    def _check_shapes(self) -> None:
        """Compare what stays dense, and what is missing, with the model that the configuration describes."""
        if self.modules is None:
            return
        for name, shape in self.modules.shapes.items():
            if name in self.source and name not in self.owner and self.source.shape(name) != shape:
                raise FormatError(
                    f"{name} has shape {self.source.shape(name)}, but the model of config.json needs {shape}: "
                    "weights and configuration do not belong together"
                )
        kinds = {kind_of(name): name for name in self.layers}
        for name in self.modules.linears:
            if f"{name}.weight" not in self.source and kind_of(name) in kinds:
                raise FormatError(
                    f"{name}.weight is missing: config.json describes a model that has it, as it has "
                    f"{kinds[kind_of(name)]}.weight; the checkpoint is incomplete"
                )

    def matrices_of_tokens(self) -> list[str]:
        """Return the names of the modules that hold a dense row for each token: the embedding, and a head of its own.

        Raises:
            FormatError: there is none.
        """
        rows = self.config.get("vocab_size")
        names = [
            name.removesuffix(".weight")
            for name in self.source
            if name.endswith(".weight")
            and name not in self.owner
            and len(self.source.shape(name)) == 2
            and self.source.shape(name)[0] == rows
            and self.source.dtype(name) in FLOAT_DTYPES
        ]
        if not names:
            raise FormatError(
                f"{self.source.path}: embedding_bits=8, but no dense matrix has the {rows} rows that vocab_size gives"
            )
        return names

    def check_layer(self, name: str, weight: BinaryWeight) -> None:
        """Compare a packed layer with the model that the configuration describes."""
        shape = (weight.out_features, weight.in_features)
        expected = shape if self.modules is None else self.modules.linears.get(name, shape)
        if shape != expected:
            raise FormatError(
                f"{name}.weight has shape {shape} (out_features, in_features), but the model of config.json needs "
                f"{expected}: weights and configuration do not belong together"
            )

    def estimate(self, dtype: torch.dtype | None) -> int:
        """Return about how many bytes will be written."""
        total = 0
        for name in self.source:
            shape, kind = self.source.shape(name), self.source.dtype(name)
            if name in self.owner and name.endswith(".weight"):
                words = 4 * math.prod(shape[:-1]) * words_per_row(shape[-1])
                total += words if kind.is_floating_point else math.prod(shape)
            else:
                total += math.prod(shape) * _cast_to(kind, dtype).itemsize
        return total + header_size(self.entries) + sum(file.stat().st_size for file in self.source.aux_files())

    @property
    def entries(self) -> int:
        """Return about how many tensors will be written."""
        return len(self.source) + 2 * len(self.layers) + len(self.int8_rows)


def _write_weights(
    plan: _Plan, folder: Path, dtype: torch.dtype | None, report: ConversionReport, progress: Progress | None
) -> tuple[Counter[torch.dtype], dict[str, str]]:
    """Write every tensor; return the bytes of dense floating point values written, by dtype, and the shards' hashes."""
    source = plan.source
    total = sum(source.nbytes(name) for name in source)
    written: Counter[torch.dtype] = Counter()
    hashes: dict[str, str] = {}
    done = 0
    with ShardWriter(folder, tensors=plan.entries) as writer:
        for name in source:  # in the order of the shards
            shard = source.shard_of(name)
            if shard.name not in hashes:  # a pass in order, after which the tensors come from the page cache
                hashes[shard.name] = sha256_of(shard)
            layer = plan.owner.get(name)
            if layer is None:
                kept = source.tensor(name)
                kind = _cast_to(kept.dtype, dtype)
                _check_values(name, kept, kind)
                if name.removesuffix(".weight") in plan.int8_rows:
                    codes, scale = round_rows(kept)
                    writer.add(name, codes, codes.dtype)
                    writer.add(name + ROW_SCALE, scale, scale.dtype)
                else:
                    writer.add(name, kept, kind)
                if kind in FLOAT_DTYPES:
                    written[kind] += kept.numel() * kind.itemsize
                del kept
            elif name == f"{layer}.weight":
                weight, zeros = plan.reader.read_counted(source, layer)
                plan.check_layer(layer, weight)
                for part, tensor in weight.tensors(f"{layer}.").items():
                    kind = _cast_to(tensor.dtype, dtype)
                    _check_values(part, tensor, kind)
                    writer.add(part, tensor, kind)
                if dtype is not None:
                    weight = weight.to(dtype)
                report.layers.append(_layer_report(layer, weight, zeros))
                del weight
            done += source.nbytes(name)
            if progress is not None:
                progress(done, total, name)
        source.close()
        writer.finish()
    report.bytes_before, report.bytes_after = total, writer.total
    return written, hashes


def _layer_report(name: str, weight: BinaryWeight, zeros: int) -> LayerReport:
    shape = (weight.out_features, weight.in_features)
    return LayerReport(name, shape, weight.layout, weight.nbytes, weight.bits_per_weight, zeros)


def _cast_to(stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype to write: ``dtype`` for what is a float of 16 bits or more, and what it is for all else."""
    return dtype if dtype is not None and stored in (*FLOAT_DTYPES, torch.float64) else stored


def _check_values(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Refuse NaN, and a cast that would turn finite values into infinity."""
    if tensor.dtype not in (*FLOAT_DTYPES, torch.float64) or not tensor.numel():
        return
    low, high = (float(value) for value in torch.aminmax(tensor))
    if math.isnan(low):
        raise FormatError(f"{name} holds NaN: the checkpoint is damaged")
    top = max(abs(low), abs(high))
    if math.isfinite(top) and top > torch.finfo(dtype).max:
        raise FormatError(f"{name} holds values up to {top:g}, beyond {dtype}; pass dtype='bfloat16' or 'float32'")


def _finish_report(plan: _Plan, report: ConversionReport) -> None:
    source, packed = plan.source, set(plan.layers)
    report.layout = Counter(layer.layout for layer in report.layers).most_common(1)[0][0]
    if plan.modules is not None:
        report.kept_dense = [name for name in plan.modules.linears if name not in packed]
        outside = [name for name in plan.layers if name not in plan.modules.linears]
    else:
        report.kept_dense = [
            name.removesuffix(".weight")
            for name in source
            if name not in plan.owner
            and name.endswith(".weight")
            and len(source.shape(name)) == 2
            and not any(part in name for part in EMBEDDINGS)
        ]
        if "lm_head" not in (*packed, *report.kept_dense):  # tied, and no tensor of its own
            report.kept_dense.append("lm_head")
        outside = []
        report.notes.append(
            f"transformers cannot build model_type {plan.config.get('model_type')!r} here: linear layers were "
            "recognised by their names, and shapes were not compared with config.json"
        )
    if plan.reader.approximates:
        report.notes.append(
            f"{plan.reader.name} approximates: the model computes something else than the source, and usually needs "
            "distillation to be of use"
        )
    if outside:
        report.notes.append(
            f"{len(outside)} packed layers are no nn.Linear of the transformers model, e.g. {outside[0]}: "
            "transformers cannot load them as such"
        )
    dense = [
        name
        for name in source
        if name not in plan.owner
        and len(source.shape(name)) >= 2
        and name.removesuffix(".weight") not in report.kept_dense
        and not any(part in name for part in EMBEDDINGS)
    ]
    if dense:
        size = sum(source.nbytes(name) for name in dense) / 1e6
        report.notes.append(
            f"{len(dense)} tensors ({size:.1f} MB in the source) are no linear layers of their own, such as the "
            f"experts of a mixture, and stay dense: e.g. {dense[0]}"
        )
    if plan.int8_rows:
        report.notes.append(f"{' and '.join(plan.int8_rows)} rounded to 8 bits: verify shows what that costs")
    if report.zeros:
        worst = max(report.layers, key=lambda layer: layer.zeros)
        report.notes.append(
            f"{report.zeros} weights are exactly 0, which a bit cannot hold, and became +1 "
            f"(most in {worst.name}: {worst.zeros})"
        )
    if not any((source.path / file).is_file() for file in TOKENIZER_FILES):
        report.notes.append(
            "no tokenizer found in the source: copy tokenizer.json or tokenizer.model and tokenizer_config.json into "
            "the folder"
        )


def _config(
    plan: _Plan,
    report: ConversionReport,
    written: Counter[torch.dtype],
    hashes: dict[str, str],
    act_bits: int | None,
    act_block: int,
) -> dict[str, Any]:
    """Return ``config.json`` of the packed folder."""
    config = {k: v for k, v in plan.config.items() if k not in ("dtype", "torch_dtype", "quantization_config")}
    if written:
        config["dtype"] = str(written.most_common(1)[0][0]).removeprefix("torch.")
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "layout_version": LAYOUT_VERSION,
        "format": report.format,
        "layout": report.layout.to_dict(),
        "layouts": {x.name: x.layout.to_dict() for x in report.layers if x.layout != report.layout},
        "modules_to_not_convert": report.kept_dense,
        "act_bits": act_bits,
        "act_block": act_block,
        "zeros": {layer.name: layer.zeros for layer in report.layers if layer.zeros},
        "source": hashes,
        **({"int8_rows": plan.int8_rows} if plan.int8_rows else {}),
    }
    return config


# arguments


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in FLOAT_DTYPES:
        raise ValueError(f"convert: dtype must be None, float32, float16 or bfloat16, got {dtype!r}")
    return found


def _reader(source: Checkpoint, name: str, group_size: int, method: str, zero_limit: float) -> Format:
    """Return the format with its options, or refuse a source or an option that does not fit it."""
    if name != "auto" and name not in FORMATS:
        raise ValueError(f"convert: unknown format {name!r}; known are auto, {', '.join(FORMATS)}")
    if not 0 <= zero_limit <= 1:
        raise ValueError(f"convert: zero_limit must be a share from 0 to 1, got {zero_limit!r}")
    if group_size < 0 or group_size % WORD_BITS:
        raise ValueError(f"convert: group_size must be 0 or a multiple of {WORD_BITS}, got {group_size!r}")
    packed = FORMATS["packed"]
    if name == "packed" or packed.matches(source):
        state = "is packed already" if packed.matches(source) else "format 'packed' is what convert writes"
        raise FormatError(f"{source.path}: {state}; convert reads the original checkpoint")
    detected = detect(source) if name == "auto" or quantization(source.config) else None
    found = FORMATS[name] if name != "auto" else detected
    assert found is not None
    options: dict[str, Any] = {"zero_limit": zero_limit}
    takes = {f.name for f in fields(found)}
    for option, value, default in (("group_size", group_size, 0), ("method", method, "absmean")):
        if option in takes:
            options[option] = value
        elif value != default:
            raise ValueError(f"convert: {option}={value!r} has no meaning for format {found.name!r}")
    return replace(found, **options)


def _is_skipped(name: str, skip: tuple[str, ...]) -> bool:
    return any(f".{s}." in f".{name}." or fnmatchcase(name, s) for s in skip)
