"""info: the published storage figures of FBI-LLM come out of headers alone, and damaged folders are refused."""

import json
import math
from pathlib import Path

import pytest
import tiny_models
import torch

from bitinfer import FormatError, convert
from bitinfer.info import describe, packed_quantization
from bitinfer.testing.checkpoints import write_dense

ITEM = {"U32": 4, "F32": 4, "F16": 2}


def write_headers(folder: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], config: dict) -> Path:
    """Write a safetensors file of these names, dtypes and shapes whose values are a hole in the file."""
    folder.mkdir()
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * ITEM[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fbi_headers(hidden: int, inner: int, layers: int, packed: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the tensors of an FBI-LLM model, as published or packed with fp16 scales."""
    kind = "F16" if packed else "F32"
    tensors = {f"{name}.weight": (kind, (32000, hidden)) for name in ("model.embed_tokens", "lm_head")}
    tensors["model.norm.weight"] = (kind, (hidden,))
    shapes = {f"self_attn.{p}_proj": (hidden, hidden) for p in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = (kind, (hidden,))
        for name, (rows, columns) in shapes.items():
            scale, shift = ("in_scale", "in_shift") if packed else ("wscale", "wbias")
            tensors[f"{prefix}{name}.weight"] = ("U32", (rows, columns // 32)) if packed else (kind, (rows, columns))
            tensors[f"{prefix}{name}.{scale}"] = tensors[f"{prefix}{name}.{shift}"] = (kind, (1, columns))
    return tensors


QUANTIZATION = {
    "quant_method": "bitinfer",
    "layout_version": 1,
    "format": "fbi_llm",
    "layout": {"planes": 1, "group_size": 0, "tensors": ["in_scale", "in_shift"], "norm_eps": None},
    "layouts": {},
    "modules_to_not_convert": ["lm_head"],
    "act_bits": None,
    "act_block": 0,
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("sizes", "saving", "extra", "width"),
    [((768, 2048, 12), 0.5926, 159_744, 1.0282), ((2048, 5632, 24), 0.8467, 860_160, 1.0105)],
)
def test_storage_as_published(tmp_path, sizes, saving, extra, width, packed):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if packed:
        config["quantization_config"] = QUANTIZATION
    info = describe(write_headers(tmp_path / "m", fbi_headers(*sizes, packed), config))
    assert (info.packed, info.format, len(info.layers)) == (packed, "fbi_llm", 7 * sizes[2])
    assert info.storage.saving == pytest.approx(saving, abs=5e-5)
    assert info.storage.extra_values == extra
    assert info.storage.average_bit_width == pytest.approx(width, abs=5e-5)
    assert info.storage.bits_per_weight == pytest.approx(1 + 16 * extra / info.storage.linear_weights)
    assert json.loads(json.dumps(info.to_dict()))["storage"]["extra_values"] == extra


def test_sizes_are_those_of_the_tensors(tmp_path):
    source = tiny_models.onebit(tmp_path / "onebit")
    report = convert(source, tmp_path / "packed")
    info = describe(tmp_path / "packed")
    assert info.storage.packed_bytes == report.bytes_after
    assert info.storage.linear_bytes == report.packed_bytes
    assert info.storage.bits_per_weight == pytest.approx(report.bits_per_weight)
    assert {x.name: (x.out_features, x.in_features) for x in info.layers} == {x.name: x.shape for x in report.layers}
    assert all(x.norm_eps == 1e-5 and x.tensors == ("weight_scale", "in_scale") for x in info.layers)
    assert [count for _, count, *_ in info.groups()] == [2] * 7
    assert "model.embed_tokens.weight" in info.dense


@pytest.mark.parametrize("make", [tiny_models.fbi, tiny_models.onebit])
def test_the_expectation_is_what_fp16_conversion_gives(tmp_path, make):
    source = make(tmp_path / "source")
    expected = describe(source)
    convert(source, tmp_path / "packed", dtype=torch.float16)
    assert not expected.packed
    assert expected.storage == describe(tmp_path / "packed").storage


def test_a_dense_model_is_described_as_latent(tmp_path):
    info = describe(tiny_models.dense(tmp_path / "dense"))
    assert info.format == "dense" and any("--format latent" in note for note in info.notes)
    assert len(info.layers) == 14 and not any("lm_head" in layer.name for layer in info.layers)


def test_columns_that_fill_no_whole_word_are_counted_right(tmp_path):
    """The tiny model has 176 columns in its last matrix; row scales do not tell, the configuration does."""
    write_dense(tmp_path / "dense", "tiny")
    report = convert(tmp_path / "dense", tmp_path / "packed", format="latent")
    assert {x.in_features for x in describe(tmp_path / "packed").layers} == {64, 176}
    assert describe(tmp_path / "packed").storage.bits_per_weight == pytest.approx(report.bits_per_weight)


def test_a_missing_scale_is_named(tmp_path):
    tensors = fbi_headers(64, 96, 1, packed=True)
    del tensors["model.layers.0.mlp.up_proj.in_shift"]
    folder = write_headers(tmp_path / "m", tensors, {"model_type": "llama", "quantization_config": QUANTIZATION})
    with pytest.raises(FormatError, match=r"model\.layers\.0\.mlp\.up_proj\.in_shift is missing"):
        describe(folder)


def test_folders_that_are_not_packed(tmp_path):
    with pytest.raises(FormatError, match=r"no such folder; write one with: bitinfer convert"):
        packed_quantization(tmp_path / "none")
    with pytest.raises(FormatError, match=r"not a packed folder; run: bitinfer convert"):
        packed_quantization(tiny_models.dense(tmp_path / "dense"))
    with pytest.raises(FormatError, match="no such folder"):
        describe(tmp_path / "none")
