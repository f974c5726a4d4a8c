"""OneBit: packed releases and training checkpoints against the formula computed from the source tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_folder import linears, load_packed, sign, signs_of
from torch import Tensor

from bitinfer.checkpoint import Checkpoint
from bitinfer.convert import convert
from bitinfer.errors import FormatError
from bitinfer.formats import FORMATS, detect
from bitinfer.testing.checkpoints import write_onebit

ONEBIT = FORMATS["onebit"]


def unpack(octets: Tensor) -> Tensor:
    """The authors' inference formula: bit j of byte m is column 8 m + j, and stands for ``1 - 2 bit``."""
    bits = [(octets.to(torch.int32) >> j) & 1 for j in range(8)]
    return 1.0 - 2.0 * torch.stack(bits, -1).flatten(1).double()


def signs(source: dict[str, Tensor], name: str) -> Tensor:
    weight = source[f"{name}.weight"]
    return unpack(weight) if weight.dtype == torch.int8 else sign(weight)


def formula(source: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """``LayerNorm(h * (S (g * x))) + b`` in float64."""
    h, g = (source[f"{name}.{part}"].double() for part in ("weight_scale", "input_factor"))
    z = h * ((x.double() * g) @ signs(source, name).T)
    y = (z - z.mean(-1, keepdim=True)) / (z.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    bias = source.get(f"{name}.bias")
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "latent"])
@pytest.mark.parametrize(("bias", "kind", "shards"), [(True, "bin", 2), (False, "safetensors", 3)])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_convert_is_bit_exact(tmp_path, packed, bias, kind, shards, dtype):
    source = write_onebit(tmp_path / "src", packed=packed, bias=bias, kind=kind, shards=shards)
    assert detect(Checkpoint(tmp_path / "src")).name == "onebit"
    report = convert(tmp_path / "src", tmp_path / "dst", dtype=dtype)
    tensors, config = load_packed(tmp_path / "dst")
    target = torch.bfloat16 if dtype else torch.float32
    assert {layer.name for layer in report.layers} == set(linears(source))
    for name in linears(source):
        columns = source[f"{name}.input_factor"].numel()
        assert torch.equal(signs_of(tensors[f"{name}.weight"], columns), signs(source, name))
        assert torch.equal(tensors[f"{name}.weight_scale"], source[f"{name}.weight_scale"].unsqueeze(1).to(target))
        assert torch.equal(tensors[f"{name}.in_scale"], source[f"{name}.input_factor"].unsqueeze(0).to(target))
        assert (f"{name}.bias" in tensors) == (bias and "self_attn" in name)
        if f"{name}.bias" in tensors:
            assert torch.equal(tensors[f"{name}.bias"], source[f"{name}.bias"].to(target))
    assert config["quantization_config"]["layout"]["norm_eps"] == 1e-5
    assert config["quantization_config"]["layouts"] == {}


def test_words_are_the_released_bytes_without_a_copy(tmp_path):
    source = write_onebit(tmp_path / "src", kind="safetensors")
    checkpoint = Checkpoint(tmp_path / "src")
    name = "model.layers.0.self_attn.q_proj"
    stored = checkpoint.tensor(f"{name}.weight")
    words = ONEBIT.read(checkpoint, name).signs
    assert words.data_ptr() == stored.data_ptr()
    assert torch.equal(words.view(torch.int8), source[f"{name}.weight"])


def test_bytes_at_an_odd_address_are_copied():
    octets = torch.arange(-30, 35, dtype=torch.int8)[1:].view(8, 8)
    source = {"x.weight": octets, "x.weight_scale": torch.ones(8), "x.input_factor": torch.ones(64)}
    assert torch.equal(signs_of(ONEBIT.read(source, "x").signs, 64), unpack(octets))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 20), octets=st.integers(1, 20), seed=st.integers(0, 1000))
def test_any_number_of_bytes(rows, octets, seed):
    generator = torch.Generator().manual_seed(seed)
    source = {
        "x.weight": torch.randint(-128, 128, (rows, octets), generator=generator, dtype=torch.int8),
        "x.weight_scale": torch.randn(rows, generator=generator),
        "x.input_factor": torch.randn(8 * octets, generator=generator),
    }
    packed = ONEBIT.read(source, "x")
    assert torch.equal(signs_of(packed.signs, 8 * octets), unpack(source["x.weight"]))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "latent"])
def test_reference_linear_is_the_formula(tmp_path, packed):
    source = write_onebit(tmp_path / "src", packed=packed, bias=True)
    checkpoint = Checkpoint(tmp_path / "src")
    for name in linears(source)[:7]:
        x = torch.randn(5, source[f"{name}.input_factor"].numel(), generator=torch.Generator().manual_seed(1))
        y = ONEBIT.reference_linear(checkpoint, name)(x)
        torch.testing.assert_close(y.double(), formula(source, name, x), rtol=1e-4, atol=1e-5)


def test_config_becomes_one_of_llama(tmp_path):
    from transformers import AutoConfig

    write_onebit(tmp_path / "src", bias=True)
    convert(tmp_path / "src", tmp_path / "dst", dtype="float16")
    config = load_packed(tmp_path / "dst")[1]
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-6  # BitLlamaConfig's default: the source does not state it
    assert config["attention_bias"] is True
    assert config["dtype"] == "float16"
    assert not {"kd_alpha", "torch_dtype", "transformers_version"} & config.keys()
    loaded = AutoConfig.from_pretrained(tmp_path / "dst")
    assert (loaded.hidden_size, loaded.intermediate_size, loaded.num_hidden_layers) == (64, 176, 2)


def test_scales_of_the_wrong_length_are_refused():
    source = {
        "x.weight": torch.zeros(4, 8, dtype=torch.int8),
        "x.weight_scale": torch.ones(4),
        "x.input_factor": torch.ones(32),
    }
    with pytest.raises(FormatError, match=r"x\.input_factor has shape \(32,\), expected \(64,\)"):
        ONEBIT.read(source, "x")
    source |= {"x.input_factor": torch.ones(64), "x.weight_scale": torch.ones(5)}
    with pytest.raises(FormatError, match=r"x\.weight_scale has shape \(5,\), expected \(4,\)"):
        ONEBIT.read(source, "x")
