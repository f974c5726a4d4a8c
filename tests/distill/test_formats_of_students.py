"""Students in the published layouts: our readers read them, and training goes on from them."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

import bitinfer
from bitinfer import FormatError
from bitinfer.checkpoint import Checkpoint
from bitinfer.distill import (
    build_student,
    fidelity,
    load_snapshot,
    load_student,
    load_teacher,
    packed_bytes,
    save_snapshot,
    save_student,
)
from bitinfer.distill.models import run_trunk
from bitinfer.distill.snapshot import decode_latent, encode_latent
from bitinfer.distill.students import latent_signs
from bitinfer.formats import detect
from bitinfer.verify import verify


def logits(student, ids):
    with torch.no_grad():
        return student.lm_head(run_trunk(student, ids)[-1])


@pytest.mark.parametrize(("method", "packed"), [("fbi", False), ("onebit", False), ("onebit", True)])
def test_our_readers_read_what_is_saved(method, packed, teacher, tokenizer, corpus, student_of, tmp_path):
    student = student_of(teacher, method)
    ids = corpus.rows("held_out", range(3))[0]
    save_student(student, tmp_path / "s", tokenizer, packed=packed)
    name = "fbi_llm" if method == "fbi" else "onebit"
    assert detect(Checkpoint(tmp_path / "s")).name == name
    report = bitinfer.convert(tmp_path / "s", tmp_path / "p")
    assert report.format == name and len(report.layers) == 14 and report.zeros == 0
    model, loaded_tokenizer = bitinfer.load(tmp_path / "p")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits(student, ids), rtol=1e-4, atol=1e-4)
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert verify(tmp_path / "s", tmp_path / "p", text=ids[0].tolist()).passed


def test_the_files_are_those_of_the_authors(teacher, student_of, tmp_path):
    save_student(student_of(teacher, "fbi"), tmp_path / "f")
    state = torch.load(tmp_path / "f" / "pytorch_model.bin", weights_only=True)
    layer = "model.layers.1.mlp.down_proj"
    assert {n: tuple(t.shape) for n, t in state.items() if n.startswith(layer)} == {
        f"{layer}.weight": (64, 128),
        f"{layer}.wscale": (1, 128),
        f"{layer}.wbias": (1, 128),
    }
    assert {t.dtype for t in state.values()} == {torch.float32}
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["rope_theta"] == 10000.0
    student = student_of(teacher, "onebit")
    save_student(student, tmp_path / "o", packed=True)
    state = torch.load(tmp_path / "o" / "pytorch_model.bin", weights_only=True)
    octets = state[f"{layer}.weight"]
    assert octets.dtype == torch.int8 and octets.shape == (64, 16)
    assert state[f"{layer}.weight_scale"].shape == (64,) and state[f"{layer}.input_factor"].shape == (128,)
    latent = dict(student.named_parameters())[f"{layer}.weight"]
    assert bool((octets[3, 5].item() >> 2) & 1) == bool(latent[3, 42] < 0)
    assert json.loads((tmp_path / "o" / "config.json").read_text())["model_type"] == "bitllama"
    with pytest.raises(ValueError, match="packed=True"):
        save_student(student_of(teacher, "fbi"), tmp_path / "g", packed=True)
    with pytest.raises(ValueError, match="0 kinds"):
        save_student(teacher, tmp_path / "g")


@pytest.mark.parametrize("method", ["fbi", "onebit"])
def test_students_come_back(method, teacher, student_of, tmp_path):
    student = student_of(teacher, method)
    save_student(student, tmp_path / "s")
    again = load_student(tmp_path / "s")
    for (name, wanted), got in zip(student.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(wanted, got), name
    assert all(p.requires_grad for p in again.parameters())


def test_what_is_no_student_is_refused(teacher_folder, teacher, student_of, tmp_path):
    with pytest.raises(FormatError, match="latent weights"):
        load_student(teacher_folder)
    save_student(student_of(teacher, "onebit"), tmp_path / "o", packed=True)
    with pytest.raises(FormatError, match="latent weights"):
        load_student(tmp_path / "o")
    with pytest.raises(FormatError, match="does not exist"):
        load_teacher(tmp_path / "nothing")


def test_shapes_and_starts(teacher):
    half = build_student(teacher, "fbi", {"num_hidden_layers": 1}, init="teacher")
    last = teacher.model.layers[1].mlp.up_proj.weight
    assert torch.equal(half.model.layers[0].mlp.up_proj.weight < 0, last < 0)
    assert torch.equal(half.model.embed_tokens.weight, teacher.model.embed_tokens.weight)
    wide = {"hidden_size": 96, "head_dim": 24}
    scratch = build_student(teacher, "onebit", wide, init="scratch", seed=1)
    assert scratch.model.layers[0].mlp.up_proj.input_factor.eq(1).all()
    twin = build_student(teacher, "onebit", wide, init="scratch", seed=1)
    assert torch.equal(twin.model.embed_tokens.weight, scratch.model.embed_tokens.weight)
    with pytest.raises(ValueError, match="start from scratch"):
        build_student(teacher, "fbi", wide, init="teacher")
    with pytest.raises(ValueError, match="reduce the vocabulary"):
        build_student(teacher, "fbi", {"vocab_size": 100})
    with pytest.raises(ValueError, match="unknown keys"):
        build_student(teacher, "fbi", {"layers": 100})
    with pytest.raises(ValueError, match="init"):
        build_student(teacher, "fbi", init="other")


def test_latent_weights_in_four_bits_keep_signs_and_order():
    torch.manual_seed(0)
    weight = torch.randn(6, 33) * torch.tensor([1e-3, 1, 1, 10, 1, 1]).unsqueeze(1)
    weight[0, 0], weight[2] = 0.0, 0.0
    codes, largest = encode_latent(weight)
    assert codes.dtype == torch.uint8 and codes.shape == (6, 17)
    back = decode_latent(codes, largest, 33)
    assert torch.equal(back < 0, weight < 0) and (back != 0).all()
    assert ((back.abs().sqrt() - weight.abs().sqrt()).abs() <= largest.sqrt() / 16 + 1e-6).all()


@pytest.mark.parametrize("method", ["fbi", "onebit"])
def test_snapshots_compute_the_same(method, teacher, corpus, student_of, tmp_path):
    student = student_of(teacher, method)
    files = save_snapshot(student, tmp_path / "s", max_bytes=30_000, about={"a": [1]})
    assert len(files) > 2 and all(f.stat().st_size < 45_000 for f in files)
    other = build_student(teacher, method, init="scratch", seed=5)
    assert load_snapshot(other, tmp_path / "s") == {"a": [1]}
    for a, b in zip(latent_signs(student), latent_signs(other), strict=True):
        assert torch.equal(a, b)
    # all but the rounding of embedding and head to bfloat16
    rounded = copy.deepcopy(student)
    rounded.model.embed_tokens.weight.data = rounded.model.embed_tokens.weight.data.bfloat16().float()
    ids = corpus.rows("held_out", range(2))[0]
    torch.testing.assert_close(logits(other, ids), logits(rounded, ids))
    with pytest.raises(FormatError, match="another"):
        load_snapshot(build_student(teacher, method, {"num_hidden_layers": 3}, init="scratch"), tmp_path / "s")
    files[0].unlink()
    with pytest.raises(FormatError, match="missing"):
        load_snapshot(other, tmp_path / "s")


def test_the_size_of_a_packed_student_is_known_beforehand(teacher, tokenizer, corpus, student_of, tmp_path):
    student = student_of(teacher)
    save_student(student, tmp_path / "s", tokenizer)
    bitinfer.convert(tmp_path / "s", tmp_path / "p", dtype="float16", embedding_bits=8)
    stored = load_file(tmp_path / "p" / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == torch.int8 and "lm_head.weight" not in stored
    assert sum(t.nbytes for t in stored.values()) == packed_bytes(student.config)
    model, loaded = bitinfer.load(tmp_path / "p", dtype=torch.float32)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids, scored = corpus.rows("held_out", range(8))
    assert fidelity(model, student, ids, scored).kl < 5e-3
