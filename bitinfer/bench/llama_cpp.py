"""llama.cpp as a peer of whole models on CPUs: a GGUF file of the same shape, random weights of its narrowest types.

It is measured where llama-cpp-python and gguf are installed. Q1_0 is a bit per weight and a scale per 128, TQ2_0 two
bits and a scale per 256; embedding and head are float16, as in our models.
"""

import ctypes
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitinfer.testing.checkpoints import llama_config

TYPES = {"Q1_0": (128, 18), "TQ2_0": (256, 66)}  # weights and bytes of a block
ROUNDS = 3
Speeds = tuple[float | None, float, float]  # decode and prompt tokens per second, seconds to the first token


def missing() -> str | None:
    """Return why llama.cpp is not measured, None if it can be."""
    for module, package in (("llama_cpp", "llama-cpp-python"), ("gguf", "gguf")):
        if find_spec(module) is None:
            return f"llama.cpp is not measured: {package} is not installed"
    return None


def measure(
    shape: str, kind: str, plan: Sequence[tuple[int, int, bool]], new_tokens: int
) -> Iterator[tuple[tuple[int, int, bool], Speeds, int]]:
    """Yield each case of ``plan`` that llama.cpp runs, its speeds, and the bytes of the file.

    Args:
        shape: of :data:`bitinfer.testing.checkpoints.SHAPES`.
        kind: of :data:`TYPES`.
        plan: (sequences, tokens of each prompt, whether to decode); only single sequences are run.
        new_tokens: decoded one by one.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        write_model(file, shape, kind)
        most = max(length for _, length, _ in plan) + new_tokens + 1
        with _opened(file, most) as decode:
            for case in plan:
                if case[0] == 1:
                    yield case, _time(decode, case[1], new_tokens if case[2] else 0), file.stat().st_size


def write_model(file: Path, shape: str, kind: str) -> None:
    """Write a LLaMA of a shape with random linear weights of one type, without a vocabulary."""
    import gguf

    config = llama_config(shape)
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(hidden // config["num_attention_heads"])
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(0)
    block, size = TYPES[kind]
    scale = np.frombuffer(np.float16(0.02).tobytes(), np.uint8)

    def add(name: str, rows: int, columns: int) -> None:
        blocks = rng.integers(0, 256, (rows, columns // block, size), np.uint8)
        if kind == "TQ2_0":  # -1 and +1 alone
            blocks &= 0xAA
            blocks[..., -2:] = scale
        else:
            blocks[..., :2] = scale
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType[kind])

    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, rng.standard_normal((vocabulary, hidden), np.float32).astype(np.float16) * 0.02)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(config["num_hidden_layers"]):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", hidden, hidden)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{name}.weight", inner, hidden)
        add(f"blk.{layer}.ffn_down.weight", hidden, inner)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def _opened(file: Path, slots: int) -> Iterator[Any]:
    """Yield a function that forgets everything if asked to, and then runs tokens and waits for their logits."""
    import llama_cpp as api

    silent = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(silent, ctypes.c_void_p(0))
    api.llama_backend_init()
    parameters = api.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = api.llama_model_load_from_file(str(file).encode(), parameters)
    if not model:
        raise RuntimeError(f"llama.cpp could not read {file.name}: its build may not know this type")
    options = api.llama_context_default_params()
    options.n_ctx = options.n_batch = slots
    options.n_threads = options.n_threads_batch = torch.get_num_threads()
    context = api.llama_init_from_model(model, options)

    def decode(tokens: Sequence[int], forget: bool) -> None:
        if forget:
            api.llama_memory_clear(api.llama_get_memory(context), True)
        array = (api.llama_token * len(tokens))(*tokens)
        if api.llama_decode(context, api.llama_batch_get_one(array, len(tokens))) != 0:
            raise RuntimeError(f"llama.cpp could not decode {len(tokens)} tokens")
        api.llama_synchronize(context)

    try:
        yield decode
    finally:
        api.llama_free(context)
        api.llama_model_free(model)
        del silent


def _time(decode: Any, length: int, new_tokens: int) -> Speeds:
    prompt = np.random.default_rng(1).integers(3, 1000, length).tolist()
    decode(prompt, True)
    first, more = [], []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        decode(prompt, True)
        first.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        for token in range(new_tokens):
            decode([3 + token], False)
        more.append(time.perf_counter() - begun)
    to_first = statistics.median(first)
    return (new_tokens / statistics.median(more) if new_tokens else None), length / to_first, to_first
