"""Checkpoint formats. To add one: a file here, its test, and an entry in ``FORMATS``."""

from bitinfer.checkpoint import Checkpoint
from bitinfer.errors import FormatError
from bitinfer.formats.base import ZERO_LIMIT, Format
from bitinfer.formats.binary_dense import BinaryDense
from bitinfer.formats.fbi_llm import FbiLlm
from bitinfer.formats.latent import Latent
from bitinfer.formats.levels import sample_weight
from bitinfer.formats.onebit import OneBit
from bitinfer.formats.packed import Packed, quantization
from bitinfer.weight import FLOAT_DTYPES

__all__ = ["FORMATS", "ZERO_LIMIT", "Format", "detect"]

# in the order of detection
FORMATS: dict[str, Format] = {f.name: f for f in (Packed(), FbiLlm(), OneBit(), BinaryDense(), Latent())}


def detect(checkpoint: Checkpoint) -> Format:
    """Return the format of a checkpoint, with default options.

    Raises:
        FormatError: it is of none or of several. The message says what was seen and what can be done.
    """
    where = checkpoint.path
    if FORMATS["packed"].matches(checkpoint):
        return FORMATS["packed"]
    method = quantization(checkpoint.config).get("quant_method")
    if method is not None:
        raise FormatError(
            f"{where}: config.json says the weights are quantised by {method!r}, which bitinfer does not read; "
            f"it reads {_known()}"
        )
    marked = [name for name, mark in (("fbi_llm", ".wscale"), ("onebit", ".input_factor")) if _any(checkpoint, mark)]
    if len(marked) > 1:
        raise FormatError(
            f"{where}: some layers have wscale (fbi_llm) and some input_factor (onebit); a folder must be of one format"
        )
    for found in FORMATS.values():
        if found.matches(checkpoint):
            return found
    raise FormatError(f"{where}: {_seen(checkpoint)}")


def _any(checkpoint: Checkpoint, suffix: str) -> bool:
    return any(key.endswith(suffix) for key in checkpoint)


def _known() -> str:
    return ", ".join(FORMATS)


def _seen(checkpoint: Checkpoint) -> str:
    odd = [k for k in checkpoint if k.endswith("_proj.weight") and checkpoint.dtype(k) not in FLOAT_DTYPES]
    if odd:
        return (
            f"{odd[0]} is {checkpoint.dtype(odd[0])} {checkpoint.shape(odd[0])}: weights packed in a format that "
            f"bitinfer does not read; it reads {_known()}"
        )
    name = sample_weight(checkpoint)
    if name is None:
        return (
            "no linear weight is recognised (no floating point matrix ends in _proj.weight); pass format= one of "
            f"{_known()}"
        )
    values = len(checkpoint.tensor(name)[0].unique())
    return (
        f"not a binary model: the first row of {name} takes {values} values and no scales stand beside it; "
        "to approximate a dense model by sign and scale, ask for it: format='latent' (--format latent)"
    )
