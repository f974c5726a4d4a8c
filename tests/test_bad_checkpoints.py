"""Damaged, mixed and hostile checkpoints: each is refused by a message that names what is wrong."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitinfer.checkpoint import Checkpoint
from bitinfer.convert import convert
from bitinfer.errors import FormatError
from bitinfer.testing.checkpoints import (
    Kind,
    write_binary_dense,
    write_dense,
    write_fbi_llm,
    write_onebit,
    write_weights,
)

Q = "model.layers.0.self_attn.q_proj"
V1 = "model.layers.1.self_attn.v_proj"


def refuse(tmp_path: Path, message: str, **options: Any) -> None:
    """Convert ``src``; it must fail with ``message``, and no file may appear, change or vanish."""

    def files() -> dict[Path, int]:
        return {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()}

    before = files()
    with pytest.raises(FormatError, match=message):
        convert(tmp_path / "src", tmp_path / "dst", **options)
    assert files() == before
    assert not (tmp_path / "dst").exists()
    assert not [f for f in tmp_path.iterdir() if "incomplete" in f.name]


def cut(file: Path, share: float) -> None:
    os.truncate(file, int(share * file.stat().st_size))


# files


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["bin", "legacy_bin", "safetensors"])
def test_truncated_shard(tmp_path, kind: Kind, share):
    write_fbi_llm(tmp_path / "src", kind=kind, shards=2)
    shard = next((tmp_path / "src").glob("*-00002-of-00002.*"))
    cut(shard, share)
    refuse(tmp_path, rf"{shard.name}: .*(truncated|damaged)")


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_missing_shard(tmp_path, kind: Kind):
    write_fbi_llm(tmp_path / "src", kind=kind, shards=3)
    shard = next((tmp_path / "src").glob("*-00002-of-00003.*"))
    shard.unlink()
    refuse(tmp_path, rf"{shard.name}: this shard is missing, .*\.index\.json needs it; download it")


@pytest.mark.parametrize(
    "name", ["../secret.bin", "/etc/passwd", "..", ".", "", "sub/a.bin", "..\\a.bin", "C:a.bin", 3]
)
def test_index_that_names_a_file_outside(tmp_path, name):
    write_fbi_llm(tmp_path / "src", shards=2)
    torch.save({"lm_head.weight": torch.zeros(512, 64)}, tmp_path / "secret.bin")
    index = tmp_path / "src" / "pytorch_model.bin.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(values))
    refuse(tmp_path, r"index\.json: tensor lm_head\.weight is said to be in .*only plain file names")


def test_index_that_promises_a_tensor_the_file_lacks(tmp_path):
    write_fbi_llm(tmp_path / "src", shards=2)
    index = tmp_path / "src" / "pytorch_model.bin.index.json"
    values = json.loads(index.read_text())
    values["weight_map"][f"{Q}.extra"] = "pytorch_model-00001-of-00002.bin"
    index.write_text(json.dumps(values))
    refuse(tmp_path, rf"the index says that pytorch_model-00001-of-00002\.bin holds {Q}\.extra, but it does not")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": 3}', "[]", "not json", ""])
def test_index_that_is_none(tmp_path, text):
    write_fbi_llm(tmp_path / "src", shards=2)
    (tmp_path / "src" / "pytorch_model.bin.index.json").write_text(text)
    refuse(
        tmp_path, r"pytorch_model\.bin\.index\.json: (weight_map is missing or empty|not valid JSON|expected a JSON)"
    )


def test_tensor_in_two_shards(tmp_path):
    write_fbi_llm(tmp_path / "src", shards=2)
    (tmp_path / "src" / "pytorch_model.bin.index.json").unlink()
    shard = tmp_path / "src" / "pytorch_model-00002-of-00002.bin"
    torch.save(torch.load(shard) | {f"{Q}.weight": torch.zeros(64, 64)}, shard)
    refuse(tmp_path, rf"tensor {Q}\.weight is in pytorch_model-00001-of-00002\.bin and in pytorch_model-00002-of-00002")


class Hostile:
    """Unpickles by touching a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_with_foreign_globals_is_not_run(tmp_path, legacy):
    write_fbi_llm(tmp_path / "src")
    touched = tmp_path / "touched"
    values = {"x": torch.zeros(2), "y": Hostile(touched)}
    file = tmp_path / "src" / "pytorch_model.bin"
    torch.save(values, file, _use_new_zipfile_serialization=not legacy)
    refuse(
        tmp_path, r"pytorch_model\.bin: holds Python objects that are not tensors \(\w+\.system\).* it is not loaded"
    )
    file.write_bytes(pickle.dumps(values, protocol=2))
    refuse(tmp_path, r"pytorch_model\.bin: holds Python objects .*it is not loaded")
    assert not touched.exists()


@pytest.mark.parametrize("values", [[torch.zeros(2)], {"epoch": 3}, {}, torch.zeros(3), {"state_dict": {"a": 1}}])
def test_bin_that_is_no_state_dict(tmp_path, values):
    write_fbi_llm(tmp_path / "src")
    torch.save(values, tmp_path / "src" / "pytorch_model.bin")
    refuse(tmp_path, r"pytorch_model\.bin: expected a state dict .*, got ")


@pytest.mark.parametrize(
    "content", [b"", b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0"]
)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_files_that_are_no_weights(tmp_path, name, content):
    write_fbi_llm(tmp_path / "src", kind="bin" if name.endswith("bin") else "safetensors")
    (tmp_path / "src" / name).write_bytes(content)
    refuse(tmp_path, "run: git lfs pull" if b"lfs" in content else rf"{name}: .*(damaged|truncated)")


def test_random_bytes_never_pass(tmp_path):
    """A bit flipped in the structure of a file is either harmless or a FormatError."""
    write_weights_to(tmp_path / "a", {"x": torch.arange(50.0), "y": torch.zeros(3, 3)})
    file = tmp_path / "a" / "model.safetensors"
    raw = file.read_bytes()
    for position in range(0, 200, 3):
        file.write_bytes(raw[:position] + bytes([raw[position] ^ 0x55]) + raw[position + 1 :])
        try:
            checkpoint = Checkpoint(tmp_path / "a")
            assert all(checkpoint.tensor(name).shape == checkpoint.shape(name) for name in checkpoint)
        except FormatError as error:
            assert "model.safetensors" in str(error)


def write_weights_to(folder: Path, tensors: dict[str, Tensor]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_weights(folder, tensors)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"config\.json: this file is missing"),
        ("{", r"config\.json: not valid JSON"),
        ("[1]", r"config\.json: expected a JSON object, got list"),
        ("\udcff", r"config\.json: not valid JSON"),
    ],
)
def test_config_that_is_none(tmp_path, text, message):
    write_fbi_llm(tmp_path / "src")
    config = tmp_path / "src" / "config.json"
    config.unlink()
    if text is not None:
        config.write_bytes(text.encode("utf-8", "surrogateescape"))
    refuse(tmp_path, message)


def test_no_weights(tmp_path):
    write_fbi_llm(tmp_path / "src")
    (tmp_path / "src" / "pytorch_model.bin").rename(tmp_path / "src" / "model.gguf")
    refuse(tmp_path, r"no weights found; expected model\.safetensors, .*but the folder holds .*model\.gguf")


def test_paths_that_are_no_folder(tmp_path):
    write_fbi_llm(tmp_path / "src")
    with pytest.raises(FormatError, match=r"hf download LiqunMa/FBI-LLM_130M --local-dir FBI-LLM_130M"):
        Checkpoint("LiqunMa/FBI-LLM_130M")
    with pytest.raises(FormatError, match=r"expected a model folder, got a file; pass the folder"):
        Checkpoint(tmp_path / "src" / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"/nowhere: no such folder"):
        Checkpoint(tmp_path / "nowhere")


# tensors


def fbi(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], **options: Any) -> None:
    """Write FBI-LLM with changed tensors."""
    tensors = write_fbi_llm(tmp_path / "src", **options)
    change(tensors)
    write_weights(tmp_path / "src", tensors, kind="bin")


def onebit(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], **options: Any) -> None:
    """Write OneBit with changed tensors."""
    tensors = write_onebit(tmp_path / "src", **options)
    change(tensors)
    write_weights(tmp_path / "src", tensors, kind="bin")


@pytest.mark.parametrize("shape", [(1, 63), (64,), (63, 1), (64, 64), (2,), (1, 1, 64)])
def test_wscale_of_the_wrong_shape(tmp_path, shape):
    def change(tensors):
        tensors[f"{Q}.wscale"] = tensors[f"{Q}.wbias"] = torch.ones(shape)

    fbi(tmp_path, change)
    text = str(shape).replace("(", r"\(").replace(")", r"\)")
    refuse(tmp_path, rf"{Q}\.wscale has shape {text}, expected \(1, 64\) .*\(64, 1\) .*or \(1,\)")


def test_wbias_of_another_shape(tmp_path):
    fbi(tmp_path, lambda t: t.update({f"{Q}.wbias": torch.ones(64, 1)}))
    refuse(tmp_path, rf"{Q}\.wbias has shape \(64, 1\), but {Q}\.wscale has \(1, 64\)")


@pytest.mark.parametrize("part", ["wscale", "wbias", "weight"])
def test_missing_part_of_a_layer(tmp_path, part):
    fbi(tmp_path, lambda t: t.pop(f"{V1}.{part}"))
    refuse(tmp_path, rf"{V1}\.{part} is missing, though the layer's other FBI-LLM tensors are there")


def test_some_layers_without_scales(tmp_path):
    fbi(tmp_path, lambda t: [t.pop(f"{V1}.{part}") for part in ("wscale", "wbias")])
    refuse(tmp_path, rf"{V1} lacks wscale and wbias, which {Q.replace('q_proj', 'v_proj')} has; .*mixed or incomplete")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["wscale", "wbias", "weight"])
def test_values_that_are_no_numbers(tmp_path, part, value):
    fbi(tmp_path, lambda t: t[f"{Q}.{part}"][0].fill_(value))
    refuse(tmp_path, rf"{Q}\.{part} holds \d+ values that are NaN or infinite")


def test_dense_weights_that_are_no_numbers(tmp_path):
    tensors = write_binary_dense(tmp_path / "src")
    tensors["model.layers.0.mlp.gate_proj.weight"][100, 3] = float("nan")
    write_weights(tmp_path / "src", tensors)
    for name in ("auto", "binary_dense", "latent"):
        refuse(tmp_path, r"model\.layers\.0\.mlp\.gate_proj\.weight holds 1 values that are NaN", format=name)


def test_nan_in_what_stays_dense(tmp_path):
    fbi(tmp_path, lambda t: t["model.embed_tokens.weight"][3, 3].fill_(float("nan")))
    refuse(tmp_path, r"model\.embed_tokens\.weight holds NaN")


def test_columns_that_do_not_fit_the_config(tmp_path):
    def change(tensors):
        for part in ("weight", "wscale", "wbias"):
            tensors[f"{Q}.{part}"] = tensors[f"{Q}.{part}"][:, :32].clone()

    fbi(tmp_path, change)
    refuse(tmp_path, rf"{Q}\.weight has shape \(64, 32\) .*config\.json needs \(64, 64\)")


def test_embedding_that_does_not_fit_the_config(tmp_path):
    fbi(tmp_path, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(100, 64)}))
    refuse(
        tmp_path, r"model\.embed_tokens\.weight has shape \(100, 64\), but the model of config\.json needs \(512, 64\)"
    )


def test_layers_that_the_config_promises(tmp_path):
    write_fbi_llm(tmp_path / "src")
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    (tmp_path / "src" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refuse(tmp_path, r"model\.layers\.2\.self_attn\.q_proj\.weight is missing.*the checkpoint is incomplete")


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.uint8])
def test_latents_of_another_dtype(tmp_path, dtype):
    fbi(tmp_path, lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].to(dtype)}))
    refuse(tmp_path, rf"{Q}\.weight is {dtype}, expected float32, float16 or bfloat16")


def test_latents_that_are_no_matrix(tmp_path):
    fbi(tmp_path, lambda t: t.update({f"{Q}.weight": torch.ones(64)}))
    refuse(tmp_path, rf"{Q}\.weight has shape \(64,\), expected a matrix")


def test_values_beyond_the_dtype_asked_for(tmp_path):
    fbi(tmp_path, lambda t: t[f"{Q}.wscale"].fill_(1e5))
    refuse(
        tmp_path, rf"{Q}\.in_scale holds values up to 100000, beyond torch.float16; pass dtype='bfloat16'", dtype="fp16"
    )


@pytest.mark.parametrize("part", ["weight_scale", "input_factor", "weight"])
def test_missing_part_of_a_onebit_layer(tmp_path, part):
    onebit(tmp_path, lambda t: t.pop(f"{V1}.{part}"))
    refuse(tmp_path, rf"{V1}\.{part} is missing, though the layer's other OneBit tensors are there")


def test_onebit_layer_without_scales(tmp_path):
    onebit(tmp_path, lambda t: [t.pop(f"{V1}.{part}") for part in ("weight_scale", "input_factor")])
    refuse(tmp_path, rf"{V1} lacks weight_scale and input_factor, which ")


def test_onebit_columns_that_do_not_fit(tmp_path):
    onebit(tmp_path, lambda t: t.update({f"{Q}.input_factor": torch.ones(63)}))
    refuse(tmp_path, rf"{Q}\.input_factor has shape \(63,\), expected \(64,\)")


def test_onebit_columns_that_do_not_fit_the_config(tmp_path):
    def change(tensors):
        tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"][:, :4].clone()
        tensors[f"{Q}.input_factor"] = tensors[f"{Q}.input_factor"][:32].clone()

    onebit(tmp_path, change)
    refuse(tmp_path, rf"{Q}\.weight has shape \(64, 32\) .*needs \(64, 64\)")


def test_onebit_scales_that_are_no_numbers(tmp_path):
    onebit(tmp_path, lambda t: t[f"{Q}.weight_scale"][5].fill_(float("nan")))
    refuse(tmp_path, rf"{Q}\.weight_scale holds 1 values that are NaN")


def test_bias_of_the_wrong_length(tmp_path):
    onebit(tmp_path, lambda t: t.update({f"{Q}.bias": torch.ones(65)}), bias=True)
    refuse(tmp_path, rf"{Q}\.bias has shape \(65,\), expected \(64,\)")


def test_two_formats_in_one_folder(tmp_path):
    fbi(tmp_path, lambda t: t.update({f"{V1}.input_factor": torch.ones(64)}))
    refuse(tmp_path, r"some layers have wscale \(fbi_llm\) and some input_factor \(onebit\)")


# formats


def test_dense_models_are_not_binary(tmp_path):
    write_dense(tmp_path / "src")
    refuse(tmp_path, r"not a binary model: .*takes 64 values .*--format latent")
    for name in ("fbi_llm", "binary_dense"):
        refuse(tmp_path, rf"{Q.replace('self_attn.q', 'mlp.down')}\.weight ", format=name)
    refuse(tmp_path, "no onebit layer to pack was found", format="onebit")


@pytest.mark.parametrize("name", ["latent", "binary_dense"])
def test_scales_are_not_left_behind(tmp_path, name):
    """The latents of FBI-LLM taken for a dense model would make another model, without a word."""
    write_fbi_llm(tmp_path / "src")
    refuse(tmp_path, rf"wscale belongs to no {name} layer", format=name)


def test_other_quantisations_are_named(tmp_path):
    write_binary_dense(tmp_path / "src")
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    for name in ("auto", "latent"):
        refuse(tmp_path, r"quantised by 'gptq', which bitinfer does not read", format=name)


def test_unknown_packings_are_shown(tmp_path):
    tensors = write_dense(tmp_path / "src")
    tensors = {n: t.to(torch.uint8) if n.endswith("_proj.weight") else t for n, t in tensors.items()}
    write_weights(tmp_path / "src", tensors)
    refuse(
        tmp_path, r"_proj\.weight is torch\.uint8 \(\d+, \d+\): weights packed in a format that bitinfer does not read"
    )


def test_no_linear_layer_is_recognised(tmp_path):
    write_weights_to(tmp_path / "src", {"a.weight": torch.ones(8, 8)})
    refuse(tmp_path, r"no linear weight is recognised .*pass format=")
    refuse(tmp_path, "no latent layer to pack was found", format="latent")
