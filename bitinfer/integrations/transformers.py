"""The transformers integration: ``quant_method`` "bitinfer" for ``from_pretrained`` and ``save_pretrained``.

A packed folder loads as it is: the linear layers of the skeleton become :class:`bitinfer.BinaryLinear` on the meta
device before a tensor is read, so that no dense weight ever exists. A dense folder is packed while it loads, tensor by
tensor, when a :class:`BitinferConfig` is passed. Importing this module registers both classes.
"""

import warnings
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from bitinfer.errors import FormatError
from bitinfer.formats.packed import QUANT_METHOD
from bitinfer.integrations.config import BitinferConfig, spellings
from bitinfer.integrations.loading import check_files, check_loaded, packed_layers
from bitinfer.integrations.tensor_parallel import check_split, extend_plan, gather_words
from bitinfer.nn import BinaryLinear
from bitinfer.weight import FLOAT_DTYPES, WeightLayout

__all__ = ["BitinferConfig", "BitinferQuantizer"]


class BitinferQuantizer(HfQuantizer):
    """Builds, fills, checks and takes apart the packed layers of a transformers model.

    Attributes:
        zeros: while a dense folder is packed, module name -> weights that were exactly 0.
        error: the first error met in packing.
    """

    requires_calibration = False
    quantization_config: BitinferConfig

    def __init__(self, quantization_config: BitinferConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.zeros: dict[str, int] = {}
        self.error: FormatError | None = None

    # what the model can do

    def is_serializable(self) -> bool:
        """Return True: ``save_pretrained`` writes the packed tensors as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: signs have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """True: the ops are opaque to ``torch.compile`` and break no graph."""
        return True

    # sizes and dtypes

    @property
    def quantized_element_size(self) -> float:
        """Bytes that a weight will take once it is packed."""
        return 1 / 8

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        """Return the bytes per element with which ``device_map="auto"`` plans."""
        return self.quantized_element_size if self.param_needs_quantization(model, param_name) else param.element_size()

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return ``dtype``, or refuse one in which no packed layer computes."""
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype must be float32, float16 or bfloat16 for packed layers, got {dtype}")
        return dtype

    # before the tensors are read

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            self._place_stored_layers(model)
            check_files(model, checkpoint_files)
        else:
            self._place_layers_to_pack(model)
        for plan in ("tp_plan", "ep_plan"):
            extend_plan(model, getattr(model, plan, None) or {})

    def _place_stored_layers(self, model: nn.Module) -> None:
        """Put packed layers where the configuration says that the folder has them."""
        config, prefix = self.quantization_config, str(getattr(model, "base_model_prefix", ""))
        listed = config.modules_to_not_convert
        dense = set(listed if listed is not None else self.get_modules_to_not_convert(model))
        tied = _tied_modules(model)
        layouts = {
            name: config.layout_of(name, prefix)
            for name, _ in _linear_layers(model)
            if not dense.intersection(spellings(name, prefix))
        }
        for name in layouts:
            if name in tied:
                raise FormatError(
                    f"{name} is tied to another layer by config.json, yet quantization_config does not list it in "
                    "modules_to_not_convert: weights and configuration do not belong together"
                )
        self._place(model, layouts)

    def _place_layers_to_pack(self, model: nn.Module) -> None:
        """Put placeholders for the layers of a dense model, and write down what will have been done."""
        config = self.quantization_config
        group_size = WeightLayout.from_dict(config.layout).group_size
        if WeightLayout.from_dict(config.layout) != WeightLayout(group_size=group_size) or config.layouts:
            raise ValueError(
                f"BitinferConfig: layout={config.layout}, layouts={config.layouts} cannot be made while loading, which "
                "gives signs and mean absolute values and takes group_size alone; for more run: bitinfer convert"
            )
        if getattr(getattr(model.config, "distributed_config", None), "tp_size", 1) not in (None, 1):
            raise ValueError(
                "packing while loading does not work under tensor parallelism, where no process sees a whole row; "
                "run: bitinfer convert SRC DST --format latent, and load the packed folder"
            )
        _warn_of_experts(model)
        skip = self.get_modules_to_not_convert(
            model, config.modules_to_not_convert, getattr(model, "_keep_in_fp32_modules", None)
        )
        tied = _tied_modules(model)
        layouts: dict[str, WeightLayout] = {}
        left = []
        for name, linear in _linear_layers(model):
            # other code relies on what a subclass of nn.Linear is
            if type(linear) is nn.Linear and name not in tied and not _matches(name, skip):
                layouts[name] = WeightLayout(group_size=group_size if group_size < linear.in_features else 0)
            else:
                left.append(name)
        shared = WeightLayout(group_size=group_size)
        config.format = "latent"
        config.layouts = {name: layout.to_dict() for name, layout in layouts.items() if layout != shared}
        config.modules_to_not_convert = left
        self._place(model, layouts)

    def _place(self, model: nn.Module, layouts: Mapping[str, WeightLayout]) -> None:
        config = self.quantization_config
        done: dict[nn.Module, BinaryLinear] = {}  # a layer that stands at several places stays one layer
        for name, layout in layouts.items():
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            if linear not in done:
                dtype = linear.weight.dtype
                packed = BinaryLinear(
                    linear.in_features,
                    linear.out_features,
                    linear.bias is not None,
                    layout=layout,
                    act_bits=config.act_bits,
                    act_block=config.act_block,
                    device="meta",
                    dtype=dtype,
                ).train(linear.training)
                if not self.pre_quantized:
                    # transformers casts the dense tensor to the dtype of the parameter that it replaces, and plans
                    # memory by its shape
                    packed.weight = nn.Parameter(torch.empty_like(linear.weight), requires_grad=False)
                done[linear] = packed
            model.set_submodule(name, done[linear])

    # packing while loading

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Return whether a tensor of a dense folder is to be packed."""
        if self.pre_quantized:
            return False
        module, part = get_module_from_name(model, param_name)
        return isinstance(module, BinaryLinear) and part == "weight"

    def get_quantize_ops(self) -> Any:
        """Return the operation that packs one weight."""
        from bitinfer.integrations.pack_on_load import PackOnLoad  # imports parts of transformers that import this

        return PackOnLoad(self)

    def get_weight_conversions(self) -> list[Any]:
        """Return what makes floats of the matrices that the folder holds in 8 bits."""
        from bitinfer.integrations.rows_on_load import row_converter

        return [row_converter(name, self) for name in self.quantization_config.int8_rows or ()]

    # after the tensors are read

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.error is not None:
            raise self.error
        check_loaded(model)
        check_split(model)
        for layer in packed_layers(model).values():
            layer.requires_grad_(False)
        if self.zeros:
            self.quantization_config.zeros = dict(self.zeros)
            worst = max(self.zeros, key=lambda name: self.zeros[name])
            warnings.warn(
                f"bitinfer: {sum(self.zeros.values())} weights are exactly 0, which a bit cannot hold, and became +1 "
                f"(most in {worst}: {self.zeros[worst]})",
                stacklevel=2,
            )
        return model

    # saving, and back to dense

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Return what ``save_pretrained`` writes where it cannot collect that itself."""
        return gather_words(model), {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        """Replace packed layers by dense ones that compute the same; a layer with a norm becomes a Sequential."""
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        done: dict[nn.Module, nn.Module] = {}
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if isinstance(module, BinaryLinear):
                if hasattr(module.weight, "placements"):
                    raise ValueError(
                        f"dequantize: {name} is split over several processes; load without tensor parallelism"
                    )
                if module not in done:
                    done[module] = module.dequantize(dtype)
                model.set_submodule(name, done[module])
        return model


def _linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)]


def _tied_modules(model: nn.Module) -> set[str]:
    """Return the names of the modules whose weights are those of others."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {key.rpartition(".")[0] for pair in tied.items() for key in pair}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(f".{p}." in f".{name}." or fnmatchcase(name, p) for p in patterns)


def _warn_of_experts(model: nn.Module) -> None:
    experts = [(n, p) for n, p in model.named_parameters() if p.dim() == 3 and "expert" in n]
    if experts:
        share = sum(p.numel() for _, p in experts) / max(1, sum(p.numel() for p in model.parameters()))
        warnings.warn(
            f"bitinfer: {len(experts)} expert tensors ({share:.0%} of the parameters, e.g. {experts[0][0]}) are no "
            "nn.Linear layers and stay dense",
            stacklevel=2,
        )


def _register() -> None:
    """Enter both classes into transformers' tables, once."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(BitinferConfig)
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(QUANT_METHOD)(BitinferQuantizer)
    # the table of configurations that may override parts of a stored one; it has no function to add to it
    kinds = getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", ())
    if not issubclass(BitinferConfig, kinds):
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*kinds, BitinferConfig)


_register()
