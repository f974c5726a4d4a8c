"""The operation that packs a dense weight as transformers hands it over, one tensor at a time."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from bitinfer.errors import FormatError
from bitinfer.formats.latent import Latent
from bitinfer.nn import BinaryLinear

if TYPE_CHECKING:
    from bitinfer.integrations.transformers import BitinferQuantizer


class PackOnLoad(ConversionOps):
    """Turns ``X.weight`` into uint32 words and ``X.weight_scale``, as ``bitinfer convert --format latent`` does.

    transformers turns an exception in here into a line of a report and goes on, so the first error is kept with the
    quantizer, which raises it when loading is over; until then the layers get empty words.
    """

    def __init__(self, quantizer: "BitinferQuantizer") -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *args: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return the tensors by full parameter name; those of layers that stay dense pass through."""
        assert model is not None
        out: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            dense = value[0] if isinstance(value, list) else value
            prefix = name.rpartition(".")[0]
            module = model.get_submodule(prefix)
            if isinstance(module, BinaryLinear) and name.endswith(".weight"):
                out.update(self._pack(prefix, module, dense))
            else:
                out[name] = dense
        return out

    def _pack(self, prefix: str, module: BinaryLinear, dense: Tensor) -> dict[str, Tensor]:
        name = f"{prefix}.weight"
        shapes = module.layout.shapes(module.in_features, module.out_features)
        scale = module.weight_scale
        assert scale is not None
        if self.quantizer.error is None:
            try:
                if tuple(dense.shape) != (module.out_features, module.in_features):
                    raise FormatError(
                        f"{name} has shape {tuple(dense.shape)}, but the model needs "
                        f"{(module.out_features, module.in_features)}"
                    )
                reader = Latent(group_size=module.layout.group_size)
                weight, zeros = reader.read_counted({name: dense.cpu()}, prefix)
            except FormatError as error:
                self.quantizer.error = error
            else:
                if zeros:
                    self.quantizer.zeros[prefix] = zeros
                assert weight.scale is not None
                signs = weight.signs.to(dense.device)
                return {name: signs, f"{name}_scale": weight.scale.to(dense.device, scale.dtype)}
        return {
            name: torch.zeros(shapes["weight"], dtype=torch.uint32, device=dense.device),
            f"{name}_scale": torch.zeros(shapes["weight_scale"], dtype=scale.dtype, device=dense.device),
        }
