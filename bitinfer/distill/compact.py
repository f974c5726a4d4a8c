"""A packed folder whose embedding is stored in 8 bits: in a small model it outweighs the rest.

``model.safetensors`` is that of a packed folder but for matrices that stay dense (the embedding, the head): they are
int8 ``[V, D]`` with a float16 scale per row, under ``<name>`` and ``<name>.row_scale``. They are made floats again when
the model is loaded; the binary layers stay packed.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitinfer.checkpoint import Checkpoint, read_json
from bitinfer.errors import FormatError
from bitinfer.formats import FORMATS
from bitinfer.output_folder import new_folder

ROW_SCALE = ".row_scale"
NAMES = ("model.embed_tokens.weight", "lm_head.weight")


def round_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(int8 [V, D], float16 [V, 1])`` whose product is nearest to ``matrix``, 127 being a row's largest."""
    scale = (matrix.float().abs().amax(1, keepdim=True) / 127).clamp_min(2.0**-24).half()
    return (matrix.float() / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def write_compact(packed: str | Path, dst: str | Path, *, overwrite: bool = False) -> int:
    """Copy a packed folder with its embedding and head rounded to int8; return the bytes of all files.

    Raises:
        FormatError: ``packed`` is no packed folder.
    """
    checkpoint = Checkpoint(packed)
    if not FORMATS["packed"].matches(checkpoint):
        raise FormatError(f"{packed}: not packed by bitinfer; run: bitinfer convert {packed} DST")
    tensors: dict[str, Tensor] = {}
    for name in checkpoint:
        if name in NAMES and checkpoint[name].is_floating_point():
            tensors[name], tensors[name + ROW_SCALE] = round_rows(checkpoint[name])
        else:
            tensors[name] = checkpoint[name].clone()
    dst = Path(dst)
    with new_folder(dst, overwrite) as folder:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(checkpoint.config, indent=2) + "\n")
        for file in checkpoint.aux_files():
            shutil.copyfile(file, folder / file.name)
    return sum(file.stat().st_size for file in dst.iterdir())


def load_compact(folder: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a folder that :func:`write_compact` wrote: the model in evaluation mode and its tokenizer, without network.

    Raises:
        FormatError: the folder is not one of those, or a scale is missing.
    """
    import transformers

    import bitinfer.integrations.transformers  # noqa: F401  registers the packed format

    folder = Path(folder)
    values = read_json(folder / "config.json")
    stored = load_file(folder / "model.safetensors")
    state = {name: tensor for name, tensor in stored.items() if not name.endswith(ROW_SCALE)}
    for name in NAMES:
        if name in state and state[name].dtype == torch.int8:
            if name + ROW_SCALE not in stored:
                raise FormatError(f"{folder}: {name}{ROW_SCALE} is missing; copy the folder again")
            state[name] = (state[name].float() * stored[name + ROW_SCALE].float()).to(dtype)
    if not any(name.endswith(ROW_SCALE) for name in stored):
        raise FormatError(f"{folder}: no tensor is stored in 8 bits; open it with bitinfer.load")
    config = transformers.AutoConfig.for_model(**values)
    model = transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def compact_bytes(config: Any, scale_bytes: int = 2) -> int:
    """Return the bytes of the tensors of a compact FBI-style LLaMA of some shape, embedding and head included."""
    width, inner = config.hidden_size, config.intermediate_size
    size = getattr(config, "head_dim", None) or width // config.num_attention_heads
    inside, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    shapes = [
        (inside, width),
        (keys, width),
        (keys, width),
        (width, inside),
        (inner, width),
        (inner, width),
        (width, inner),
    ]
    layer = sum(4 * rows * math.ceil(columns / 32) + 2 * scale_bytes * columns for rows, columns in shapes)
    norms = scale_bytes * width * (2 * config.num_hidden_layers + 1)
    matrices = 1 if config.tie_word_embeddings else 2
    return config.num_hidden_layers * layer + norms + matrices * config.vocab_size * (width + 2)
