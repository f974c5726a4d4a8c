"""Tiny packed models on the GPU for the tests of its decoder layers."""

from typing import Any

import torch
from packed_models import llama, pack
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from bitinfer.testing.problems import FBI, GROUPS, ONEBIT, ROW

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
}
KINDS = {
    "fbi": ("llama", FBI),
    "onebit": ("llama", ONEBIT),
    "row": ("llama", ROW),
    "groups": ("llama", GROUPS),
    "biases": ("qwen2", FBI),
    "qwen3": ("qwen3", FBI),
}


def model_of(kind: str, act_bits: int | None, dtype: torch.dtype = torch.float16, **sizes: Any) -> Any:
    """Return a tiny packed model on the GPU, with column factors of every projection's own."""
    family, layout = KINDS[kind]
    sizes = {**SIZES, **sizes}
    if family == "qwen3":
        torch.manual_seed(0)
        base = {"vocab_size": 80, "num_hidden_layers": 2, "tie_word_embeddings": False}
        model: Any = Qwen3ForCausalLM(Qwen3Config(**{**base, **sizes})).eval()
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.2, mean=1.0 if name.endswith("norm.weight") else 0.0)
    else:
        model = llama(bias=family == "qwen2", **sizes)
    return pack(model, layout, dtype=dtype, act_bits=act_bits).cuda()


def prompts(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    ids = torch.randint(3, 80, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths).unsqueeze(1)
    return {"input_ids": ids.where(mask, 0).cuda(), "attention_mask": mask.long().cuda()}
