"""bitinfer.load: packed folders open with their tokenizers, and everything else is told what it is."""

import json
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny_models
import torch
from packed_models import llama, logits, pack, save
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import bitinfer
from bitinfer import FormatError
from bitinfer.convert import convert
from bitinfer.testing.problems import FBI


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(pack(llama(), FBI, torch.bfloat16, act_bits=8), tmp_path / "packed")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every attempt to reach another machine an error."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"network access: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_model_without_a_tokenizer(folder, offline):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, tokenizer = bitinfer.load(folder)
    assert tokenizer is None and not model.training and model.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder)))
    assert torch.equal(logits(bitinfer.load(str(folder), device_map="cpu")[0]), logits(model))


def test_from_a_checkpoint_to_text(tmp_path, offline):
    convert(tiny_models.fbi(tmp_path / "source"), tmp_path / "packed")
    model, tokenizer = bitinfer.load(tmp_path / "packed")
    ids = tokenizer("The lamp is lit", return_tensors="pt")
    assert tokenizer.decode(ids.input_ids[0]).endswith("The lamp is lit")
    text = tokenizer.batch_decode(model.generate(**ids, max_new_tokens=5, do_sample=False, pad_token_id=1))
    assert "The lamp is lit" in text[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, "float16"], ids=str)
def test_dtype(folder, dtype):
    model, _ = bitinfer.load(folder, dtype=dtype)
    expected = torch.float16 if dtype == "float16" else dtype
    assert model.dtype == model.model.layers[0].mlp.up_proj.in_scale.dtype == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, (8, 0)), ({"act_bits": None}, (None, 0)), ({"act_bits": 4, "act_block": 256}, (4, 256))],
)
def test_activation_format(folder, given, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, _ = bitinfer.load(folder, **given)
    layer = model.model.layers[1].mlp.up_proj
    assert (layer.act_bits, layer.act_block) == expected
    with pytest.raises(ValueError, match="act_bits must be None or one of"):
        bitinfer.load(folder, act_bits=3)


def test_other_arguments_reach_transformers(folder):
    model, _ = bitinfer.load(folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    config = type(model.config).from_pretrained(folder)
    stored = json.dumps(config.to_dict(), default=str)
    model, _ = bitinfer.load(folder, config=config, act_bits=1)
    assert model.model.layers[0].mlp.up_proj.act_bits == 1
    assert json.dumps(config.to_dict(), default=str) == stored  # the caller's object is left alone


def hub_cache(folder: Path, cache: Path) -> Path:
    """Put a model folder into a cache as if it had come from the Hub as ``someone/model``."""
    root = cache / "models--someone--model"
    shutil.copytree(folder, root / "snapshots" / "0123abc")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0123abc")
    return cache


def test_a_model_of_the_hub(tmp_path, offline):
    packed = tmp_path / "packed"
    convert(tiny_models.fbi(tmp_path / "source"), packed)
    where = {"cache_dir": hub_cache(packed, tmp_path / "cache"), "local_files_only": True}
    model, tokenizer = bitinfer.load("someone/model", act_bits=4, **where)
    assert model.model.layers[0].mlp.up_proj.act_bits == 4
    assert tokenizer("The lamp").input_ids
    where["cache_dir"] = hub_cache(tmp_path / "source", tmp_path / "other")
    with pytest.raises(FormatError, match=r"someone/model: not packed by bitinfer.*hf download someone/model.*convert"):
        bitinfer.load("someone/model", **where)


# what is no packed folder


def test_an_fbi_folder_is_refused_where_transformers_builds_a_wrong_model(tmp_path):
    source = tiny_models.fbi(tmp_path / "source")
    wrong = AutoModelForCausalLM.from_pretrained(source)  # the reason for the check
    with pytest.raises(FormatError, match=r"unconverted fbi_llm.*wrong model.*wscale.*bitinfer convert .*source DST"):
        bitinfer.load(source)
    convert(source, tmp_path / "packed")
    right = bitinfer.load(tmp_path / "packed")[0]
    assert not torch.allclose(logits(wrong), logits(right), rtol=0.1, atol=0.1)


def test_an_onebit_folder(tmp_path):
    source = tiny_models.onebit(tmp_path / "source")
    with pytest.raises(FormatError, match=r"unconverted onebit.*run: bitinfer convert .*source DST"):
        bitinfer.load(source)


def test_a_dense_folder(tmp_path):
    source = tiny_models.dense(tmp_path / "source")
    with pytest.raises(FormatError, match=r"not a binary model.*run: bitinfer convert .*source DST"):
        bitinfer.load(source)


def test_a_folder_of_another_quantiser(folder):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    file.write_text(json.dumps(config))
    with pytest.raises(FormatError, match="quantised by 'gptq'"):
        bitinfer.load(folder)


def test_a_newer_folder(folder):
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"layout_version": 1', '"layout_version": 7'))
    with pytest.raises(FormatError, match=r"layout_version 7, written by a newer bitinfer.*pip install -U bitinfer"):
        bitinfer.load(folder)


@pytest.mark.parametrize("name", ["missing", "missing/deeper/still", "model.safetensors"])
def test_no_folder(folder, name, offline):
    with pytest.raises(FormatError, match=r"expected a model folder, got (a file|no such folder)"):
        bitinfer.load(folder / name)


def test_damage_is_named(folder):
    (folder / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        bitinfer.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FormatError, match=r"config\.json: this file is missing"):
        bitinfer.load(folder)


def test_a_damaged_tokenizer_is_an_error(folder):
    (folder / "tokenizer.json").write_text("{")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(FormatError, match="packed: the tokenizer does not load"):
        bitinfer.load(folder)


MEASURE = """
import resource, sys
import torch, bitinfer, transformers.models.llama.modeling_llama
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model, _ = bitinfer.load(sys.argv[1])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
elements = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, bitinfer.BinaryLinear))
print(peak * 1024, 4 * elements)
"""


@pytest.mark.slow
def test_resident_memory_stays_far_below_the_dense_model(tmp_path):
    """A layer of LLaMA 7B's size: 0.8 GB dense, 25 MB packed."""
    from transformers import LlamaConfig

    from bitinfer.packing import words_per_row

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32, vocab_size=32
    )
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    config.quantization_config = bitinfer.BitinferConfig(modules_to_not_convert=["lm_head"], format="test")
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        skeleton = type(llama())(config)
    tensors = {}
    for name, module in skeleton.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            shape = (module.out_features, words_per_row(module.in_features))
            tensors[f"{name}.weight"] = torch.zeros(shape, dtype=torch.uint32)
            tensors[f"{name}.weight_scale"] = torch.ones(module.out_features, 1, dtype=torch.bfloat16)
    for name, parameter in skeleton.named_parameters():
        tensors.setdefault(name, torch.ones(parameter.shape, dtype=torch.bfloat16))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=300)
    assert done.returncode == 0, done.stderr
    peak, dense = map(int, done.stdout.split())
    assert dense > 0.8e9 and peak < dense / 4
