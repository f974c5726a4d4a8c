"""The operation that makes floats of matrices stored in 8 bits, as transformers hands them over."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from bitinfer.errors import FormatError
from bitinfer.int8_rows import ROW_SCALE, restore_rows, round_rows


def row_converter(module: str, quantizer: Any) -> WeightConverter:
    """Return what reads ``<module>.weight`` in 8 bits, and writes it so again."""
    weight = f"{module}.weight"
    # the longer name first: the shorter one is found in it as well
    return WeightConverter([weight + ROW_SCALE, weight], [weight], [RestoreRows(quantizer)])


class RestoreRows(ConversionOps):
    """Turns codes and scales of rows into a matrix in the dtype that the model has for it."""

    def __init__(self, quantizer: Any) -> None:
        self.hf_quantizer = quantizer  # by which transformers knows that the tensors must come as they are stored

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Return the matrix under the pattern of its name."""
        assert model is not None
        scale, weight = source_patterns
        missing = [name for name in source_patterns if name not in input_dict]
        if missing:
            raise FormatError(f"{missing[0]} is missing, without which {weight} means nothing; copy the folder again")
        matrix = restore_rows(_only(input_dict[weight]), _only(input_dict[scale]))
        return {target_patterns[0]: matrix.to(model.get_parameter(full_layer_name).dtype)}

    @property
    def reverse_op(self) -> "RoundRows":
        """What ``save_pretrained`` does."""
        return RoundRows(self.hf_quantizer)


class RoundRows(ConversionOps):
    """The inverse of :class:`RestoreRows`: exact for what came from it and is still float32."""

    def __init__(self, quantizer: Any) -> None:
        self.hf_quantizer = quantizer

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return codes and scales under the patterns of their names."""
        (value,) = input_dict.values()
        codes, scale = round_rows(_only(value))
        return dict(zip(target_patterns, (scale, codes), strict=True))

    @property
    def reverse_op(self) -> RestoreRows:
        """What ``from_pretrained`` does."""
        return RestoreRows(self.hf_quantizer)


def _only(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value
