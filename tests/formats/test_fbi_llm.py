"""FBI-LLM: signs and scales of a converted folder against the formula computed from the source tensors."""

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
from bitinfer.testing.checkpoints import write_fbi_llm, write_weights

FBI = FORMATS["fbi_llm"]


def formula(source: dict[str, Tensor], name: str) -> Tensor:
    """``alpha sign(W) + beta`` in float64."""
    alpha, beta = (source[f"{name}.{part}"].double() for part in ("wscale", "wbias"))
    return alpha * sign(source[f"{name}.weight"]) + beta


@pytest.mark.parametrize("pattern", ["column", "row", "single"])
@pytest.mark.parametrize(("kind", "shards"), [("bin", 1), ("bin", 3), ("legacy_bin", 2), ("safetensors", 2)])
def test_convert_is_bit_exact(tmp_path, pattern, kind, shards):
    source = write_fbi_llm(tmp_path / "src", pattern=pattern, kind=kind, shards=shards)
    report = convert(tmp_path / "src", tmp_path / "dst")
    packed, config = load_packed(tmp_path / "dst")
    names = linears(source)
    assert report.format == "fbi_llm"
    assert {layer.name for layer in report.layers} == set(names)
    for name in names:
        rows, columns = source[f"{name}.weight"].shape
        signs = signs_of(packed.pop(f"{name}.weight"), columns)
        assert torch.equal(signs, sign(source[f"{name}.weight"]))
        scale, shift = ("in_scale", "in_shift") if pattern == "column" else ("weight_scale", "group_shift")
        alpha, beta = packed.pop(f"{name}.{scale}"), packed.pop(f"{name}.{shift}")
        assert alpha.shape == beta.shape == ((1, columns) if pattern == "column" else (rows, 1))
        assert alpha.dtype == beta.dtype == torch.float32
        assert torch.equal(alpha.double() * signs + beta.double(), formula(source, name))
    kept = {name: tensor for name, tensor in source.items() if not name.startswith(tuple(f"{n}." for n in names))}
    assert packed.keys() == kept.keys()
    assert all(torch.equal(packed[name], tensor) for name, tensor in kept.items())
    assert config["dtype"] == "float32"
    assert "torch_dtype" not in config
    assert config["quantization_config"]["format"] == "fbi_llm"
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head"]


def test_some_scales_are_negative(tmp_path):
    source = write_fbi_llm(tmp_path / "src")
    assert any((tensor < 0).any() for name, tensor in source.items() if name.endswith("wscale"))


def test_sign_is_that_of_the_stored_float32(tmp_path):
    """A cast to float16 flushes small latents to zero; the sign must be taken before."""
    source = write_fbi_llm(tmp_path / "src", tokenizer=False)
    source = {n: t * 1e-9 if n.endswith("_proj.weight") else t for n, t in source.items()}
    (tmp_path / "src" / "pytorch_model.bin").unlink()
    write_weights(tmp_path / "src", source)
    convert(tmp_path / "src", tmp_path / "dst", dtype="float16")
    packed, config = load_packed(tmp_path / "dst")
    assert config["dtype"] == "float16"
    for name in linears(source):
        weight = source[f"{name}.weight"]
        assert torch.equal(signs_of(packed[f"{name}.weight"], weight.shape[1]), sign(weight))
        assert torch.equal(packed[f"{name}.in_scale"], source[f"{name}.wscale"].half())
    assert all(t.dtype in (torch.float16, torch.uint32) for t in packed.values())


def test_rotary_buffers_are_left_out(tmp_path):
    source = write_fbi_llm(tmp_path / "src", inv_freq=True)
    assert any("inv_freq" in name for name in source)
    convert(tmp_path / "src", tmp_path / "dst")
    assert not any("inv_freq" in name for name in load_packed(tmp_path / "dst")[0])


def test_a_handful_of_zeros_is_counted(tmp_path):
    write_fbi_llm(tmp_path / "src", zeros=1)
    report = convert(tmp_path / "src", tmp_path / "dst")
    assert [layer.zeros for layer in report.layers] == [1] * len(report.layers)
    assert any("14 weights are exactly 0" in note for note in report.notes)
    zeros = load_packed(tmp_path / "dst")[1]["quantization_config"]["zeros"]
    assert zeros == {layer.name: 1 for layer in report.layers}


def test_many_zeros_are_refused_unless_allowed(tmp_path):
    source = write_fbi_llm(tmp_path / "src", zeros=50)
    with pytest.raises(FormatError, match=r"layers\.0\.self_attn\.q_proj\.weight holds 50 exact zeros.*zero_limit"):
        convert(tmp_path / "src", tmp_path / "dst")
    report = convert(tmp_path / "src", tmp_path / "dst", zero_limit=0.02)
    assert report.zeros == 50 * len(linears(source))
    with pytest.raises(FormatError, match="may become"):
        convert(tmp_path / "src", tmp_path / "none", zero_limit=0)


def test_reference_linear_is_the_formula(tmp_path):
    for pattern in ("column", "row", "single"):
        source = write_fbi_llm(tmp_path / pattern, pattern=pattern)
        checkpoint = Checkpoint(tmp_path / pattern)
        for name in FBI.layer_names(checkpoint)[:3]:
            dense = FBI.reference_linear(checkpoint, name).weight
            torch.testing.assert_close(dense.double(), formula(source, name), rtol=1e-6, atol=1e-9)


def test_reference_linear_has_sign_of_zero_and_bias():
    tensors = {
        "x.weight": torch.tensor([[0.0, -2.0], [3.0, 0.5]]),
        "x.wscale": torch.tensor([[2.0, -1.0]]),
        "x.wbias": torch.tensor([[0.5, 0.25]]),
        "x.bias": torch.tensor([1.0, -1.0]),
    }
    linear = FBI.reference_linear(tensors, "x")
    assert torch.equal(linear.weight, torch.tensor([[0.5, 1.25], [2.5, -0.75]]))
    assert torch.equal(linear.bias, tensors["x.bias"])
    weight, zeros = FBI.read_counted(tensors, "x")
    assert zeros == 1
    assert torch.equal(weight.to_dense(), torch.tensor([[2.5, 1.25], [2.5, -0.75]]))
    assert torch.equal(weight.bias, tensors["x.bias"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_materialised_weights_come_back_bit_for_bit(tmp_path, dtype):
    source = write_fbi_llm(tmp_path / "src", materialised=dtype)
    assert detect(Checkpoint(tmp_path / "src")).name == "fbi_llm"
    assert convert(tmp_path / "src", tmp_path / "dst").zeros == 0
    packed, config = load_packed(tmp_path / "dst")
    for name in linears(source):
        weight = source[f"{name}.weight"]
        signs = signs_of(packed[f"{name}.weight"], weight.shape[1]).float()
        # scales of the same dtype: loaded in it, the model still has the source's weights
        assert packed[f"{name}.in_scale"].dtype == packed[f"{name}.in_shift"].dtype == dtype
        alpha, beta = packed[f"{name}.in_scale"].float(), packed[f"{name}.in_shift"].float()
        assert torch.equal((alpha * signs + beta).to(dtype), weight)
    assert torch.equal(packed["lm_head.weight"], source["lm_head.weight"])
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_materialised_zeros_are_counted(tmp_path):
    """sign(0) = 0 left the shift alone: a third value, halfway between the two."""
    source = write_fbi_llm(tmp_path / "src", materialised=torch.float16, zeros=1)
    report = convert(tmp_path / "src", tmp_path / "dst")
    assert report.zeros == len(linears(source))


def test_materialised_columns_of_one_value():
    weight = torch.tensor([[0.5, 1.0, -3.0], [0.5, -1.0, -2.0], [0.5, 1.0, -2.0]])
    packed = FBI.read({"x.weight": weight}, "x")
    assert torch.equal(packed.to_dense(), weight)
    assert packed.in_scale[0, 0] == 0


def test_materialised_weights_with_more_values_are_refused():
    weight = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    with pytest.raises(FormatError, match=r"x\.weight has no wscale.*column 0 takes 50"):
        FBI.read({"x.weight": weight}, "x")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(2, 100),
    pattern=st.sampled_from(["column", "row", "single"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_any_shape(rows, columns, pattern, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    size = {"column": (1, columns), "row": (rows, 1), "single": (1,)}[pattern]
    source = {
        "x.weight": torch.randn(rows, columns, generator=generator).to(dtype) + 1e-3,
        "x.wscale": torch.randn(size, generator=generator).to(dtype),
        "x.wbias": torch.randn(size, generator=generator).to(dtype),
    }
    packed = FBI.read(source, "x")
    assert torch.equal(signs_of(packed.signs, columns), sign(source["x.weight"]))
    assert torch.equal(packed.to_dense(torch.float64), formula(source, "x"))
    assert all(t.dtype == dtype for name, t in packed.tensors().items() if name != "weight")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(3, 30),
    columns=st.integers(1, 60),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    ratio=st.sampled_from([0.0, 0.01, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_any_materialised_weight_comes_back(rows, columns, dtype, ratio, seed):
    generator = torch.Generator().manual_seed(seed)
    alpha = (0.02 * torch.randn(columns, generator=generator)).to(dtype)
    beta = (0.02 * ratio * torch.randn(columns, generator=generator)).to(dtype)
    weight = alpha * sign(torch.randn(rows, columns, generator=generator)).to(dtype) + beta
    packed = FBI.read({"x.weight": weight}, "x")
    assert packed.in_scale.dtype == packed.in_shift.dtype == dtype
    assert torch.equal(packed.to_dense(torch.float32).to(dtype), weight)


def test_patterns_of_a_square_matrix_are_told_apart():
    weight = torch.ones(2, 2)
    for shape, name in (
        ((1, 2), "in_scale"),
        ((2, 1), "weight_scale"),
        ((1,), "weight_scale"),
        ((1, 1), "weight_scale"),
    ):
        scales = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
        packed = FBI.read({"x.weight": weight, "x.wscale": scales, "x.wbias": 0 * scales}, "x")
        assert name in packed.layout.tensors
        assert torch.equal(packed.to_dense(), scales * weight)
