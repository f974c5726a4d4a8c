"""Embeddings and heads in 8 bits: rounding, and folders that hold them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import bitinfer
from bitinfer.int8_rows import ROW_SCALE, restore_rows, round_rows
from bitinfer.verify import verify

MATRICES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folders(request, tmp_path):
    config = LlamaConfig(
        vocab_size=301,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=request.param,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "src")
    bitinfer.convert(tmp_path / "src", tmp_path / "dst", format="latent", embedding_bits=8)
    return tmp_path / "src", tmp_path / "dst"


def test_rounding_is_to_the_nearest_of_255():
    matrix = torch.randn(50, 70) * torch.logspace(-4, 2, 50).unsqueeze(1)
    matrix[7] = 0
    codes, scale = round_rows(matrix)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (50, 1)
    assert codes.abs().amax(1)[torch.arange(50) != 7].eq(127).all()
    restored = restore_rows(codes, scale)
    assert ((restored - matrix).abs() <= matrix.abs().amax(1, keepdim=True) * 0.501 / 127).all()
    assert torch.equal(restored[7], torch.zeros(70))


def test_what_is_stored_and_what_is_loaded(folders):
    src, dst = folders
    before, stored = load_file(src / "model.safetensors"), load_file(dst / "model.safetensors")
    names = [name for name in MATRICES if name in before]
    config = json.loads((dst / "config.json").read_text())
    assert sorted(config["quantization_config"]["int8_rows"]) == sorted(n.removesuffix(".weight") for n in names)
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = bitinfer.load(dst, dtype=dtype)
        for name in names:
            codes, scale = round_rows(before[name])
            assert torch.equal(stored[name], codes) and torch.equal(stored[name + ROW_SCALE], scale)
            assert torch.equal(model.get_parameter(name), restore_rows(codes, scale).to(dtype))
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (len(names) == 1)


def test_saved_again_it_is_the_same(folders, tmp_path):
    model, _ = bitinfer.load(folders[1])
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(f / "model.safetensors") for f in (folders[1], tmp_path / "again"))
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        assert torch.equal(*(t[name].view(torch.uint8) for t in (first, second))), name


def test_verify_tells_what_it_costs(folders):
    src, dst = folders
    report = verify(src, dst)
    assert report.passed is None and report.kl_mean > 0
    assert any("rounded to 8 bits" in note for note in report.notes)
    assert verify(dst, dst).relative_error < 1e-5  # the kernels compute what is stored


def test_a_missing_scale_is_an_error(folders):
    tensors = load_file(folders[1] / "model.safetensors")
    del tensors[MATRICES[0] + ROW_SCALE]
    save_file(tensors, folders[1] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"conversion|row_scale is missing"):
        bitinfer.load(folders[1])


@pytest.mark.parametrize(
    ("bits", "change", "error", "message"),
    [
        (4, {}, ValueError, "embedding_bits must be None or 8, got 4"),
        (8, {"vocab_size": 300}, bitinfer.FormatError, "300"),
    ],
)
def test_what_cannot_be_rounded(folders, tmp_path, bits, change, error, message):
    file = folders[0] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(error, match=message):
        bitinfer.convert(folders[0], tmp_path / "new", format="latent", embedding_bits=bits)
    assert not (tmp_path / "new").exists()
