"""BitinferConfig: the ``quantization_config`` of a packed folder, and what a user passes to ``from_pretrained``."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from bitinfer.checks import ACT_BITS, BLOCK_SIZE
from bitinfer.errors import FormatError
from bitinfer.formats.packed import LAYOUT_VERSION, QUANT_METHOD
from bitinfer.weight import WeightLayout

ACTIVATION_FIELDS = ("act_bits", "act_block")


class _Unset:
    def __repr__(self) -> str:
        return "as stored"


_UNSET: Any = _Unset()


class BitinferConfig(QuantizationConfigMixin):
    """How a model is packed, and how its packed layers treat activations.

    Passed with a dense folder it packs while loading: signs, and the mean absolute value per row or group. Passed with
    a packed folder, ``act_bits`` and ``act_block`` replace the stored ones where given, and nothing else is used.

    Args:
        act_bits: None computes with activations as they come; 8, 4, 2 or 1 quantises them first.
        act_block: 0 for one activation scale per token, 256 for one per block of 256 columns.
        layout: the :class:`bitinfer.WeightLayout` that most layers share, or its dictionary. To pack while loading
            only ``group_size`` may differ from the default.
        layouts: layouts of the layers that differ, by module name.
        modules_to_not_convert: in a packed folder, the names of all linear layers that stay dense. To pack while
            loading: names, parts of names between dots, or patterns with ``*``; by default the output layer and all
            that is tied.
        format: name of the format that the weights came from.
        zeros: module name -> how many of its weights were exactly 0 and became +1.
        source: file name -> SHA-256 of the source's weight files.
        int8_rows: names of the embeddings and heads that the folder holds in 8 bits; see :mod:`bitinfer.int8_rows`.
        layout_version: of the tensors on disk.

    Raises:
        FormatError: ``layout_version`` is newer than this bitinfer.
        TypeError, ValueError: a field has the wrong type or value, or is unknown. The message names it.
    """

    def __init__(
        self,
        act_bits: int | None = _UNSET,
        act_block: int = _UNSET,
        *,
        layout: WeightLayout | Mapping[str, Any] | None = None,
        layouts: Mapping[str, WeightLayout | Mapping[str, Any]] | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        format: str | None = None,
        zeros: Mapping[str, int] | None = None,
        source: Mapping[str, str] | None = None,
        int8_rows: Sequence[str] | None = None,
        layout_version: int = LAYOUT_VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise ValueError(f"BitinferConfig: quant_method must be {QUANT_METHOD!r}, got {quant_method!r}")
        _check("layout_version", layout_version, int)
        if layout_version > LAYOUT_VERSION:  # before all else: the rest may be new as well
            raise FormatError(
                f"quantization_config: layout_version {layout_version}, written by a newer bitinfer; this one reads up "
                f"to {LAYOUT_VERSION}: pip install -U bitinfer"
            )
        if layout_version < 1:
            raise ValueError(f"BitinferConfig: layout_version must be at least 1, got {layout_version}")
        if unknown:
            raise TypeError(f"BitinferConfig: unknown fields {sorted(unknown)}")
        # quant_method stays a plain string: transformers' enumeration has no member for it
        self.quant_method: str = QUANT_METHOD
        self.layout_version = layout_version
        self.format = _optional("format", format, str)
        self.layout = _layout("layout", layout or {}).to_dict()
        self.layouts = {
            name: _layout(f"layouts[{name!r}]", values).to_dict()
            for name, values in _mapping("layouts", layouts or {}, (WeightLayout, Mapping)).items()
        }
        self.modules_to_not_convert = _names("modules_to_not_convert", modules_to_not_convert)
        self._given = tuple(
            name for name, value in zip(ACTIVATION_FIELDS, (act_bits, act_block), strict=True) if value is not _UNSET
        )
        self.act_bits = None if act_bits is _UNSET else _optional("act_bits", act_bits, int)
        self.act_block = 0 if act_block is _UNSET else _check("act_block", act_block, int)
        if self.act_bits is not None and self.act_bits not in ACT_BITS:
            raise ValueError(f"BitinferConfig: act_bits must be None or one of {ACT_BITS}, got {act_bits!r}")
        if self.act_block not in (0, BLOCK_SIZE):
            raise ValueError(f"BitinferConfig: act_block must be 0 or {BLOCK_SIZE}, got {act_block!r}")
        self.zeros = None if zeros is None else _mapping("zeros", zeros, int)
        self.source = None if source is None else _mapping("source", source, str)
        self.int8_rows = _names("int8_rows", int8_rows)

    def layout_of(self, name: str, base_model_prefix: str = "") -> WeightLayout:
        """Return the layout of a module, whose name may lack or have the base model's prefix in comparison."""
        found = next((self.layouts[n] for n in spellings(name, base_model_prefix) if n in self.layouts), self.layout)
        return WeightLayout.from_dict(found)

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return the activation fields that were given, which replace those of a packed folder."""
        return {name: getattr(self, name) for name in self._given}

    def to_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` holds."""
        values = {name: value for name, value in self.__dict__.items() if not name.startswith("_")}
        return copy.deepcopy({n: v for n, v in values.items() if v is not None or n in ACTIVATION_FIELDS})

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


def spellings(name: str, base_model_prefix: str) -> tuple[str, ...]:
    """Return the names under which a module may be known: a folder may hold the base model or the model around it."""
    if not base_model_prefix:
        return (name,)
    return (name, name.removeprefix(f"{base_model_prefix}."), f"{base_model_prefix}.{name}")


def _check(name: str, value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise TypeError(f"BitinferConfig: {name} must be {wanted}, got {value!r} ({type(value).__name__})")
    return value


def _optional(name: str, value: Any, kind: type) -> Any:
    return None if value is None else _check(name, value, kind)


def _mapping(name: str, values: Any, kind: type | tuple[type, ...]) -> dict[str, Any]:
    _check(name, values, Mapping)
    return {_check(f"a key of {name}", key, str): _check(f"{name}[{key!r}]", v, kind) for key, v in values.items()}


def _layout(name: str, values: WeightLayout | Mapping[str, Any]) -> WeightLayout:
    if isinstance(values, WeightLayout):
        return values
    _check(name, values, Mapping)
    for field in ("planes", "group_size"):
        if field in values:
            _check(f"{name}[{field!r}]", values[field], int)
    try:
        return WeightLayout.from_dict(values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"BitinferConfig: {name} is not valid: {error}") from None


def _names(field: str, values: Sequence[str] | None) -> list[str] | None:
    if values is None:
        return None
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"BitinferConfig: {field} must be a list of names, got {values!r}")
    return [_check(f"an entry of {field}", name, str) for name in values]
