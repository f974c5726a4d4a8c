"""Approximation by sign and scale: the scales are what their definition says."""

import numpy as np
import pytest
import torch
from packed_folder import linears, load_packed, sign, signs_of

from bitinfer.convert import convert
from bitinfer.errors import FormatError
from bitinfer.formats import FORMATS
from bitinfer.formats.latent import Latent, svid
from bitinfer.testing.checkpoints import write_dense


@pytest.mark.parametrize("group_size", [0, 32, 64])
def test_absmean(tmp_path, group_size):
    source = write_dense(tmp_path / "src")
    report = convert(tmp_path / "src", tmp_path / "dst", format="latent", group_size=group_size)
    packed, _ = load_packed(tmp_path / "dst")
    assert {layer.name for layer in report.layers} == set(linears(source))
    assert any("approximates" in note for note in report.notes)
    for name in linears(source):
        weight = source[f"{name}.weight"].double()
        assert torch.equal(signs_of(packed[f"{name}.weight"], weight.shape[1]), sign(weight))
        size = group_size if 0 < group_size < weight.shape[1] else weight.shape[1]
        means = torch.cat([part.abs().mean(1, keepdim=True) for part in weight.split(size, 1)], 1)
        torch.testing.assert_close(packed[f"{name}.weight_scale"].double(), means, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["nmf", "svd"])
def test_svid_is_the_best_fit_of_rank_one(tmp_path, method):
    source = write_dense(tmp_path / "src", layers=1)
    convert(tmp_path / "src", tmp_path / "dst", format="latent", method=method)
    packed, config = load_packed(tmp_path / "dst")
    assert config["quantization_config"]["layout"]["tensors"] == ["weight_scale", "in_scale"]
    for name in linears(source):
        weight = source[f"{name}.weight"].double()
        h, g = packed[f"{name}.weight_scale"].double(), packed[f"{name}.in_scale"].double()
        assert (h >= 0).all()
        assert (g >= 0).all()
        u, s, v = np.linalg.svd(weight.abs().numpy(), full_matrices=False)
        best = torch.from_numpy(s[0] * np.outer(u[:, 0], v[0]))
        # Eckart-Young: no other of rank one is closer, and the closest is unique
        torch.testing.assert_close(h * g, best, rtol=2e-2, atol=1e-3 * best.abs().max().item())
        dense = h * signs_of(packed[f"{name}.weight"], weight.shape[1]) * g
        assert torch.equal(dense.sign(), sign(weight) * (h * g > 0))


@pytest.mark.parametrize("method", ["nmf", "svd"])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_svid_is_balanced_for_float16(method, size):
    weight = size * torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    h, g = svid(weight, method)
    assert h.mean().item() == pytest.approx(g.mean().item(), rel=1e-4)
    for factor in (h, g):
        half = factor.half()
        assert torch.isfinite(half).all()
        assert half.min() > 6e-5  # normal numbers, with all their bits


@pytest.mark.parametrize("options", [{}, {"group_size": 32}, {"method": "svd"}, {"method": "nmf"}])
def test_reference_linear_agrees(options):
    reader = Latent(**options)
    weight = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    tensors = {"x.weight": weight, "x.bias": torch.arange(40.0)}
    reference = reader.reference_linear(tensors, "x")
    packed = reader.read(tensors, "x")
    torch.testing.assert_close(packed.to_dense(), reference.weight, rtol=1e-5, atol=1e-6)
    assert torch.equal(packed.bias, reference.bias)


def test_a_zero_matrix_has_zero_scales():
    for method in ("absmean", "nmf", "svd"):
        packed = Latent(method=method, zero_limit=1).read({"x.weight": torch.zeros(8, 40)}, "x")
        assert torch.equal(packed.to_dense(), torch.zeros(8, 40))


def test_is_never_detected(tmp_path):
    write_dense(tmp_path / "src")
    message = r"not a binary model: the first row of .*_proj\.weight takes 64 values.*--format latent"
    with pytest.raises(FormatError, match=message):
        convert(tmp_path / "src", tmp_path / "dst")
    assert not FORMATS["latent"].matches(None)


def test_options_are_checked(tmp_path):
    with pytest.raises(ValueError, match="method must be one of absmean, nmf, svd, got 'mean'"):
        Latent(method="mean")
    with pytest.raises(ValueError, match="needs method 'absmean'"):
        Latent(method="svd", group_size=64)


def test_experts_and_router_of_a_mixture_stay_dense_with_a_note(tmp_path):
    source = write_dense(tmp_path / "src", architecture="mixtral")
    report = convert(tmp_path / "src", tmp_path / "dst", format="latent")
    packed, _ = load_packed(tmp_path / "dst")
    assert len(report.layers) == 8
    assert any("26 tensors" in note and "experts.0.w1.weight" in note for note in report.notes)
    for name, tensor in source.items():
        if "block_sparse_moe" in name:
            assert torch.equal(packed[name], tensor)


def test_tied_head_is_not_packed(tmp_path):
    write_dense(tmp_path / "src", architecture="qwen3")
    report = convert(tmp_path / "src", tmp_path / "dst", format="latent", skip=())
    assert report.kept_dense == ["lm_head"]


def test_untied_head_is_packed_when_asked(tmp_path):
    write_dense(tmp_path / "src")
    report = convert(tmp_path / "src", tmp_path / "dst", format="latent", skip=())
    assert report.kept_dense == []
    assert report.layers[-1].name == "lm_head" or "lm_head" in [layer.name for layer in report.layers]
