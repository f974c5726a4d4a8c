"""Student layers: their formulas, gradients and start values, and the walk that puts them in."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitinfer
from bitinfer.distill import FBILinear, OneBitLinear, make_student
from bitinfer.distill.students import flip_ratio, latent_signs
from bitinfer.formats.latent import svid


def dense(rows: int = 12, columns: int = 40, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(columns, rows, bias=bias)


def test_fbi_starts_from_the_papers_values():
    linear = dense()
    layer = FBILinear(linear, latent_std=0.01)
    weight = linear.weight.detach()
    torch.testing.assert_close(layer.wbias.detach(), weight.mean(0, keepdim=True))
    torch.testing.assert_close(layer.wscale.detach(), (weight - weight.mean(0)).abs().mean(0, keepdim=True))
    assert abs(layer.weight.std().item() - 0.01) < 1e-6
    assert torch.equal(layer.weight < 0, weight < 0)


def test_fbi_formula_and_straight_through_gradient():
    layer, x = FBILinear(dense()), torch.randn(7, 40)
    layer.weight.data[0, 0] = 0.0  # counts as +1, as it does once packed
    signs = torch.where(layer.weight < 0, -1.0, 1.0)
    torch.testing.assert_close(layer(x), F.linear(x, layer.wscale * signs + layer.wbias, layer.bias))
    grad = torch.randn(7, 12)
    layer(x).backward(grad)
    dense_grad = grad.t() @ x
    torch.testing.assert_close(layer.weight.grad, dense_grad * layer.wscale.detach())
    torch.testing.assert_close(layer.wscale.grad, (dense_grad * signs).sum(0, keepdim=True))
    torch.testing.assert_close(layer.wbias.grad, dense_grad.sum(0, keepdim=True))


def test_onebit_formula_and_gradient():
    layer, x = OneBitLinear(dense(), "ones"), torch.randn(7, 40)
    layer.weight.data *= 10
    layer.input_factor.data.uniform_(0.5, 1.5)
    layer.weight_scale.data.uniform_(-1.5, 1.5)
    signs = torch.where(layer.weight < 0, -1.0, 1.0).detach().requires_grad_()
    z = F.linear(x * layer.input_factor, signs) * layer.weight_scale
    wanted = F.layer_norm(z, (12,), eps=1e-5) + layer.bias
    torch.testing.assert_close(layer(x), wanted)
    grad = torch.randn(7, 12)
    (by_signs,) = torch.autograd.grad(wanted, signs, grad)
    layer(x).backward(grad)
    torch.testing.assert_close(layer.weight.grad, by_signs * (1.001 - torch.tanh(layer.weight.detach()).square()))


@pytest.mark.parametrize("start", ["nmf", "svd"])
def test_svid_start(start):
    linear = dense(30, 50)
    layer = OneBitLinear(linear, start)
    weight = linear.weight.detach()
    assert torch.equal(layer.weight < 0, weight < 0)
    assert torch.equal(layer.weight.detach().abs(), torch.full_like(weight, 0.01))
    h, g = layer.weight_scale.detach(), layer.input_factor.detach()
    assert (h >= 0).all() and (g >= 0).all()
    error = (weight - torch.outer(h, g) * torch.sign(weight)).norm()
    # better than one scale for all, as the paper's proposition says of the decomposition against signs alone
    assert error < (weight - weight.abs().mean() * torch.sign(weight)).norm()
    assert error < (weight - torch.sign(weight)).norm()


def test_svid_by_svd_is_the_best_rank_one_fit_and_nmf_comes_close():
    magnitudes = dense(30, 50).weight.detach().abs()
    best = torch.linalg.svdvals(magnitudes)[1:].norm()
    (h, g), (h2, g2) = svid(magnitudes, "svd"), svid(magnitudes, "nmf")
    assert torch.isclose((magnitudes - torch.outer(h, g)).norm(), best, rtol=1e-3)
    assert best <= (magnitudes - torch.outer(h2, g2)).norm() * 1.001 < 1.01 * best * 1.001


@pytest.mark.parametrize("make", [FBILinear, OneBitLinear])
def test_packed_layers_agree(make):
    for bias in (True, False):
        layer, x = make(dense(13, 45, bias)), torch.randn(5, 45)
        packed = bitinfer.BinaryLinear.from_weight(layer.to_packed())
        torch.testing.assert_close(packed(x), layer(x).detach(), rtol=2e-5, atol=2e-5)
        layer.weight.data.neg_()
        assert not torch.allclose(packed(x), layer(x).detach())  # to_packed copied


def test_the_walk_takes_and_leaves_what_replace_linear_does():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 8)
            self.shared = nn.Linear(8, 8)
            self.again = self.shared
            self.tied = nn.Linear(8, 9, bias=False)
            self.tied.weight = self.embedding.weight
            self.lm_head = nn.Linear(8, 9)

    for method in ("fbi", "onebit"):
        students, packed = Model(), Model()
        report, wanted = make_student(students, method), bitinfer.replace_linear(packed)
        assert report.replaced == wanted.replaced == ["shared", "again"] and report.skipped == wanted.skipped
        assert students.shared is students.again
    with pytest.raises(ValueError, match="method"):
        make_student(Model(), "other")
    with pytest.raises(ValueError, match="no linear layer"):
        make_student(nn.ReLU(), "fbi")


def test_flip_ratio_counts_signs_that_changed():
    layer = FBILinear(dense(10, 10))
    before = latent_signs(layer)
    layer.weight.data[:2] *= -1
    assert flip_ratio(before, latent_signs(layer)).item() == pytest.approx(0.2)


@pytest.mark.parametrize("make", [FBILinear, OneBitLinear])
def test_compiled_layers_have_the_same_gradients(make, compiler):
    layer, x = make(dense()), torch.randn(7, 40)
    layer(x).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    torch.compile(layer, backend=compiler, fullgraph=True)(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5)
