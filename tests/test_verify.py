"""verify: lossless conversions pass, damage fails, approximations are reported, and the measures are what they say."""

import json
import math
import shutil

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from bitinfer import FormatError, convert
from bitinfer.verify import _compare, load_reference, verify


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Sources and packed folders, by name."""
    root = tmp_path_factory.mktemp("verify")
    made = {"fbi": tiny_models.fbi(root / "fbi"), "onebit": tiny_models.onebit(root / "onebit")}
    made["dense"] = tiny_models.dense(root / "dense")
    for name in ("fbi", "onebit"):
        made[f"{name}-packed"] = convert(made[name], root / f"{name}-packed").path
    made["half"] = convert(made["fbi"], root / "half", dtype=torch.float16).path
    made["latent"] = convert(made["dense"], root / "latent", format="latent", method="svd").path
    return made


@pytest.mark.parametrize("name", ["fbi", "onebit"])
def test_lossless_formats_pass(folders, name):
    result = verify(folders[name], folders[f"{name}-packed"], tokens=40)
    assert result.passed and result.lossless and result.tokens == 40
    assert result.relative_error <= 1e-5 and result.kl_mean < 1e-8 and result.top1_agreement == 1
    assert result.nll_packed == pytest.approx(result.nll_reference, abs=1e-4)
    assert result.nll_reference > 1
    assert json.loads(json.dumps(result.to_dict()))["passed"] is True


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_held_to_the_dense_model_in_it(folders, dtype):
    result = verify(folders["fbi"], folders["fbi-packed"], dtype=dtype, tokens=64)
    assert result.passed and 1e-4 < result.relative_error <= result.tolerance < 0.2


def test_rounded_scales_get_the_tolerance_of_their_dtype(folders):
    result = verify(folders["fbi"], folders["half"], tokens=64)
    assert result.passed and 1e-4 < result.relative_error < result.tolerance < 0.02


def flip_signs(folder, target, count):
    """Copy a packed folder with the signs of ``count`` columns of one layer flipped."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    words = tensors["model.layers.1.mlp.down_proj.weight"].view(torch.int32)
    words ^= (1 << count) - 1
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_one_flipped_column_fails(folders, tmp_path):
    damaged = flip_signs(folders["fbi-packed"], tmp_path / "damaged", 1)
    result = verify(folders["fbi"], damaged, tokens=40)
    assert result.passed is False and result.relative_error > 100 * result.tolerance


def test_damage_is_told_in_half_precision_too(folders, tmp_path):
    damaged = flip_signs(folders["fbi-packed"], tmp_path / "damaged", 16)
    assert verify(folders["fbi"], damaged, dtype=torch.float16, tokens=40).passed is False


def test_infinite_logits_fail(folders, tmp_path):
    target = shutil.copytree(folders["fbi-packed"], tmp_path / "huge")
    tensors = load_file(target / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    result = verify(folders["fbi"], target, tokens=8)
    assert result.passed is False and math.isnan(result.max_error)


def test_approximations_are_only_reported(folders):
    result = verify(folders["dense"], folders["latent"], tokens=40)
    assert not result.lossless and result.passed is None and result.tolerance is None
    assert result.relative_error > 0.1 and result.kl_mean > 0.01
    assert any("approximates" in note for note in result.notes)


def test_the_reference_of_an_approximation_is_the_dense_model(folders):
    from transformers import AutoModelForCausalLM

    from bitinfer.formats import FORMATS

    ids = torch.arange(20).unsqueeze(0)
    expected = AutoModelForCausalLM.from_pretrained(folders["dense"])(ids).logits
    assert torch.equal(load_reference(folders["dense"], FORMATS["latent"])(ids).logits, expected)


def test_quantised_activations_are_only_reported(folders):
    result = verify(folders["fbi"], folders["fbi-packed"], act_bits=8, tokens=40)
    assert result.passed is None and 1e-4 < result.relative_error < 0.5
    assert any("8 bits" in note for note in result.notes)


@pytest.mark.parametrize("name", ["fbi-packed", "onebit-packed", "latent", "half"])
def test_a_packed_folder_against_itself(folders, name):
    result = verify(folders[name], folders[name], tokens=40)
    assert result.format == "packed" and result.passed and result.tolerance == 1e-4


def test_texts_and_windows(folders):
    given = verify(folders["fbi"], folders["fbi-packed"], text="The wind comes from the west.", tokens=500)
    assert 3 < given.tokens < 30
    ids = list(range(5, 205))  # more than the model's context of 128: two windows
    assert verify(folders["fbi"], folders["fbi-packed"], text=ids, tokens=500).tokens == 200


def test_without_a_tokenizer_tokens_are_random(folders, tmp_path):
    source = tiny_models.fbi(tmp_path / "s", tokenizer=False)
    packed = convert(source, tmp_path / "p").path
    result = verify(source, packed, tokens=30)
    assert result.passed and result.tokens == 30 and any("random" in note for note in result.notes)
    with pytest.raises(ValueError, match="has a tokenizer"):
        verify(source, packed, text="words")


def test_another_vocabulary_is_told_and_leaves_torch_as_it_was(folders, tmp_path):
    other = tiny_models.fbi(tmp_path / "other", tokenizer=False)
    with pytest.raises(FormatError, match="tokens in its vocabulary"):
        verify(other, folders["fbi-packed"], text=[1, 2, 3])
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_wrong_folders_and_arguments(folders, tmp_path):
    with pytest.raises(FormatError, match="not a packed folder"):
        verify(folders["fbi"], folders["fbi"])
    with pytest.raises(FormatError, match="holds no layer of format"):
        verify(folders["dense"], folders["onebit-packed"])
    with pytest.raises(FormatError, match="no such folder"):
        verify(tmp_path / "none", folders["fbi-packed"])
    with pytest.raises(ValueError, match="at least 2"):
        verify(folders["fbi"], folders["fbi-packed"], tokens=1)
    with pytest.raises(ValueError, match="token ids must lie in 0 to"):
        verify(folders["fbi"], folders["fbi-packed"], text=[1, 100_000])


def test_measures_by_hand():
    wanted = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    got = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)]])
    measures = _compare(wanted, iter([(slice(0, 1), got[:1]), (slice(1, 2), got[1:])]), [0, 1])
    assert measures["max_error"] == pytest.approx(math.log(3))
    # P = (1/4, 3/4) against (1/2, 1/2), and the other way round
    first = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    second = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert measures["kl_mean"] == pytest.approx((first + second) / 2)
    assert measures["kl_max"] == pytest.approx(max(first, second))
    assert measures["top1_agreement"] == 0  # ties go to the first token
    # squares: log(3)^2 / 2 a row; spread about the mean: log(3)^2 / 4 in the first row, 0 in the second
    assert measures["relative_error"] == pytest.approx(2.0)
