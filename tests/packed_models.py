"""Tiny transformers models with random packed layers, in memory and as folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from bitinfer import BinaryLinear, BinaryWeight, WeightLayout, replace_linear
from bitinfer.packing import pack_signs

# 96 columns are whole words; 200 leave a part of a word, and of a group of 128
SIZES: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS = torch.arange(20).reshape(2, 10) * 3


def llama(tied: bool = False, bias: bool = False, **sizes: Any) -> PreTrainedModel:
    """Return a dense Llama with grouped queries, or a Qwen2, which has biases, with weights far from zero."""
    torch.manual_seed(0)
    values = {**SIZES, "tie_word_embeddings": tied, **sizes}
    model = Qwen2ForCausalLM(Qwen2Config(**values)) if bias else LlamaForCausalLM(LlamaConfig(**values))
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def random_weight(linear: nn.Linear, layout: WeightLayout, generator: torch.Generator) -> BinaryWeight:
    """Return random signs and scales in the shape of a dense layer, whose bias stays."""
    tensors = {}
    for name, shape in layout.shapes(linear.in_features, linear.out_features).items():
        values = torch.randn((*shape[:-1], linear.in_features) if name == "weight" else shape, generator=generator)
        mean = 0.0 if name.endswith("shift") else 0.2
        tensors[name] = pack_signs(values) if name == "weight" else mean + 0.05 * values
    if linear.bias is not None:
        tensors["bias"] = linear.bias.detach()
    return BinaryWeight.from_tensors(tensors, linear.in_features, layout)


def pack(
    model: PreTrainedModel,
    layout: WeightLayout | Callable[[str], WeightLayout],
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> PreTrainedModel:
    """Pack a dense model in place with random weights, and say so in its configuration; cast its parameters."""
    generator = torch.Generator().manual_seed(1)
    layout_of = layout if callable(layout) else lambda name: layout
    report = replace_linear(
        model, binarize=lambda name, linear: random_weight(linear, layout_of(name), generator), skip=("lm_head",)
    )
    for parameter in model.parameters():  # the buffers of rotary embeddings stay float32, as they do in loading
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    first = layout_of(report.replaced[0])
    model.config.quantization_config = {
        "quant_method": "bitinfer",
        "layout_version": 1,
        "format": "test",
        "layout": first.to_dict(),
        "layouts": {n: layout_of(n).to_dict() for n in report.replaced if layout_of(n) != first},
        "modules_to_not_convert": list(report.skipped),
        "act_bits": None,
        "act_block": 0,
        **fields,
    }
    for module in model.modules():
        if isinstance(module, BinaryLinear):
            module.act_bits, module.act_block = fields.get("act_bits"), fields.get("act_block", 0)
    return model


def save(model: PreTrainedModel, folder: Path, **kwargs: Any) -> Path:
    """Write a model and return its folder."""
    model.save_pretrained(folder, **kwargs)
    return folder


def logits(model: nn.Module) -> torch.Tensor:
    """Return the logits of a fixed input."""
    with torch.no_grad():
        return model(IDS.to(model.device)).logits


def packed_names(model: nn.Module) -> list[str]:
    """Return the names of the packed layers."""
    return [name for name, module in model.named_modules() if isinstance(module, BinaryLinear)]
