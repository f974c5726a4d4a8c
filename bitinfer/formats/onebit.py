"""OneBit: ``y = LayerNorm_N(weight_scale * (S (input_factor * x))) + bias`` (arXiv 2402.11295).

Two kinds of folder: the packed ones that are released, int8 ``[N, K/8]`` with bit ``j`` of byte ``m`` set where
``W[n, 8m + j] < 0``, whose bytes are our words already; and training checkpoints with the latent weight as floats. The
LayerNorm has no parameters and eps 1e-5; nothing of it is stored. The model is a LLaMA under the name ``bitllama``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitinfer.checkpoint import Checkpoint
from bitinfer.errors import FormatError
from bitinfer.formats.base import Format, check_matrix, dense_linear, get_bias, get_tensor, get_vector, pack_latent
from bitinfer.formats.modules import check_one_way
from bitinfer.weight import BinaryWeight

NORM_EPS = 1e-5
PARTS = ("weight", "weight_scale", "input_factor")
LLAMA_KEYS = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "pretraining_tp",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "head_dim",
    "dtype",
    "torch_dtype",
}


@dataclass(frozen=True)
class OneBit(Format):
    """OneBit's packed releases and its training checkpoints."""

    name = "onebit"
    description = "OneBit: int8 signs (or latent weights) with weight_scale and input_factor, a LayerNorm per layer"

    def matches(self, checkpoint: Checkpoint) -> bool:
        return any(key.endswith(".input_factor") for key in checkpoint)

    def layer_names(self, checkpoint: Checkpoint) -> list[str]:
        stems = dict.fromkeys(
            key.removesuffix(suffix)
            for suffix in (".input_factor", ".weight_scale")
            for key in checkpoint
            if key.endswith(suffix)
        )
        for stem in stems:
            for part in PARTS:
                if f"{stem}.{part}" not in checkpoint:
                    raise FormatError(f"{stem}.{part} is missing, though the layer's other OneBit tensors are there")
        weights = [key.removesuffix(".weight") for key in checkpoint if key.endswith(".weight")]
        others = [name for name in weights if name not in stems]
        check_one_way(stems, others, self.name, "weight_scale and input_factor")
        return [name for name in weights if name in stems]

    def consumed(self, prefix: str) -> tuple[str, ...]:
        return tuple(f"{prefix}.{part}" for part in (*PARTS, "bias"))

    def config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the configuration as one of LLaMA: only its authors' fork of transformers knows ``bitllama``."""
        config = super().config(checkpoint)
        if config.get("model_type") != "bitllama":
            return config
        kept = {key: value for key, value in config.items() if key in LLAMA_KEYS}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            # the defaults of BitLlamaConfig, written out so that they do not hang on those of LlamaConfig
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "tie_word_embeddings": False,
            **kept,
        }

    def read_counted(self, tensors: Mapping[str, Tensor], prefix: str) -> tuple[BinaryWeight, int]:
        weight = get_tensor(tensors, f"{prefix}.weight")
        rows, columns = _shape(weight, prefix)
        scale = get_vector(tensors, f"{prefix}.weight_scale", (rows, 1), ((rows,), (rows, 1)))
        in_scale = get_vector(tensors, f"{prefix}.input_factor", (1, columns), ((columns,), (1, columns)))
        zeros = 0
        if weight.dtype == torch.int8:
            signs = _words(weight)
        else:
            signs, zeros = pack_latent(weight, f"{prefix}.weight", self.zero_limit)
        bias = get_bias(tensors, prefix, rows)
        return BinaryWeight(signs, columns, scale, in_scale, bias=bias, norm_eps=NORM_EPS), zeros

    def reference_linear(self, tensors: Mapping[str, Tensor], prefix: str) -> nn.Module:
        """Return ``Sequential(linear, LayerNorm)``: the bias is added after the norm, so it is the norm's."""
        weight = get_tensor(tensors, f"{prefix}.weight")
        rows, columns = _shape(weight, prefix)
        if weight.dtype == torch.int8:
            octets = weight.contiguous().view(torch.uint8).numpy()
            signs = torch.from_numpy(1.0 - 2.0 * np.unpackbits(octets, axis=1, bitorder="little").astype(np.float32))
        else:
            signs = torch.sign(weight.float())
        scale, factor = (tensors[f"{prefix}.{part}"].float() for part in ("weight_scale", "input_factor"))
        linear = dense_linear(scale.reshape(rows, 1) * signs * factor.reshape(1, columns), None)
        norm = nn.LayerNorm(rows, eps=NORM_EPS).requires_grad_(False)  # ones and zeros: as good as no parameters
        if f"{prefix}.bias" in tensors:
            norm.bias = nn.Parameter(tensors[f"{prefix}.bias"].float(), requires_grad=False)
        return nn.Sequential(linear, norm)


def _shape(weight: Tensor, prefix: str) -> tuple[int, int]:
    """Return (N, K), of a packed weight as of a latent one."""
    if weight.dtype != torch.int8:
        check_matrix(weight, f"{prefix}.weight")
        return weight.shape[0], weight.shape[1]
    if weight.dim() != 2 or not weight.numel():
        raise FormatError(
            f"{prefix}.weight has shape {tuple(weight.shape)}, expected int8 [out_features, in_features / 8]"
        )
    return weight.shape[0], 8 * weight.shape[1]


def _words(octets: Tensor) -> Tensor:
    """View int8 ``[N, K/8]`` as uint32 words, without a copy where K is a multiple of 32 and the bytes are aligned."""
    octets = nn.functional.pad(octets, (0, -octets.shape[1] % 4)) if octets.shape[1] % 4 else octets.contiguous()
    if octets.data_ptr() % 4 or octets.storage_offset() % 4:
        octets = octets.clone()
    return octets.view(torch.uint32)
