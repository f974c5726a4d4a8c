"""BinaryWeight and WeightLayout: the algebra's fields, their shapes, and the dense matrix they stand for."""

import json

import pytest
import torch

from bitinfer import BinaryWeight, WeightLayout
from bitinfer.packing import pack_signs
from bitinfer.testing.problems import EVERYTHING, LAYOUTS, GemmProblem


def by_hand(weight: BinaryWeight) -> list[list[float]]:
    """The dense matrix by the formula, one element at a time."""
    planes = weight.signs if weight.signs.dim() == 3 else weight.signs.unsqueeze(0)
    words = planes.tolist()
    rows = []
    for n in range(weight.out_features):
        row = []
        for k in range(weight.in_features):
            g = k // weight.group_size if weight.group_size else 0
            value = 0.0
            for p in range(weight.planes):
                sign = -1.0 if words[p][n][k // 32] >> (k % 32) & 1 else 1.0
                scale = 1.0
                if weight.scale is not None:
                    scale = float(weight.scale[p, n, g] if weight.scale.dim() == 3 else weight.scale[n, g])
                value += scale * sign
            if weight.group_shift is not None:
                value += float(weight.group_shift.reshape(weight.out_features, -1)[n, g])
            if weight.in_scale is not None:
                value *= float(weight.in_scale.flatten()[k])
            if weight.in_shift is not None:
                value += float(weight.in_shift.flatten()[k])
            row.append(value)
        rows.append(row)
    return rows


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("k", [33, 150])
def test_to_dense_is_the_formula(name, k):
    _, weight = GemmProblem(name, 1, 5, k, LAYOUTS[name]).make(seed=k)
    torch.testing.assert_close(weight.to_dense(torch.float64), torch.tensor(by_hand(weight), dtype=torch.float64))


@pytest.mark.parametrize("name", LAYOUTS)
def test_tensors_and_layout_round_trip(name):
    _, weight = GemmProblem(name, 1, 6, 100, LAYOUTS[name], bias=True).make()
    assert weight.layout == LAYOUTS[name]
    tensors = weight.tensors("a.b.")
    assert all(key.startswith("a.b.") for key in tensors)
    again = BinaryWeight.from_tensors(
        tensors, 100, WeightLayout.from_dict(json.loads(json.dumps(weight.layout.to_dict()))), "a.b."
    )
    assert torch.equal(again.to_dense(), weight.to_dense())
    assert again.bias is not None and torch.equal(again.bias, weight.bias)
    assert weight.nbytes == sum(t.nbytes for t in tensors.values())


def test_from_dense_keeps_a_binary_matrix():
    scale = torch.tensor([[0.5], [2.0], [0.125]])
    dense = torch.where(torch.randn(3, 45) < 0, -scale, scale)
    assert torch.equal(BinaryWeight.from_dense(dense).to_dense(), dense)


def test_from_dense_by_group_is_the_mean_of_each_group():
    dense = torch.randn(4, 80)
    weight = BinaryWeight.from_dense(dense, group_size=32)
    assert weight.scale is not None and weight.scale.shape == (4, 3)
    for g, columns in enumerate((slice(0, 32), slice(32, 64), slice(64, 80))):
        torch.testing.assert_close(weight.scale[:, g], dense[:, columns].abs().mean(-1))


def test_bits_per_weight_of_the_7b_shape():
    layout = WeightLayout(tensors=("in_scale", "in_shift"))
    _, weight = GemmProblem("7b", 1, 4096, 4096, layout).make(torch.float16)
    assert weight.bits_per_weight == 1 + 2 * 16 / 4096


def test_to_casts_scales_and_leaves_words():
    _, weight = GemmProblem("g", 1, 4, 64, EVERYTHING, bias=True).make()
    half = weight.to(torch.float16)
    assert half.signs.dtype == torch.uint32 and half.scale.dtype == half.bias.dtype == torch.float16
    assert weight.to("meta").signs.is_meta


WORDS = pack_signs(torch.randn(4, 64))


@pytest.mark.parametrize(
    ("error", "match", "fields"),
    [
        (TypeError, "signs must be torch.uint32, got torch.int32", {"signs": WORDS.view(torch.int32)}),
        (ValueError, r"signs must be \[N, K/32\]", {"signs": WORDS[0]}),
        (ValueError, "a single plane is held as", {"signs": WORDS.unsqueeze(0)}),
        (ValueError, r"signs has shape \(4, 2\) but in_features=65", {"in_features": 65}),
        (ValueError, "in_features must be at least 1", {"in_features": 0}),
        (ValueError, r"scale has shape \(4,\).*need \(4, 1\)", {"scale": torch.ones(4)}),
        (ValueError, r"in_scale has shape \(64,\).*need \(1, 64\)", {"in_scale": torch.ones(64)}),
        (ValueError, r"group_shift has shape \(4, 1\).*need \(4, 2\)",
         {"group_shift": torch.ones(4, 1), "group_size": 32}),
        (ValueError, r"bias has shape \(3,\).*need \(4,\)", {"bias": torch.ones(3)}),
        (TypeError, "scale must be float32, float16 or bfloat16", {"scale": torch.ones(4, 1, dtype=torch.float64)}),
        (ValueError, "group_size must be 0 or a multiple of 32, got 20", {"group_size": 20}),
        (ValueError, "norm_eps must be None or a number from 0", {"norm_eps": -1.0}),
    ],
)  # fmt: skip
def test_errors_name_the_field(error, match, fields):
    with pytest.raises(error, match=match):
        BinaryWeight(**{"signs": WORDS, "in_features": 64, **fields})


def test_layout_errors():
    with pytest.raises(ValueError, match="unknown tensors"):
        WeightLayout(tensors=("scale",))
    with pytest.raises(ValueError, match="unknown keys"):
        WeightLayout.from_dict({"plane": 2})
    with pytest.raises(ValueError, match="planes must be at least 1"):
        WeightLayout(planes=0)
    with pytest.raises(TypeError, match=r"group_size must be an int, got 64\.0"):
        WeightLayout(group_size=64.0)
    with pytest.raises(KeyError):
        BinaryWeight.from_tensors({"weight": WORDS}, 64, WeightLayout())
