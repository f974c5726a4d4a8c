"""BinaryLinear and replace_linear: drop-in behaviour, and models with tied, shared and special layers."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from bitinfer import BinaryLinear, BinaryWeight, WeightLayout, replace_linear
from bitinfer.testing.oracle import exact_linear, fp_error_bound
from bitinfer.testing.problems import LAYOUTS, GemmProblem


def words(module: BinaryLinear) -> torch.Tensor:
    return module.weight.detach().view(torch.int32)


def make(name: str = "everything", dtype=torch.float32, **kwargs) -> tuple[torch.Tensor, BinaryWeight, BinaryLinear]:
    x, weight = GemmProblem(name, 4, 9, 100, LAYOUTS[name], bias=True).make(dtype)
    return x, weight, BinaryLinear.from_weight(weight, **kwargs)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_forward_and_dequantize(name, dtype):
    x, weight, module = make(name, dtype)
    y = module(x)
    assert y.dtype == dtype
    assert (y.double() - exact_linear(x, weight)).abs().max() <= fp_error_bound(x, weight)
    dense = module.dequantize(torch.float32)
    torch.testing.assert_close(dense(x.float()).double(), exact_linear(x, weight), rtol=1e-3, atol=1e-3)


def test_from_linear_is_lossless_on_a_binary_layer():
    linear = nn.Linear(70, 5)
    linear.weight.data = torch.where(linear.weight < 0, -0.25, 0.25)
    module = BinaryLinear.from_linear(linear)
    x = torch.randn(3, 70)
    torch.testing.assert_close(module(x), linear(x))
    assert torch.equal(module.dequantize().weight, linear.weight)
    assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize("block", [0, 256])
def test_quantised_activations_approach_the_exact_product(bits, block):
    x, weight = GemmProblem("q", 8, 64, 600, LAYOUTS["fbi"]).make()
    y = BinaryLinear.from_weight(weight, act_bits=bits, act_block=block)(x)
    exact = exact_linear(x, weight)
    error = (y - exact).norm() / exact.norm()
    assert error < {8: 0.02, 4: 0.2, 2: 0.9, 1: 0.9}[bits]


def test_state_dict_copies_and_pickles():
    x, _, module = make()
    expected = module(x)
    fresh = BinaryLinear(100, 9, layout=module.layout)
    fresh.load_state_dict(module.state_dict())
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    state = io.BytesIO()
    torch.save(module.state_dict(), state)
    state.seek(0)
    loaded = BinaryLinear(100, 9, layout=module.layout)
    loaded.load_state_dict(torch.load(state, weights_only=True))
    again = [fresh, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded]
    again.append(torch.load(buffer, weights_only=False))
    for other in again:
        assert other.weight.dtype == torch.uint32
        assert torch.equal(words(other), words(module)) and other.weight.data_ptr() != module.weight.data_ptr()
        assert torch.equal(other(x), expected)


def test_deepcopy_keeps_ties():
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": shared, "c": shared})
    model["a"].weight = shared.weight
    replace_linear(model)
    clone = copy.deepcopy(model)
    assert clone["b"] is clone["c"] and clone["a"].weight is clone["b"].weight
    assert clone["a"].weight is not model["a"].weight


def test_to_casts_scales_and_moves_words():
    _, _, module = make()
    before = words(module).clone()
    module.to(torch.bfloat16)
    assert module.weight.dtype == torch.uint32 and torch.equal(words(module), before)
    assert module.weight_scale.dtype == module.bias.dtype == module.in_scale.dtype == torch.bfloat16
    module.half()
    assert module.weight.dtype == torch.uint32 and module.bias.dtype == torch.float16
    meta = copy.deepcopy(module).to("meta")
    assert meta.weight.is_meta and meta.weight.dtype == torch.uint32
    assert pickle.loads(pickle.dumps(meta)).weight.is_meta


def test_repr_says_what_it_is():
    _, _, module = make("everything", act_bits=8, act_block=256)
    text = repr(module)
    for part in ("in_features=100", "out_features=9", "planes=2", "group_size=64", "norm_eps=1e-05", "int8", "256"):
        assert part in text
    assert "activations=fp" in repr(make("row")[2])


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [({"act_bits": 3}, "act_bits must be None or one of"), ({"act_block": 128}, "act_block must be 0 or 256")],
)
def test_bad_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        BinaryLinear(64, 4, **kwargs)
    with pytest.raises(TypeError, match="dtype must be float32"):
        BinaryLinear(64, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="meta device"):
        BinaryLinear.from_linear(nn.Linear(4, 4, device="meta"))


def test_wrong_input_width_is_named():
    with pytest.raises(ValueError, match="weight has in_features=100 but x has last dimension 99"):
        make("row")[2](torch.randn(2, 99))


def test_compile(compiler):
    x, _, module = make("fbi")
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradient_of_the_input_is_that_of_the_dense_module(name, compiled, compiler):
    x, _, module = make(name)
    dense = module.dequantize()
    grad = torch.randn(4, 9)
    run = torch.compile(module, fullgraph=True, backend=compiler) if compiled else module
    inputs = [x.clone().requires_grad_() for _ in range(3)]
    for own, forward in zip(inputs, (run, dense, module), strict=True):
        forward(own).backward(grad)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-4)
    module.act_bits = 8  # straight through the rounding
    quantised = x.clone().requires_grad_()
    module(quantised).backward(grad)
    torch.testing.assert_close(quantised.grad, inputs[2].grad, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- replace_linear
class Tiny(nn.Module):
    """An embedding tied to the head, a layer used twice, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.block = nn.ModuleDict({"up": nn.Linear(64, 96), "down": nn.Linear(96, 64)})
        self.twin = nn.Linear(64, 64, bias=False)
        self.other = nn.Linear(64, 64, bias=True)
        self.other.weight = self.twin.weight
        self.again = self.block["up"]
        self.lm_head = nn.Linear(64, 50, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.block["down"](torch.relu(self.block["up"](x)))
        x = x + self.block["down"](torch.relu(self.again(x)))
        return self.lm_head(self.other(self.twin(x)))


def test_replaces_everything_but_the_head():
    model = Tiny().eval()
    reference = copy.deepcopy(model)
    report = replace_linear(model)
    assert sorted(report.replaced) == ["again", "block.down", "block.up", "other", "twin"]
    assert report.skipped == {"lm_head": "skip='lm_head'"}
    assert model.again is model.block["up"] and model.twin.weight is model.other.weight
    assert not model.twin.training
    assert report.bytes_before > report.bytes_after > 50 * 64 * 4
    assert "packed 5 linear layers" in str(report)
    for name in ("block.up", "block.down", "twin", "other"):
        dense, packed = reference.get_submodule(name), model.get_submodule(name)
        dense.weight.data = packed.dequantize().weight
    tokens = torch.randint(0, 50, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference(tokens), rtol=1e-4, atol=1e-4)


def test_tied_head_stays_even_when_not_skipped():
    model = Tiny()
    report = replace_linear(model, skip=())
    assert report.skipped == {"lm_head": "its weight is tied to embed"}
    assert model.lm_head.weight is model.embed.weight


def test_weight_shared_with_a_skipped_layer_stays():
    model = Tiny()
    report = replace_linear(model, skip=("lm_head", "other"))
    assert report.skipped["other"] == "skip='other'"
    assert report.skipped["twin"] == "its weight is shared with other, which stays"


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (("block",), {"block.up", "block.down", "lm_head", "again"}),
        (("block.up", "lm_head"), {"block.up", "again", "lm_head"}),
        (("*down", "lm_head"), {"block.down", "lm_head"}),
        (("up", "lm_head"), {"block.up", "again", "lm_head"}),
        (("u", "lm_head"), {"lm_head"}),
    ],
)
def test_skip_matches_whole_names_and_patterns(skip, left):
    """A layer that stands at two places stays at both when one is skipped."""
    assert set(replace_linear(Tiny(), skip=skip).skipped) == left | {"lm_head"}


def test_packing_twice_reports_it():
    model = Tiny()
    replace_linear(model)
    before = words(model.twin).clone()
    report = replace_linear(model)
    assert report.replaced == [] and report.skipped["twin"] == "already packed"
    assert torch.equal(words(model.twin), before) and report.bytes_before == report.bytes_after


def test_torch_transformer_layers_work():
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 5, 64)
    report = replace_linear(layer)
    assert sorted(report.replaced) == ["linear1", "linear2"]
    assert "NonDynamicallyQuantizableLinear" in report.skipped["self_attn.out_proj"]
    dense = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0).eval()
    dense.load_state_dict({k: v for k, v in layer.state_dict().items() if "linear" not in k}, strict=False)
    dense.linear1, dense.linear2 = layer.linear1.dequantize(), layer.linear2.dequantize()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)


def test_own_binarizer_and_activation_format():
    seen = []

    def binarize(name: str, linear: nn.Linear) -> BinaryWeight:
        seen.append(name)
        return BinaryWeight.from_dense(linear.weight.detach(), group_size=32)

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    replace_linear(model, act_bits=8, act_block=256, binarize=binarize)
    assert seen == ["0", "2"]
    assert model[0].layout == WeightLayout(group_size=32) and (model[0].act_bits, model[2].act_block) == (8, 256)
    assert model(torch.randn(2, 64)).shape == (2, 8)


def test_a_bare_linear_is_refused():
    with pytest.raises(ValueError, match=r"use BinaryLinear.from_linear"):
        replace_linear(nn.Linear(4, 4))
