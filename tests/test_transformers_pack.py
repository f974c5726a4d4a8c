"""Packing a dense folder while transformers loads it."""

import json
import warnings

import pytest
import torch
from packed_models import IDS, llama, logits, packed_names, save
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from bitinfer import BinaryLinear, BitinferConfig, FormatError, WeightLayout, replace_linear
from bitinfer.convert import convert
from bitinfer.testing.problems import FBI

UP = "model.layers.1.mlp.up_proj"


def load(folder, config=None, **kwargs):
    if config is not None:  # an explicit None would make transformers forget the one in the folder
        kwargs["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@pytest.mark.parametrize("group_size", [0, 128])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_packs_as_replace_linear_does(tmp_path, tied, bias, group_size):
    dense = llama(tied, bias)
    layout = WeightLayout(group_size=group_size)
    loaded = load(save(dense, tmp_path / "a"), BitinferConfig(layout=layout))
    report = replace_linear(dense, group_size=group_size)
    assert packed_names(loaded) == report.replaced and len(report.replaced) == 14
    assert torch.equal(logits(loaded), logits(dense))
    assert not any(p.requires_grad for n in packed_names(loaded) for p in loaded.get_submodule(n).parameters())

    again = load(save(loaded, tmp_path / "b"))  # and is a packed model from then on
    assert torch.equal(logits(again), logits(dense))
    stored = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert stored["format"] == "latent" and stored["modules_to_not_convert"] == ["lm_head"]
    # rows of 96 columns are one group of at most 128
    assert len(stored["layouts"]) == (12 if group_size else 0)
    assert again.model.layers[0].mlp.down_proj.layout == layout


def test_same_bytes_as_convert(tmp_path):
    save(llama(), tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", format="latent", act_bits=8)
    save(load(tmp_path / "a", BitinferConfig(act_bits=8)), tmp_path / "c")
    b, c = (load_file(tmp_path / name / "model.safetensors") for name in "bc")
    assert b.keys() == c.keys() and all(torch.equal(b[k], c[k]) for k in b)
    b, c = (json.loads((tmp_path / n / "config.json").read_text())["quantization_config"] for n in "bc")
    assert {k: v for k, v in b.items() if k not in ("zeros", "source")} == c
    assert torch.equal(logits(load(tmp_path / "b")), logits(load(tmp_path / "c")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtype_and_device_map(tmp_path, dtype):
    dense = llama()
    folder = save(dense, tmp_path)
    loaded = load(folder, BitinferConfig(), dtype=dtype, device_map="auto")
    expected = BinaryLinear.from_linear(dense.get_submodule(UP).to(dtype))
    layer = loaded.get_submodule(UP)
    assert layer.weight.dtype == torch.uint32 and layer.weight_scale.dtype == dtype
    assert torch.equal(layer.weight.cpu(), expected.weight)
    assert torch.equal(layer.weight_scale.cpu(), expected.weight_scale)


@pytest.mark.parametrize("act_bits", [8, 1])
def test_quantised_activations(tmp_path, act_bits):
    dense = llama()
    loaded = load(save(dense, tmp_path), BitinferConfig(act_bits, 256))
    replace_linear(dense, act_bits=act_bits, act_block=256)
    assert torch.equal(logits(loaded), logits(dense))


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (["lm_head", "mlp"], ["lm_head", "mlp"]),
        (["*.1.*_proj"], ["layers.1"]),
        (["model.layers.0.self_attn.q_proj"], ["0.self_attn.q_proj"]),
        (["q_pro"], []),
        ([], []),
    ],
)
def test_layers_to_leave_dense(tmp_path, skip, left):
    loaded = load(save(llama(), tmp_path / "a"), BitinferConfig(modules_to_not_convert=skip))
    dense = [n for n, m in loaded.named_modules() if isinstance(m, nn.Linear)]
    named = [n for n, m in llama().named_modules() if isinstance(m, nn.Linear)]
    assert dense == [n for n in named if any(part in n for part in left)]
    assert loaded.config.quantization_config.modules_to_not_convert == dense
    assert torch.equal(logits(load(save(loaded, tmp_path / "b"))), logits(loaded))


def test_a_tied_head_stays_dense_even_when_nothing_is_skipped(tmp_path):
    loaded = load(save(llama(tied=True), tmp_path), BitinferConfig(modules_to_not_convert=[]))
    assert type(loaded.lm_head) is nn.Linear and loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_experts_stay_dense_and_are_mentioned_once(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=80, num_local_experts=4, num_experts_per_tok=2)
    dense = MixtralForCausalLM(config).eval()
    folder = save(dense, tmp_path / "a")
    with pytest.warns(UserWarning, match=r"4 expert tensors \(\d\d% of the parameters.*stay dense") as caught:
        loaded = load(folder, BitinferConfig())
    assert len([w for w in caught if "expert" in str(w.message)]) == 1
    assert packed_names(loaded) == [n for n, m in dense.named_modules() if isinstance(m, nn.Linear) and "attn" in n]
    replace_linear(dense)
    assert torch.equal(logits(loaded), logits(dense))
    again = load(save(loaded, tmp_path / "b"))
    assert torch.equal(logits(again), logits(dense))
    assert torch.equal(again.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0).cpu()[:, :10], IDS)


def edit(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def one_zero(weight):
    weight[3, 4] = 0.0
    return weight


def test_a_zero_is_counted_and_written_down(tmp_path):
    edit(save(llama(), tmp_path / "a"), f"{UP}.weight", one_zero)
    with pytest.warns(UserWarning, match=f"1 weights are exactly 0.*most in {UP}: 1"):
        loaded = load(tmp_path / "a", BitinferConfig())
    stored = json.loads((save(loaded, tmp_path / "b") / "config.json").read_text())["quantization_config"]
    assert stored["zeros"] == {UP: 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w * (w.abs() > 0.1), "exact zeros among 19200 weights"),
        (lambda w: w / 0, "NaN or infinite"),
        (lambda w: w[:, :64].contiguous(), r"shape \(200, 64\), but the model needs \(200, 96\)"),
    ],
    ids=["pruned", "infinite", "shape"],
)
def test_a_weight_that_cannot_be_packed(tmp_path, change, match):
    edit(save(llama(), tmp_path), f"{UP}.weight", change)
    with pytest.raises(FormatError, match=f"{UP}.weight.*{match}"):
        load(tmp_path, BitinferConfig())


def test_a_missing_dense_weight(tmp_path):
    save(llama(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"{UP}.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=f"{UP}.weight is in none of the weight files"):
        load(tmp_path, BitinferConfig())


@pytest.mark.parametrize("fields", [{"layout": FBI}, {"layouts": {UP: WeightLayout(group_size=64)}}])
def test_layouts_that_cannot_be_made_while_loading(tmp_path, fields):
    folder = save(llama(), tmp_path)
    with pytest.raises(ValueError, match=r"cannot be made while loading.*bitinfer convert"):
        load(folder, BitinferConfig(**fields))


def test_memory_is_planned_by_bits(tmp_path):
    from bitinfer.integrations.transformers import BitinferQuantizer

    with torch.device("meta"):
        skeleton = llama().to("meta")
    quantizer = BitinferQuantizer(BitinferConfig(), pre_quantized=False)
    quantizer.preprocess_model(skeleton)
    weight = skeleton.get_submodule(UP).weight
    assert weight.shape == (200, 96)  # until the packed words take its place
    assert quantizer.param_element_size(skeleton, f"{UP}.weight", weight) == 1 / 8
    norm = skeleton.model.norm.weight
    assert quantizer.param_element_size(skeleton, "model.norm.weight", norm) == 4
