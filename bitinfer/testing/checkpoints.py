"""Write small synthetic checkpoints in the layouts that binary models are published in: keys, shapes, dtypes, shards.

Written from the description of those layouts alone, and with nothing of bitinfer's readers or its packing, so that a
test which converts one compares two independent statements of the same format. Values are random.

Every writer makes ``folder`` and returns the tensors that it wrote, by name.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

Kind = Literal["bin", "legacy_bin", "safetensors"]
Linear = Callable[[str, int, int], dict[str, Tensor]]

# hidden size, intermediate size, layers, heads of the published models; "tiny" is for tests, its 176 columns are no
# whole number of words
SHAPES = {
    "tiny": (64, 176, 2, 4),
    "130m": (768, 2048, 12, 12),
    "1.3b": (2048, 5632, 24, 32),
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
}


def llama_config(shape: str = "tiny", layers: int | None = None, vocab: int | None = None) -> dict[str, Any]:
    """Return ``config.json`` as FBI-LLM publishes it (LLaMA, no grouped queries, no biases), sizes as asked."""
    hidden, inner, depth, heads = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers or depth,
        "num_key_value_heads": heads,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.40.0",
        "use_cache": True,
        "vocab_size": vocab or (512 if shape == "tiny" else 32000),
    }


def write_fbi_llm(
    folder: str | Path,
    shape: str = "tiny",
    *,
    layers: int | None = None,
    vocab: int | None = None,
    pattern: Literal["column", "row", "single"] = "column",
    shards: int = 1,
    kind: Kind = "bin",
    seed: int = 0,
    zeros: int = 0,
    inv_freq: bool = False,
    materialised: torch.dtype | None = None,
    tokenizer: bool = True,
) -> dict[str, Tensor]:
    """Write FBI-LLM: float32 latents with ``wscale`` and ``wbias``, some scales negative.

    Args:
        pattern: shape of the scales: ``[1, K]`` as released, ``[N, 1]`` or ``[1]``.
        zeros: how many latents of every layer are exactly 0.
        inv_freq: store the rotary buffers, as some training runs do.
        materialised: write ``wscale * sign(W) + wbias`` alone, dense in this dtype, as the authors' evaluation has it.
    """
    generator = torch.Generator().manual_seed(seed)
    config = llama_config(shape, layers, vocab)

    def linear(name: str, rows: int, columns: int) -> dict[str, Tensor]:
        weight = 0.02 * torch.randn(rows, columns, generator=generator)
        if zeros:
            weight.view(-1)[torch.randperm(weight.numel(), generator=generator)[:zeros]] = 0.0
        size = {"column": (1, columns), "row": (rows, 1), "single": (1,)}[pattern]
        alpha = 0.5 * columns**-0.5 * (1 + 0.3 * torch.randn(size, generator=generator))
        alpha = torch.where(torch.rand(size, generator=generator) < 0.1, -alpha, alpha)
        beta = 0.05 * columns**-0.5 * torch.randn(size, generator=generator)
        if materialised is not None:
            alpha, beta = alpha.to(materialised), beta.to(materialised)
            return {f"{name}.weight": alpha * torch.sign(weight).to(materialised) + beta}
        return {f"{name}.weight": weight, f"{name}.wscale": alpha, f"{name}.wbias": beta}

    tensors = _model(config, linear, generator, materialised or torch.float32)
    if inv_freq:
        half = config["hidden_size"] // config["num_attention_heads"] // 2
        for i in range(config["num_hidden_layers"]):
            tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = 1e4 ** (-torch.arange(half) / half)
    return _write(folder, config, tensors, shards, kind, tokenizer)


def write_onebit(
    folder: str | Path,
    shape: str = "tiny",
    *,
    packed: bool = True,
    layers: int | None = None,
    vocab: int | None = None,
    bias: bool = False,
    shards: int = 1,
    kind: Kind = "bin",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
) -> dict[str, Tensor]:
    """Write OneBit (``bitllama``): int8 signs or latents of 0.01, ``weight_scale [N]`` and ``input_factor [K]``."""
    generator = torch.Generator().manual_seed(seed)
    config = llama_config(shape, layers, vocab)
    config |= {
        "architectures": ["BitLlamaForCausalLMInf" if packed else "BitLlamaForCausalLM"],
        "model_type": "bitllama",
        "attention_bias": bias,
        "transformers_version": "4.35.0.dev0",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "kd_alpha": 1.0,  # the authors' scripts leave settings of the training in the file
    }
    del config["rms_norm_eps"]

    def linear(name: str, rows: int, columns: int) -> dict[str, Tensor]:
        signs = torch.where(torch.rand(rows, columns, generator=generator) < 0.5, -1.0, 1.0)
        weight = (0.01 * signs).to(dtype)
        if packed:
            bits = ((0 - signs.numpy() + 1) / 2).astype(np.uint8).reshape(rows, columns // 8, 8)
            octets = (bits.astype(np.int64) * np.array([1, 2, 4, 8, 16, 32, 64, 128])).sum(-1)
            weight = torch.from_numpy(octets.astype(np.uint8).view(np.int8))
        tensors = {
            f"{name}.weight": weight,
            f"{name}.weight_scale": (0.1 + 0.05 * torch.rand(rows, generator=generator)).to(dtype),
            f"{name}.input_factor": (0.1 + 0.1 * torch.rand(columns, generator=generator)).to(dtype),
        }
        if bias and "self_attn" in name:
            tensors[f"{name}.bias"] = (0.1 * torch.randn(rows, generator=generator)).to(dtype)
        return tensors

    return _write(folder, config, _model(config, linear, generator, dtype), shards, kind, tokenizer)


def write_binary_dense(
    folder: str | Path,
    shape: str = "tiny",
    *,
    architecture: Literal["llama", "qwen3"] = "llama",
    layers: int | None = None,
    vocab: int | None = None,
    group_size: int = 0,
    symmetric: bool = True,
    shards: int = 1,
    kind: Kind = "safetensors",
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    tokenizer: bool = True,
) -> dict[str, Tensor]:
    """Write dense weights of two values per row or per group of columns; ``+s`` and ``-s`` where ``symmetric``.

    ``architecture="qwen3", group_size=128`` has the layout of the unpacked Bonsai models (but for their binary
    embedding): float16 or bfloat16, norms of queries and keys, tied embeddings.
    """
    generator = torch.Generator().manual_seed(seed)
    config = _architecture(llama_config(shape, layers, vocab), architecture, dtype)

    def linear(name: str, rows: int, columns: int) -> dict[str, Tensor]:
        size = group_size or columns
        groups = -(-columns // size)

        def spread(values: Tensor) -> Tensor:
            return values.to(dtype).repeat_interleave(size, 1)[:, :columns]

        scale = 0.03 * (0.5 + torch.rand(rows, groups, generator=generator))
        shift = 0.0 if symmetric else 0.02 * torch.randn(rows, groups, generator=generator)
        minus = torch.rand(rows, columns, generator=generator) < 0.5
        return {f"{name}.weight": torch.where(minus, spread(shift - scale), spread(shift + scale))}

    return _write(folder, config, _model(config, linear, generator, dtype), shards, kind, tokenizer)


def write_dense(
    folder: str | Path,
    shape: str = "tiny",
    *,
    architecture: Literal["llama", "qwen3", "mixtral"] = "llama",
    layers: int | None = None,
    vocab: int | None = None,
    shards: int = 1,
    kind: Kind = "safetensors",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
) -> dict[str, Tensor]:
    """Write an ordinary dense model, Gaussian. "mixtral" stores every expert by itself, as its files do."""
    generator = torch.Generator().manual_seed(seed)
    config = _architecture(llama_config(shape, layers, vocab), architecture, dtype)

    def linear(name: str, rows: int, columns: int) -> dict[str, Tensor]:
        return {f"{name}.weight": (columns**-0.5 * torch.randn(rows, columns, generator=generator)).to(dtype)}

    return _write(folder, config, _model(config, linear, generator, dtype), shards, kind, tokenizer)


def write_tokenizer(folder: str | Path) -> None:
    """Write a byte-level tokenizer of 259 tokens, and the small files that come with one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _json(Path(folder) / "special_tokens_map.json", special)
    _json(Path(folder) / "tokenizer_config.json", {**special, "tokenizer_class": "PreTrainedTokenizerFast"})
    _json(Path(folder) / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})


def _architecture(config: dict[str, Any], architecture: str, dtype: torch.dtype) -> dict[str, Any]:
    config = config | {"torch_dtype": str(dtype).removeprefix("torch.")}
    if architecture == "qwen3":
        heads = config["num_attention_heads"]
        extra: dict[str, Any] = {
            "architectures": ["Qwen3ForCausalLM"],
            "head_dim": config["hidden_size"] // heads,
            "num_key_value_heads": heads // 2,
            "tie_word_embeddings": True,
        }
    elif architecture == "mixtral":
        extra = {
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        }
    else:
        return config
    return config | extra | {"model_type": architecture}


def _model(config: dict[str, Any], linear: Linear, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return all tensors of a LLaMA, Qwen3 or Mixtral, its linear layers made by ``linear(name, rows, columns)``."""
    hidden, inner, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    head = hidden // config["num_attention_heads"]
    keys = head * config["num_key_value_heads"]

    def normal(*shape: int, std: float) -> Tensor:
        return (std * torch.randn(shape, generator=generator)).to(dtype)

    def norm(size: int) -> Tensor:
        return (1 + 0.1 * torch.randn(size, generator=generator)).to(dtype)

    tensors = {"model.embed_tokens.weight": normal(vocab, hidden, std=1.0)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        tensors |= linear(f"{layer}.self_attn.q_proj", hidden, hidden)
        tensors |= linear(f"{layer}.self_attn.k_proj", keys, hidden)
        tensors |= linear(f"{layer}.self_attn.v_proj", keys, hidden)
        tensors |= linear(f"{layer}.self_attn.o_proj", hidden, hidden)
        if config["model_type"] == "qwen3":
            tensors |= {f"{layer}.self_attn.{part}_norm.weight": norm(head) for part in "qk"}
        if config["model_type"] == "mixtral":
            experts = f"{layer}.block_sparse_moe"
            tensors[f"{experts}.gate.weight"] = normal(config["num_local_experts"], hidden, std=hidden**-0.5)
            for e in range(config["num_local_experts"]):
                tensors |= linear(f"{experts}.experts.{e}.w1", inner, hidden)
                tensors |= linear(f"{experts}.experts.{e}.w2", hidden, inner)
                tensors |= linear(f"{experts}.experts.{e}.w3", inner, hidden)
        else:
            tensors |= linear(f"{layer}.mlp.gate_proj", inner, hidden)
            tensors |= linear(f"{layer}.mlp.up_proj", inner, hidden)
            tensors |= linear(f"{layer}.mlp.down_proj", hidden, inner)
        tensors[f"{layer}.input_layernorm.weight"] = norm(hidden)
        tensors[f"{layer}.post_attention_layernorm.weight"] = norm(hidden)
    tensors["model.norm.weight"] = norm(hidden)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(vocab, hidden, std=hidden**-0.5)
    return tensors


def _write(
    folder: str | Path, config: dict[str, Any], tensors: dict[str, Tensor], shards: int, kind: Kind, tokenizer: bool
) -> dict[str, Tensor]:
    folder = Path(folder)
    folder.mkdir(parents=True)
    _json(folder / "config.json", config)
    write_weights(folder, tensors, shards, kind)
    if tokenizer:
        write_tokenizer(folder)
    return tensors


def write_weights(folder: str | Path, tensors: dict[str, Tensor], shards: int = 1, kind: Kind = "safetensors") -> None:
    """Write tensors in order as one file, or as ``shards`` files of about equal size with an index."""
    folder = Path(folder)
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    total = sum(t.nbytes for t in tensors.values())
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    done = 0
    for name, tensor in tensors.items():
        parts[min(shards - 1, done * shards // max(total, 1))][name] = tensor.contiguous()
        done += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{number:05d}-of-{shards:05d}.{suffix}"
        if kind == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file, _use_new_zipfile_serialization=kind == "bin")
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        _json(folder / f"{stem}.{suffix}.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
