"""What a model folder holds, from its headers alone: formats, layers, sizes, average bits."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bitinfer.checkpoint import Checkpoint, read_json
from bitinfer.errors import FormatError
from bitinfer.formats import FORMATS, detect
from bitinfer.formats.packed import QUANT_METHOD, Packed, quantization
from bitinfer.packing import words_per_row
from bitinfer.weight import WeightLayout

HALF = 2  # bytes of an fp16 value


@dataclass
class LayerInfo:
    """One linear layer.

    Attributes:
        name: dotted name of the module.
        out_features, in_features: its shape.
        planes, group_size, tensors, norm_eps: its :class:`bitinfer.WeightLayout`.
        nbytes: bytes of signs and scales.
        bits_per_weight: ``8 * nbytes / (out_features * in_features)``.
        zeros: weights that were exactly zero in the source and became +1.
    """

    name: str
    out_features: int
    in_features: int
    planes: int
    group_size: int
    tensors: tuple[str, ...]
    norm_eps: float | None
    nbytes: int
    bits_per_weight: float
    zeros: int = 0


@dataclass
class Storage:
    """The storage table of the FBI-LLM and OneBit papers.

    Attributes:
        fp16_bytes: all weights of the dense model in fp16, the scales of the binary layers left out.
        packed_bytes: all tensors of the packed folder (with fp16 scales where it is still to be converted).
        saving: ``1 - packed_bytes / fp16_bytes``.
        linear_bytes: signs and scales of the packed layers.
        linear_weights: weights of the packed layers.
        extra_values: scales and shifts beside the signs.
        extra_share: those over all values of the model, themselves included.
        bits_per_weight: bits of signs and scales over ``linear_weights``.
        average_bit_width: bits of signs and scales over ``linear_weights + extra_values``, as the papers count.
    """

    fp16_bytes: int
    packed_bytes: int
    saving: float
    linear_bytes: int
    linear_weights: int
    extra_values: int
    extra_share: float
    bits_per_weight: float
    average_bit_width: float


@dataclass
class ModelInfo:
    """What :func:`describe` found.

    Attributes:
        path: the folder.
        packed: whether it is a bitinfer folder; else ``storage`` says what converting it would give.
        format: the source format.
        architecture: ``architectures[0]`` or ``model_type`` of its configuration.
        file_bytes: bytes of the weight files.
        layers: the packed layers, or those that would be.
        dense: name -> bytes of every other tensor.
        act_bits, act_block: how activations are quantised; None and 0 for not at all.
        storage: sizes, measured or (not ``packed``) expected.
        notes: what else a user should know.
    """

    path: str
    packed: bool
    format: str
    architecture: str
    file_bytes: int
    layers: list[LayerInfo]
    dense: dict[str, int]
    act_bits: int | None
    act_block: int
    storage: Storage
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return asdict(self)

    def groups(self) -> list[tuple[str, int, LayerInfo, int]]:
        """Return layers of equal shape and layout as ``(pattern, count, one of them, bytes together)``.

        The pattern has ``*`` for the numbers that differ: ``model.layers.*.self_attn.q_proj``.
        """
        found: dict[Any, list[LayerInfo]] = defaultdict(list)
        for layer in self.layers:
            pattern = ".".join("*" if part.isdecimal() else part for part in layer.name.split("."))
            shape = (layer.out_features, layer.in_features, layer.planes, layer.group_size, layer.tensors)
            found[(pattern, shape, layer.norm_eps)].append(layer)
        return [(key[0], len(same), same[0], sum(x.nbytes for x in same)) for key, same in found.items()]


def describe(path: str | Path) -> ModelInfo:
    """Describe a packed folder, or a source checkpoint and what converting it would give. Weights are not read.

    Raises:
        FormatError: no model folder, or one of an unknown format.
    """
    checkpoint = Checkpoint(path)
    if Packed().matches(checkpoint):
        return _describe_packed(checkpoint, quantization(checkpoint.config))
    return _describe_source(checkpoint)


def packed_quantization(path: str | Path) -> Mapping[str, Any]:
    """Return the ``quantization_config`` of a packed folder.

    Raises:
        FormatError: the folder is missing or not packed.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FormatError(f"{path}: no such folder; write one with: bitinfer convert SRC {path}")
    values = quantization(read_json(folder / "config.json"))
    if values.get("quant_method") != QUANT_METHOD:
        raise FormatError(f"{path}: not a packed folder; run: bitinfer convert {path} {folder.name}-packed")
    return values


def _describe_packed(checkpoint: Checkpoint, values: Mapping[str, Any]) -> ModelInfo:
    packed = Packed()
    zeros = values.get("zeros") or {}
    dense = {name: checkpoint.nbytes(name) for name in checkpoint}
    layers, extra = [], 0
    for name in packed.layer_names(checkpoint):
        key, layout = f"{name}.weight", packed.layout(checkpoint, name)
        parts = [key, *(f"{name}.{t}" for t in layout.tensors)]
        missing = [part for part in parts if part not in dense]
        if missing:
            raise FormatError(f"{checkpoint.path}: tensor {missing[0]} is missing; convert the source again")
        nbytes = sum(dense.pop(part) for part in parts)
        extra += sum(math.prod(checkpoint.shape(part)) for part in parts[1:])
        rows = checkpoint.shape(key)[-2]
        columns = Packed.in_features(checkpoint, name)
        layers.append(_layer(name, rows, columns, layout, nbytes, zeros.get(name, 0)))
    dense_values = sum(math.prod(checkpoint.shape(name)) for name in dense)
    notes = []
    if zeros:
        notes.append(f"{sum(zeros.values())} weights were exactly zero in the source and count as +1")
    act_bits = values.get("act_bits")
    return ModelInfo(
        path=str(checkpoint.path),
        packed=True,
        format=str(values.get("format", "unknown")),
        architecture=_architecture(checkpoint.config),
        file_bytes=sum(file.stat().st_size for file in checkpoint.shards),
        layers=layers,
        dense=dense,
        act_bits=act_bits,
        act_block=values.get("act_block") or 0,
        storage=_storage(layers, extra, dense_values, sum(dense.values())),
        notes=notes,
    )


def _describe_source(checkpoint: Checkpoint) -> ModelInfo:
    notes = []
    try:
        source = detect(checkpoint)
        name = source.name
    except FormatError as error:
        if quantization(checkpoint.config):
            raise
        source, name = FORMATS["latent"], "dense"
        notes += [str(error), "the sizes below are for --format latent: sign and scale, which only approximates it"]
    dense = {key: checkpoint.nbytes(key) for key in checkpoint}
    layers, extra = [], 0
    for layer in source.layer_names(checkpoint):
        if "lm_head" in layer.split("."):  # which convert leaves dense unless told otherwise
            continue
        key = f"{layer}.weight"
        rows, columns = checkpoint.shape(key)
        if not checkpoint.dtype(key).is_floating_point:
            columns *= 8  # OneBit's bytes of signs
        for part in source.consumed(layer):
            if part != f"{layer}.bias":
                dense.pop(part, None)
        scales = [p for p in source.consumed(layer) if p not in (key, f"{layer}.bias") and p in checkpoint]
        # without scales of its own: one for each row, or for FBI-LLM multiplied out two for each column
        values = sum(math.prod(checkpoint.shape(p)) for p in scales) or (2 * columns if name == "fbi_llm" else rows)
        extra += values
        nbytes = 4 * rows * words_per_row(columns) + HALF * values
        layers.append(_layer(layer, rows, columns, WeightLayout(tensors=()), nbytes, 0))
    dense_values = sum(math.prod(checkpoint.shape(key)) for key in dense)
    return ModelInfo(
        path=str(checkpoint.path),
        packed=False,
        format=name,
        architecture=_architecture(checkpoint.config),
        file_bytes=sum(file.stat().st_size for file in checkpoint.shards),
        layers=layers,
        dense=dense,
        act_bits=None,
        act_block=0,
        storage=_storage(layers, extra, dense_values, HALF * dense_values),
        notes=notes,
    )


def _layer(name: str, rows: int, columns: int, layout: WeightLayout, nbytes: int, zeros: int) -> LayerInfo:
    bits = 8 * nbytes / (rows * columns)
    return LayerInfo(
        name, rows, columns, layout.planes, layout.group_size, layout.tensors, layout.norm_eps, nbytes, bits, zeros
    )


def _storage(layers: list[LayerInfo], extra: int, dense_values: int, dense_bytes: int) -> Storage:
    weights = sum(x.out_features * x.in_features for x in layers)
    linear_bytes = sum(x.nbytes for x in layers)
    fp16 = HALF * (weights + dense_values)
    packed = linear_bytes + dense_bytes
    return Storage(
        fp16_bytes=fp16,
        packed_bytes=packed,
        saving=1 - packed / fp16,
        linear_bytes=linear_bytes,
        linear_weights=weights,
        extra_values=extra,
        extra_share=extra / (weights + dense_values + extra),
        bits_per_weight=8 * linear_bytes / max(weights, 1),
        average_bit_width=8 * linear_bytes / max(weights + extra, 1),
    )


def _architecture(config: dict[str, Any]) -> str:
    named = config.get("architectures") or [config.get("model_type", "unknown")]
    return str(named[0])
