"""Checks around the loading of packed layers: what transformers would only warn of, or not notice, is an error here.

transformers fills a parameter that no file holds with random values and prints a report; and when a quantizer is at
work, 5.17 compares no shapes. A packed layer that is not what the file says computes noise, so it must not load.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bitinfer.errors import FormatError
from bitinfer.formats.base import check_finite
from bitinfer.integrations.config import spellings
from bitinfer.nn import BinaryLinear
from bitinfer.packing import WORD_BITS
from bitinfer.weight import TENSOR_NAMES

PARTS = frozenset(TENSOR_NAMES.values())
FLOATS = ("F32", "F16", "BF16")


def packed_layers(model: nn.Module) -> dict[str, BinaryLinear]:
    """Return the packed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BinaryLinear)}


def check_files(model: nn.Module, files: Iterable[str] | None) -> None:
    """Compare the headers of safetensors files with the packed skeleton, before a tensor is read.

    Tensors whose names transformers converts are not found here; :func:`check_loaded` sees the result.

    Raises:
        FormatError: a file is damaged, a tensor has another shape or dtype than the layer, a layer's file holds a
            tensor that its layout does not have, or a packed weight belongs to a layer that is to stay dense.
    """
    modules = dict(model.named_modules())
    prefix = getattr(model, "base_model_prefix", "")
    for file in files or ():
        if not str(file).endswith(".safetensors"):
            continue
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (not a dictionary)
                    owner, _, part = key.rpartition(".")
                    module = next((modules[n] for n in spellings(owner, prefix) if n in modules), None)
                    if part in PARTS and module is not None:
                        stored = opened.get_slice(key)
                        _check_stored(key, part, module, tuple(stored.get_shape()), stored.get_dtype(), file)
        except SafetensorError as error:
            raise FormatError(f"{file}: not a complete safetensors file ({error}); copy or convert it again") from None


def _check_stored(key: str, part: str, module: nn.Module, shape: tuple[int, ...], dtype: str, file: str) -> None:
    if not isinstance(module, BinaryLinear):
        if isinstance(module, nn.Linear) and part == "weight" and dtype == "U32":
            raise FormatError(
                f"{file}: {key} is packed, but quantization_config lists its layer in modules_to_not_convert; "
                "weights and configuration do not belong together"
            )
        return
    expected = getattr(module, part)
    if expected is None:
        what = "the model has no such bias" if part == "bias" else f"its layout in config.json is {module.layout}"
        raise FormatError(f"{file}: {key} {shape} is stored, but {what}")
    wanted = ("U32",) if part == "weight" else FLOATS
    if shape != tuple(expected.shape) or dtype not in wanted:
        dense = part == "weight" and dtype in FLOATS
        hint = (
            "a dense weight: list its layer in modules_to_not_convert, or run: bitinfer convert SRC DST"
            if dense
            else "weights and configuration do not belong together"
        )
        raise FormatError(
            f"{file}: {key} is {dtype} {shape}, but {module.in_features} inputs, {module.out_features} outputs and "
            f"{module.layout} need {' or '.join(wanted)} {tuple(expected.shape)}; {hint}"
        )


def check_loaded(model: nn.Module) -> None:
    """Check every parameter of every packed layer after loading.

    Raises:
        FormatError: a tensor came from no file, has a wrong shape or dtype, holds NaN or infinity, or words have bits
            set past the last column.
    """
    for name, module in packed_layers(model).items():
        shapes: Mapping[str, Any] = {
            **module.layout.shapes(module.in_features, module.out_features),
            "bias": (module.out_features,),
        }
        for part, parameter in module.named_parameters(recurse=False):
            key = f"{name}.{part}"
            if parameter.is_meta:  # on disk, and read at every use
                continue
            if not getattr(parameter, "_is_hf_initialized", False):
                raise FormatError(
                    f"{key} is in none of the weight files: the folder is incomplete, or does not hold this model; "
                    "a layer that is meant to be dense has to stand in modules_to_not_convert"
                )
            wanted = torch.uint32 if part == "weight" else None
            if tuple(parameter.shape) != shapes[part] or (wanted is not None and parameter.dtype != wanted):
                raise FormatError(
                    f"{key} is {parameter.dtype} {tuple(parameter.shape)}, but {module.in_features} inputs, "
                    f"{module.out_features} outputs and {module.layout} need {wanted or 'floats'} {shapes[part]}"
                )
            if part == "weight":
                _check_padding(key, parameter.detach(), module.in_features)
            else:
                check_finite(local(parameter.detach()), f"{key}, loaded as {parameter.dtype},")


def _check_padding(key: str, words: Tensor, in_features: int) -> None:
    """Raise FormatError if bits past the last column are set; a weight that is split by columns has none to look at."""
    tail = in_features % WORD_BITS
    if tail and not hasattr(words, "placements") and (words[..., -1].view(torch.int32) >> tail).any():
        raise FormatError(f"{key} has bits set past column {in_features}: the words are damaged")


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that is spread over several, or the tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
