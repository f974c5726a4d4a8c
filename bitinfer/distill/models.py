"""Teachers and students as transformers models: read, restrict to a vocabulary, build, run, save as published."""

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitinfer.checkpoint import Checkpoint, read_json
from bitinfer.distill.students import FBILinear, Method, OneBitLinear, make_student, student_layers
from bitinfer.errors import FormatError
from bitinfer.formats import FORMATS
from bitinfer.output_folder import new_folder

INITS = ("teacher", "scratch")


def load_teacher(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Read a LLaMA-shaped model and its tokenizer from a folder or a GGUF file, frozen and in evaluation mode.

    Args:
        path: a folder that transformers reads, or a ``.gguf`` file, whose weights are dequantised.
        dtype: of the weights.

    Raises:
        FormatError: there is nothing there, or it is not of LLaMA's shape.
    """
    import transformers

    path = Path(path)
    if not path.exists():
        raise FormatError(f"teacher: {path} does not exist; pass a model folder or a .gguf file")
    options: dict[str, Any] = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    if path.is_file() and hasattr(transformers, "GgufConfig"):  # newer ones keep GGUF weights quantised unless told
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    check_llama(model.config, "teacher")
    return model.eval().requires_grad_(False), tokenizer


def check_llama(config: Any, role: str) -> None:
    """Raise FormatError unless a configuration is that of a LLaMA, which is what this package trains and reads."""
    if config.model_type != "llama":
        raise FormatError(f"{role}: expected a model of type llama, got {config.model_type}")


def restrict_vocabulary(model: Any, kept: Sequence[int]) -> Any:
    """Keep only some tokens of a model, in place: id ``i`` then stands for what was ``kept[i]``.

    The softmax over the rows that are left is the model's distribution, renormalised over the kept tokens.

    Args:
        model: a causal model with a plain embedding and head.
        kept: token ids, ascending.

    Raises:
        ValueError: an id is out of range, or they do not ascend.
    """
    ids = torch.tensor(list(kept))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if len(ids) == 0 or ids[0] < 0 or ids[-1] >= embedding.num_embeddings or not (ids.diff() > 0).all():
        raise ValueError(
            f"restrict_vocabulary: kept must be ascending ids from 0 to {embedding.num_embeddings - 1}, "
            f"got {len(ids)} from {ids.min().item() if len(ids) else None} to {ids.max().item() if len(ids) else None}"
        )
    tied = embedding.weight is head.weight
    rows = nn.Parameter(embedding.weight.detach()[ids.to(embedding.weight.device)].clone(), requires_grad=False)
    embedding.weight, embedding.num_embeddings, embedding.padding_idx = rows, len(ids), None
    head.weight = rows if tied else nn.Parameter(head.weight.detach()[ids.to(head.weight.device)], requires_grad=False)
    head.out_features = len(ids)
    places = {int(old): new for new, old in enumerate(ids)}
    model.config.vocab_size = len(ids)
    for config in (model.config, getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
            old = getattr(config, name, None)
            if isinstance(old, list):
                setattr(config, name, [places[i] for i in old if i in places])
            elif old is not None:
                setattr(config, name, places.get(old))
    return model


def build_student(
    teacher: Any,
    method: Method,
    config: dict[str, Any] | None = None,
    *,
    init: str = "teacher",
    start: str = "nmf",
    latent_std: float | None = None,
    seed: int = 0,
) -> Any:
    """Build a student: a LLaMA in float32 whose linear layers, but for the head, are student layers.

    Args:
        teacher: gives the shape and the vocabulary and, with ``init="teacher"``, the weights.
        method: "fbi" or "onebit".
        config: what differs from the teacher's configuration, such as ``{"num_hidden_layers": 16}``.
        init: "teacher" copies its tensors; of fewer layers these are evenly spaced ones, the first and the last among
            them. "scratch" draws all of them as LLaMA does.
        start: how OneBit's layers start from the teacher's weights: "nmf" or "svd"; from scratch it is "ones".
        latent_std: see :class:`FBILinear`.
        seed: of the random weights; torch's generator is left as it was.

    Raises:
        ValueError: a shape is not the teacher's where its weights are to be copied, or ``init`` is unknown.
        FormatError: the student is no LLaMA.
    """
    from transformers import LlamaForCausalLM

    if init not in INITS:
        raise ValueError(f"build_student: init must be one of {', '.join(INITS)}, got {init!r}")
    shape = copy.deepcopy(teacher.config)
    unknown = set(config or {}) - set(shape.to_dict())
    if unknown:
        raise ValueError(f"build_student: config has unknown keys {sorted(unknown)}; they are those of LlamaConfig")
    for name, value in (config or {}).items():
        setattr(shape, name, value)
    shape.dtype = torch.float32
    shape._name_or_path = ""
    check_llama(shape, "student")
    if shape.vocab_size != teacher.config.vocab_size:
        raise ValueError(
            f"build_student: vocab_size={shape.vocab_size} but the teacher's is {teacher.config.vocab_size}; they must "
            "agree: reduce the vocabulary when the corpus is made"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(shape)
    model.generation_config = copy.deepcopy(teacher.generation_config)
    if init == "teacher":
        _copy_weights(teacher, model)
    make_student(model, method, latent_std=latent_std, start=start if init == "teacher" else "ones")
    return model.train()


def layer_map(student_layers: int, teacher_layers: int) -> list[int]:
    """Return the teacher's layer for each of the student's: evenly spaced, the first and the last among them."""
    if student_layers == 1:
        return [teacher_layers - 1]
    return [round(i * (teacher_layers - 1) / (student_layers - 1)) for i in range(student_layers)]


def _copy_weights(teacher: Any, student: Any) -> None:
    places = layer_map(student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    source = teacher.state_dict()
    tensors = {}
    for name, wanted in student.state_dict().items():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            parts[2] = str(places[int(parts[2])])
        found = source.get(".".join(parts))
        if found is None or found.shape != wanted.shape:
            shape = None if found is None else tuple(found.shape)
            raise ValueError(
                f"build_student: {name} has shape {tuple(wanted.shape)} but the teacher's has {shape}; start from "
                "scratch, or with the teacher's width"
            )
        tensors[name] = found.to(wanted.device, torch.float32)
    student.load_state_dict(tensors)


def run_trunk(model: Any, ids: Tensor, dtype: torch.dtype | None = None, all_states: bool = False) -> list[Tensor]:
    """Run a LLaMA up to its last norm, over whole rows with a causal mask.

    The layers are called one by one, so that each may be compiled by itself and what is between them can be looked at.

    Args:
        model: a transformers ``LlamaForCausalLM``, dense or student.
        ids: token ids ``[B, T]``.
        dtype: of the residual stream; None for that of the embedding.
        all_states: return what enters each layer too.

    Returns:
        ``[hidden]``, ``[B, T, D]`` behind the last norm, or the inputs of all layers and then that.
    """
    trunk = model.model
    hidden = trunk.embed_tokens(ids)
    hidden = hidden if dtype is None else hidden.to(dtype)
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    rotary = trunk.rotary_emb(hidden, positions)
    states = []
    for layer in trunk.layers:
        if all_states:
            states.append(hidden)
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary, use_cache=False)
    return [*states, trunk.norm(hidden)]


def save_student(model: Any, folder: str | Path, tokenizer: Any | None = None, *, packed: bool = False) -> Path:
    """Write a student in the published layout of its method, replacing a folder that is there.

    FBI-LLM: ``pytorch_model.bin`` with float32 latent weights, ``wscale`` and ``wbias``. OneBit: the same file with
    float32 latent weights, ``weight_scale`` and ``input_factor`` under the model type ``bitllama``, or, with
    ``packed``, the int8 signs that are released.

    Raises:
        ValueError: the model has no student layers, or ``packed`` with FBI-LLM, whose layout has no packed form.
    """
    kinds = {type(layer) for _, layer in student_layers(model)}
    if len(kinds) != 1:
        raise ValueError(f"save_student: expected a model with student layers of one kind, found {len(kinds)} kinds")
    onebit = kinds == {OneBitLinear}
    if packed and not onebit:
        raise ValueError("save_student: packed=True is OneBit's; pack FBI-LLM students with bitinfer.convert")
    state = {name: tensor.detach().cpu().float().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]  # it is the embedding
    if packed:
        for name, _ in student_layers(model):
            bits = (state[f"{name}.weight"] < 0).to(torch.uint8).unflatten(1, (-1, 8))
            octets = (bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
            state[f"{name}.weight"] = octets.view(torch.int8)
    not_the_students = ("_name_or_path", "_model_name_or_path", "quantization_config")
    config = {k: v for k, v in model.config.to_dict().items() if k not in not_the_students}
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "float32", "torch_dtype": "float32"}
    # the name that the authors' code reads; newer configurations hold it inside rope_parameters alone
    config["rope_theta"] = (config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    if onebit:
        name = "BitLlamaForCausalLMInf" if packed else "BitLlamaForCausalLM"
        config |= {"architectures": [name], "model_type": "bitllama"}
    folder = Path(folder)
    with new_folder(folder, overwrite=True) as partial:
        torch.save(state, partial / "pytorch_model.bin")
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    return folder


def load_student(folder: str | Path) -> Any:
    """Read a student with latent weights from the layout that :func:`save_student` writes, ready for more training.

    Raises:
        FormatError: the folder holds no FBI-LLM or OneBit checkpoint with latent weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = Checkpoint(folder)
    method: Method = "onebit" if FORMATS["onebit"].matches(checkpoint) else "fbi"
    source = FORMATS["onebit" if method == "onebit" else "fbi_llm"]
    names = source.layer_names(checkpoint) if source.matches(checkpoint) else []
    if not names or not checkpoint[f"{names[0]}.weight"].is_floating_point():
        raise FormatError(f"{folder}: expected an FBI-LLM or OneBit checkpoint with latent weights")
    config = source.config(checkpoint)
    config.pop("model_type", None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    make_student(model, method, start="ones")
    missing, unexpected = model.load_state_dict({k: checkpoint[k].float() for k in checkpoint}, strict=False)
    missing = [m for m in missing if not (m == "lm_head.weight" and model.config.tie_word_embeddings)]
    if missing or unexpected:
        raise FormatError(f"{folder}: missing tensors {missing[:3]}, unexpected tensors {unexpected[:3]}")
    return model.train()


def student_method(model: nn.Module) -> Method:
    """Return the method that a student's layers belong to."""
    layer = next(student_layers(model))[1]
    return "fbi" if isinstance(layer, FBILinear) else "onebit"


def read_student_config(path: str | Path) -> dict[str, Any]:
    """Return what a JSON file, or the ``config.json`` of a folder, says about a student's shape."""
    path = Path(path)
    values = read_json(path / "config.json" if path.is_dir() else path)
    named = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {
        key: values[key]
        for key in (*named, "head_dim", "tie_word_embeddings", "max_position_embeddings")
        if key in values
    }


def packed_bytes(config: Any, scale_bytes: int = 2) -> int:
    """Return the bytes of the tensors of an FBI-style LLaMA once packed, embedding and head in 8 bits included."""
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
    return config.num_hidden_layers * layer + norms + matrices * config.vocab_size * (width + 4)
