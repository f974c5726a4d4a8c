"""Packed folders that are damaged or do not fit: every one is refused by a message that names the tensor."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import llama, pack, save
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitinfer import BitinferConfig, FormatError, WeightLayout
from bitinfer.testing.problems import FBI, ONEBIT, ROW

LAYER = "model.layers.1.mlp.up_proj"
GATE = "model.layers.1.mlp.gate_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(pack(llama(), FBI), tmp_path / "packed")


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= fields
    file.write_text(json.dumps(config))


def load(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


# tensors


@pytest.mark.parametrize("part", ["weight", "in_scale", "in_shift"])
def test_a_missing_tensor(folder, part):
    edit_tensors(folder, lambda t: t.pop(f"{LAYER}.{part}"))
    with pytest.raises(FormatError, match=rf"{LAYER}\.{part} is in none of the weight files"):
        load(folder)


def test_a_missing_tensor_is_not_excused_by_ignoring_mismatches(folder):
    edit_tensors(folder, lambda t: t.update({f"{LAYER}.in_scale": torch.ones(1, 32)}))
    with pytest.raises(FormatError, match=rf"{LAYER}\.in_scale"):
        load(folder, ignore_mismatched_sizes=True)


def test_a_missing_bias(tmp_path):
    folder = save(pack(llama(bias=True), FBI), tmp_path)
    name = "model.layers.0.self_attn.k_proj.bias"
    edit_tensors(folder, lambda t: t.pop(name))
    with pytest.raises(FormatError, match=rf"{name} is in none"):
        load(folder)


@pytest.mark.parametrize(
    ("part", "tensor", "seen"),
    [
        ("weight", torch.zeros(200, 2, dtype=torch.uint32), r"U32 \(200, 2\).*need U32 \(200, 3\)"),
        ("weight", torch.zeros(200, 3, dtype=torch.int32), r"I32 \(200, 3\).*need U32"),
        ("weight", torch.zeros(1, 200, 3, dtype=torch.uint32), r"U32 \(1, 200, 3\)"),
        ("weight", torch.zeros(200, 96), r"F32 \(200, 96\).*a dense weight.*bitinfer convert"),
        ("in_scale", torch.ones(96), r"F32 \(96,\).*need F32 or F16 or BF16 \(1, 96\)"),
        ("in_shift", torch.ones(1, 96, dtype=torch.float64), r"F64 \(1, 96\)"),
    ],
)
def test_a_tensor_of_the_wrong_kind(folder, part, tensor, seen):
    edit_tensors(folder, lambda t: t.update({f"{LAYER}.{part}": tensor}))
    with pytest.raises(FormatError, match=rf"model\.safetensors: {LAYER}\.{part} is {seen}"):
        load(folder)


@pytest.mark.parametrize("part", ["weight_scale", "group_shift", "bias"])
def test_a_tensor_that_the_layout_does_not_have(folder, part):
    """transformers would drop it with a warning, and the layer would compute something else."""
    shape = (200,) if part == "bias" else (200, 1)
    edit_tensors(folder, lambda t: t.update({f"{LAYER}.{part}": torch.ones(shape)}))
    with pytest.raises(FormatError, match=rf"{LAYER}\.{part} .* is stored, but"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(folder, value):
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.in_scale"][0, 5] = value

    edit_tensors(folder, spoil)
    with pytest.raises(FormatError, match=rf"{LAYER}\.in_scale.* 1 values that are NaN or infinite"):
        load(folder)


@pytest.mark.parametrize("bit", [8, 31])
def test_bits_past_the_last_column(folder, bit):
    name = "model.layers.0.mlp.down_proj.weight"  # 200 columns: 8 bits of the last word

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(torch.int32)[7, -1] |= 1 << bit if bit < 31 else -(2**31)

    edit_tensors(folder, spoil)
    with pytest.raises(FormatError, match=f"{name} has bits set past column 200"):
        load(folder)


def test_scales_beyond_the_range_of_float16(folder):
    edit_tensors(folder, lambda t: t[f"{LAYER}.in_scale"].fill_(1e6))
    load(folder)
    with pytest.raises(FormatError, match=rf"{LAYER}\.in_scale, loaded as torch.float16, holds 96 values"):
        load(folder, dtype=torch.float16)


def test_tensors_from_memory_are_checked_too(folder):
    """No file, and no header to look at first."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    model = llama()
    model.config.quantization_config = config
    tensors = load_file(folder / "model.safetensors")
    kind = type(model)
    kind.from_pretrained(None, config=model.config, state_dict=dict(tensors))
    tensors[f"{LAYER}.weight"] = torch.zeros(200, 4, dtype=torch.uint32)
    with pytest.raises((FormatError, RuntimeError), match=rf"{LAYER}\.weight is torch.uint32 \(200, 4\)|mismatched"):
        kind.from_pretrained(None, config=model.config, state_dict=dict(tensors))


@pytest.mark.parametrize("keep", [0, 100, 60_000])
def test_a_truncated_file(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"model\.safetensors: not a complete safetensors file"):
        load(folder)


# configuration against tensors


def test_a_packed_layer_listed_as_dense(folder):
    edit_config(folder, modules_to_not_convert=["lm_head", LAYER])
    with pytest.raises(FormatError, match=rf"{LAYER}\.weight is packed.*modules_to_not_convert"):
        load(folder)


def test_a_dense_layer_that_is_not_listed(folder):
    edit_config(folder, modules_to_not_convert=[])
    with pytest.raises(FormatError, match=r"lm_head\.weight is F32 \(80, 96\).*list its layer in modules_to_not_conv"):
        load(folder)


def test_names_are_compared_whole(folder):
    """``up_proj`` is no layer of this model, and leaves none out."""
    edit_config(folder, modules_to_not_convert=["lm_head", "up_proj", "model.layers.1.mlp"])
    load(folder)


def test_a_tied_head_that_is_said_to_be_packed(tmp_path):
    folder = save(pack(llama(tied=True), FBI), tmp_path)
    edit_config(folder, modules_to_not_convert=[])
    with pytest.raises(FormatError, match="lm_head is tied to another layer"):
        load(folder)


def test_the_layout_of_one_layer_is_wrong(folder):
    edit_config(folder, layouts={GATE: WeightLayout(planes=2, tensors=FBI.tensors).to_dict()})
    with pytest.raises(FormatError, match=rf"{GATE}\.in_scale is F32 \(1, 96\).*planes=2.*\(1, 1, 96\)"):
        load(folder)


def test_without_a_list_the_head_stays_dense(folder):
    edit_config(folder, modules_to_not_convert=None)
    load(folder)


# the configuration alone


def test_a_newer_layout_is_refused_before_all_else(folder):
    edit_config(folder, layout_version=2, layout={"something": "new"}, more=1)
    with pytest.raises(FormatError, match=r"layout_version 2, written by a newer bitinfer.*pip install -U bitinfer"):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"layout_version": "1"}, TypeError, "layout_version must be int, got '1'"),
        ({"layout_version": True}, TypeError, "layout_version must be int, got True"),
        ({"layout_version": 0}, ValueError, "layout_version must be at least 1"),
        ({"act_bits": 3}, ValueError, "act_bits must be None or one of"),
        ({"act_bits": "8"}, TypeError, "act_bits must be int"),
        ({"act_bits": True}, TypeError, "act_bits must be int"),
        ({"act_block": 128}, ValueError, "act_block must be 0 or 256"),
        ({"act_block": None}, TypeError, "act_block must be int"),
        ({"layout": [1]}, TypeError, "layout must be Mapping"),
        ({"layout": {"plane": 1}}, ValueError, "layout is not valid.*unknown keys"),
        ({"layout": {"planes": "2"}}, TypeError, r"layout\['planes'\] must be int"),
        ({"layout": {"group_size": 48}}, ValueError, "layout is not valid.*multiple of 32"),
        ({"layouts": ["a"]}, TypeError, "layouts must be Mapping"),
        ({"layouts": {"a": 1}}, TypeError, r"layouts\['a'\] must be WeightLayout or Mapping"),
        ({"layouts": {"a": {"planes": 0}}}, ValueError, r"layouts\['a'\] is not valid.*planes"),
        ({"modules_to_not_convert": "lm_head"}, TypeError, "modules_to_not_convert must be a list of names"),
        ({"modules_to_not_convert": [1]}, TypeError, "an entry of modules_to_not_convert must be str"),
        ({"zeros": {"a": "1"}}, TypeError, r"zeros\['a'\] must be int"),
        ({"source": {"a": 1}}, TypeError, r"source\['a'\] must be str"),
        ({"format": 1}, TypeError, "format must be str"),
        ({"act_bit": 8}, TypeError, r"unknown fields \['act_bit'\]"),
        ({"quant_method": "gptq"}, ValueError, "quant_method must be 'bitinfer'"),
    ],
)
def test_bad_fields_are_named(fields, error, match):
    with pytest.raises(error, match=match):
        BitinferConfig(**fields)


def test_a_configuration_round_trips():
    config = BitinferConfig(4, 256, layout=ONEBIT, layouts={"a": ROW}, modules_to_not_convert=["b"], zeros={"a": 1})
    values = json.loads(config.to_json_string())
    assert values == config.to_dict() == dict(config)
    assert BitinferConfig.from_dict(values).to_dict() == values
    assert config.layout_of("a") == ROW and config.layout_of("c") == ONEBIT
    assert config.layout_of("model.a", "model") == ROW
    values["layouts"]["a"]["planes"] = 9
    assert config.layout_of("a") == ROW  # what was handed out is a copy
