"""Dense weights that are binary already: packing them loses nothing, or is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_folder import linears, load_packed, signs_of
from torch import Tensor

from bitinfer.checkpoint import Checkpoint
from bitinfer.convert import convert
from bitinfer.errors import FormatError
from bitinfer.formats import FORMATS, detect
from bitinfer.formats.binary_dense import BinaryDense
from bitinfer.testing.checkpoints import write_binary_dense, write_weights

DENSE = FORMATS["binary_dense"]


def rebuild(packed: dict[str, Tensor], name: str, columns: int, group_size: int) -> Tensor:
    """``scale S + shift`` in float32, the groups spread over the columns."""

    def spread(values: Tensor) -> Tensor:
        return values.float().repeat_interleave(group_size or columns, 1)[:, :columns]

    dense = spread(packed[f"{name}.weight_scale"]) * signs_of(packed[f"{name}.weight"], columns).float()
    return dense + spread(packed[f"{name}.group_shift"]) if f"{name}.group_shift" in packed else dense


@pytest.mark.parametrize("group_size", [0, 128, 64, 32])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "shifted"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_convert_is_lossless(tmp_path, group_size, symmetric, dtype):
    source = write_binary_dense(tmp_path / "src", group_size=group_size, symmetric=symmetric, dtype=dtype)
    assert detect(Checkpoint(tmp_path / "src")).name == "binary_dense"
    report = convert(tmp_path / "src", tmp_path / "dst")
    packed, config = load_packed(tmp_path / "dst")
    names = linears(source)
    assert {layer.name for layer in report.layers} == set(names)
    for layer in report.layers:
        columns = layer.shape[1]
        # a group as wide as the row is a row
        assert layer.layout.group_size == (group_size if group_size < columns else 0)
        assert layer.layout.tensors == (("weight_scale",) if symmetric else ("weight_scale", "group_shift"))
        dense = rebuild(packed, layer.name, columns, layer.layout.group_size)
        assert torch.equal(dense.to(dtype), source[f"{layer.name}.weight"])
        stored = config["quantization_config"]
        assert stored["layouts"].get(layer.name, stored["layout"]) == layer.layout.to_dict()
    assert torch.equal(packed["lm_head.weight"], source["lm_head.weight"])


def test_unpacked_bonsai(tmp_path):
    """Qwen3 with tied embeddings: the head has no tensor, stays dense, and is named as such."""
    source = write_binary_dense(tmp_path / "src", "130m", architecture="qwen3", layers=1, vocab=300, group_size=128)
    report = convert(tmp_path / "src", tmp_path / "dst", skip=())
    packed, config = load_packed(tmp_path / "dst")
    assert "lm_head.weight" not in packed
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    assert report.layout.group_size == 128
    assert report.bits_per_weight == pytest.approx(1.125)
    for name in linears(source):
        dense = rebuild(packed, name, source[f"{name}.weight"].shape[1], 128)
        assert torch.equal(dense.half(), source[f"{name}.weight"])


def test_one_layer_that_is_not_binary_is_named_and_can_be_skipped(tmp_path):
    source = write_binary_dense(tmp_path / "src")
    name = "model.layers.1.mlp.down_proj"
    source[f"{name}.weight"] = torch.randn(64, 176).half()
    write_weights(tmp_path / "src", source)
    with pytest.raises(FormatError, match=rf"{name}\.weight is not binary: row \d+ takes \d+ values.*skip"):
        convert(tmp_path / "src", tmp_path / "dst")
    report = convert(tmp_path / "src", tmp_path / "dst", skip=["lm_head", name])
    packed, config = load_packed(tmp_path / "dst")
    assert torch.equal(packed[f"{name}.weight"], source[f"{name}.weight"])
    assert config["quantization_config"]["modules_to_not_convert"] == [name, "lm_head"]
    assert len(report.layers) == 13


@pytest.mark.parametrize(
    ("weight", "tensors"),
    [
        ([[0.0, 0.0, 0.0], [1.0, -1.0, 1.0]], ("weight_scale",)),  # an all-zero row has scale 0
        ([[2.0, 2.0, 2.0], [-1.0, -1.0, -1.0]], ("weight_scale",)),  # one value a row
        ([[0.0, 3.0, 0.0], [1.0, 0.0, 1.0]], ("weight_scale", "group_shift")),  # {0, s}
        ([[0.5, 0.25, 0.5], [7.0, 7.0, 7.0]], ("weight_scale", "group_shift")),
    ],
)
def test_odd_rows(weight, tensors):
    dense = torch.tensor(weight)
    packed = BinaryDense(zero_limit=0).read({"x.weight": dense}, "x")
    assert packed.layout.tensors == tensors
    assert torch.equal(packed.to_dense(), dense)


def test_a_few_zeros_among_plus_and_minus_become_plus():
    dense = torch.where(torch.rand(100, 200, generator=torch.Generator().manual_seed(0)) < 0.5, -1.5, 1.5)
    dense[3, 7] = 0.0
    packed, zeros = DENSE.read_counted({"x.weight": dense}, "x")
    assert zeros == 1
    dense[3, 7] = 1.5
    assert torch.equal(packed.to_dense(), dense)
    with pytest.raises(FormatError, match=r"x\.weight is not binary"):
        BinaryDense(zero_limit=0).read({"x.weight": dense.index_fill(1, torch.tensor([5]), 0.0)}, "x")


def test_levels_that_float32_cannot_give_back_are_refused():
    """Between two arbitrary levels in float32 there is not always a pair of scale and shift; nothing is rounded."""
    generator = torch.Generator().manual_seed(0)
    low, high = torch.randn(200, 2, generator=generator).sort(1).values.split(1, 1)
    dense = torch.where(torch.rand(200, 40, generator=generator) < 0.5, low, high)
    with pytest.raises(FormatError, match=r"x\.weight takes two values a row, but .* float16 or bfloat16"):
        DENSE.read({"x.weight": dense}, "x")
    for dtype in (torch.float16, torch.bfloat16):
        packed = DENSE.read({"x.weight": dense.to(dtype)}, "x")
        assert torch.equal(packed.to_dense(torch.float32).to(dtype), dense.to(dtype))


def test_ternary_is_refused():
    dense = torch.randint(-1, 2, (64, 64), generator=torch.Generator().manual_seed(0)).float()
    with pytest.raises(FormatError, match=r"x\.weight is not binary: row \d+ takes 3 values.*whole rows, 128, 64, 32"):
        DENSE.read({"x.weight": dense}, "x")


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 300),
    group_size=st.sampled_from([0, 32, 64, 128]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_any_shape_comes_back(rows, columns, group_size, symmetric, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    size = group_size or columns
    groups = -(-columns // size)
    scale = torch.randn(rows, groups, generator=generator)
    shift = 0.0 if symmetric else torch.randn(rows, groups, generator=generator)
    high, low = (shift + scale).to(dtype), (shift - scale).to(dtype)
    high, low = (t.repeat_interleave(size, 1)[:, :columns] for t in (high, low))
    dense = torch.where(torch.rand(rows, columns, generator=generator) < 0.5, low, high)
    packed = BinaryDense(group_size=group_size).read({"x.weight": dense}, "x")
    assert torch.equal(packed.to_dense(torch.float32).to(dtype), dense)
