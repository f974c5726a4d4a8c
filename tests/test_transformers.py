"""Packed folders through transformers: loading, saving, and what the loaded model can do."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import IDS, llama, logits, pack, packed_names, save
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, AutoModelForCausalLM

import bitinfer
from bitinfer import BinaryLinear, BitinferConfig, WeightLayout
from bitinfer.testing.problems import EVERYTHING, FBI, GROUPS, LAYOUTS, ONEBIT, ROW, TERNARY

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def mixed(name: str) -> WeightLayout:
    """A layout per kind of layer, and one layer that differs from its kind."""
    if name == "model.layers.1.mlp.up_proj":
        return EVERYTHING
    return {"q_proj": FBI, "k_proj": ONEBIT, "down_proj": GROUPS, "up_proj": TERNARY}.get(name.split(".")[-1], ROW)


def load(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def test_bitinfer_registered_itself():
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    assert AUTO_QUANTIZATION_CONFIG_MAPPING["bitinfer"] is BitinferConfig is bitinfer.BitinferConfig
    assert AUTO_QUANTIZER_MAPPING["bitinfer"].__name__ == "BitinferQuantizer"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_loads_what_was_in_memory(tmp_path, name, dtype):
    model = pack(llama(), LAYOUTS[name], dtype)
    loaded = load(save(model, tmp_path))
    assert packed_names(loaded) == packed_names(model)
    assert packed_names(loaded)[0] == "model.layers.0.self_attn.q_proj" and len(packed_names(loaded)) == 14
    assert type(loaded.lm_head) is torch.nn.Linear
    for key, tensor in model.state_dict().items():
        other = loaded.state_dict()[key]
        assert other.dtype == tensor.dtype and torch.equal(other, tensor), key
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.training
    assert not any(p.requires_grad for n in packed_names(loaded) for p in loaded.get_submodule(n).parameters())


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_heads_and_biases(tmp_path, tied, bias):
    model = pack(llama(tied, bias), ROW)
    loaded = load(save(model, tmp_path))
    layer = loaded.model.layers[0]
    assert (layer.self_attn.q_proj.bias is not None) is bias
    assert layer.mlp.up_proj.bias is None
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert torch.equal(logits(loaded), logits(model))


def test_a_layout_per_layer_and_layers_left_dense(tmp_path):
    model = pack(llama(), mixed)
    dense = torch.nn.Linear(96, 200, bias=False)
    model.model.layers[0].mlp.gate_proj = dense
    listed = ["lm_head", "model.layers.0.mlp.gate_proj"]
    model.config.quantization_config["modules_to_not_convert"] = listed
    loaded = load(save(model, tmp_path))
    assert [n for n, m in loaded.named_modules() if isinstance(m, torch.nn.Linear)] == sorted(listed, reverse=True)
    assert loaded.model.layers[1].mlp.up_proj.layout == EVERYTHING
    assert loaded.model.layers[0].mlp.up_proj.layout == TERNARY
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_casts_scales_and_leaves_words(tmp_path, dtype):
    model = pack(llama(), mixed)
    loaded = load(save(model, tmp_path), dtype=dtype)
    for name in packed_names(loaded):
        for part, parameter in loaded.get_submodule(name).named_parameters():
            assert parameter.dtype == (torch.uint32 if part == "weight" else dtype)
    expected = pack(llama(), mixed, dtype)
    assert torch.equal(logits(loaded), logits(expected))


def test_a_dtype_without_kernels_is_refused(tmp_path):
    folder = save(pack(llama(), ROW), tmp_path)
    with pytest.raises(ValueError, match="float32, float16 or bfloat16 for packed layers, got torch"):
        load(folder, dtype=torch.float64)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map(tmp_path, device_map):
    model = pack(llama(), FBI)
    loaded = load(save(model, tmp_path), device_map=device_map)
    if loaded.device.type == "cpu":
        assert torch.equal(logits(loaded), logits(model))
    else:  # "auto" takes a GPU where there is one
        torch.testing.assert_close(logits(loaded).cpu(), logits(model), rtol=1e-4, atol=1e-4)


def test_layers_on_disk(tmp_path):
    model = pack(llama(), FBI)
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    loaded = load(save(model, tmp_path / "a"), device_map=device_map, offload_folder=tmp_path / "offload")
    assert loaded.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(logits(loaded), logits(model))


def test_the_model_without_its_head(tmp_path):
    model = pack(llama(), mixed)
    folder = save(model, tmp_path / "a")
    body = AutoModel.from_pretrained(folder)
    assert body.layers[1].mlp.up_proj.layout == EVERYTHING
    with torch.no_grad():
        expected = model.model(IDS).last_hidden_state
        assert torch.equal(body(IDS).last_hidden_state, expected)
        again = AutoModel.from_pretrained(save(body, tmp_path / "b"))
        assert torch.equal(again(IDS).last_hidden_state, expected)


# activation formats


def test_stored_activation_format(tmp_path):
    model = pack(llama(), FBI, act_bits=4, act_block=256)
    loaded = load(save(model, tmp_path))
    layer = loaded.model.layers[0].mlp.down_proj
    assert (layer.act_bits, layer.act_block) == (4, 256)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (4, 256)),
        ({"act_bits": 8}, (8, 256)),
        ({"act_block": 0}, (4, 0)),
        ({"act_bits": None, "act_block": 0}, (None, 0)),
    ],
)
def test_activation_format_replaced_at_load(tmp_path, given, expected):
    folder = save(pack(llama(), FBI, act_bits=4, act_block=256), tmp_path / "a")
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        loaded = load(folder, quantization_config=BitinferConfig(**given))
    layer = loaded.model.layers[0].mlp.down_proj
    assert (layer.act_bits, layer.act_block) == expected
    assert layer.layout == FBI  # and nothing else is taken from it
    stored = json.loads((save(loaded, tmp_path / "b") / "config.json").read_text())["quantization_config"]
    assert (stored["act_bits"], stored["act_block"]) == expected


# saving


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"], ids=["one-file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saving_changes_no_byte(tmp_path, dtype, max_shard_size):
    fields = {"zeros": {"model.layers.0.mlp.up_proj": 3}, "source": {"pytorch_model.bin": "ab" * 32}}
    model = pack(llama(tied=True), mixed, dtype, **fields)
    first = contents(save(model, tmp_path / "a", max_shard_size=max_shard_size))
    assert ("model.safetensors" in first) is (max_shard_size == "5GB")
    second = contents(save(load(tmp_path / "a"), tmp_path / "b", max_shard_size=max_shard_size))
    third = contents(save(load(tmp_path / "b"), tmp_path / "c", max_shard_size=max_shard_size))
    assert second == third
    quantization = [json.loads(f["config.json"])["quantization_config"] for f in (first, second)]
    assert quantization[0] == quantization[1]
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert before.keys() == after.keys()
    for name, tensor in before.items():  # one by one: transformers sorts names once it has loaded a model
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


def test_empty_metadata_stays_as_it_was(tmp_path):
    """``zeros`` may be absent or empty."""
    for fields in ({}, {"zeros": {}, "source": {}}):
        model = pack(llama(), ROW, **fields)
        loaded = load(save(model, tmp_path / "a"))
        stored = json.loads((save(loaded, tmp_path / "b") / "config.json").read_text())["quantization_config"]
        assert stored == model.config.quantization_config


# what the model can do


def test_generation_and_the_static_cache(tmp_path):
    model = pack(llama(), FBI)
    loaded = load(save(model, tmp_path))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(IDS, **options)
    assert expected.shape == (2, 18)
    assert torch.equal(loaded.generate(IDS, **options), expected)
    assert torch.equal(loaded.generate(IDS, cache_implementation="static", **options), expected)


def test_compiles_in_one_graph(tmp_path):
    loaded = load(save(pack(llama(), mixed, act_bits=8), tmp_path))
    assert loaded.hf_quantizer.is_compileable and not loaded.hf_quantizer.is_trainable
    torch._dynamo.reset()
    compiled = torch.compile(loaded, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(loaded))


def test_a_copy_is_its_own(tmp_path):
    loaded = load(save(pack(llama(), FBI), tmp_path / "a"))
    expected = logits(loaded)
    other = copy.deepcopy(loaded)
    loaded.model.layers[0].mlp.up_proj.weight.view(torch.int32).fill_(-1)
    assert torch.equal(logits(other), expected) and not torch.equal(logits(loaded), expected)
    assert torch.equal(logits(load(save(other, tmp_path / "b"))), expected)


@pytest.mark.parametrize("name", ["fbi", "onebit", "everything"])
def test_dequantize(tmp_path, name):
    loaded = load(save(pack(llama(bias=True), LAYOUTS[name]), tmp_path / "a"))
    expected = logits(loaded)
    dense = loaded.dequantize()
    assert not packed_names(dense) and not hasattr(dense.config, "quantization_config")
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-4)
    if LAYOUTS[name].norm_eps is None:  # a layer with a norm has become two, which no transformers model has
        reloaded = load(save(dense, tmp_path / "b"))
        assert torch.equal(logits(reloaded), logits(dense))


def test_dequantize_in_another_dtype(tmp_path):
    loaded = load(save(pack(llama(), FBI), tmp_path))
    dense = loaded.dequantize(dtype="bfloat16")
    assert dense.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


# memory


class LargestTensor(TorchDispatchMode):
    """Records the most bytes of any tensor that an operation makes outside the meta device."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                self.nbytes = max(self.nbytes, leaf.nbytes)
        return out


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers reads tensors in threads, where a dispatch mode does not see them; this makes it read them here."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    yield


def test_no_dense_weight_is_ever_made(tmp_path, one_thread):
    dense = llama(hidden_size=256, intermediate_size=1024, vocab_size=32)
    embeddings, smallest_weight = 32 * 256 * 4, 128 * 256 * 2  # stored in float32; k_proj in bfloat16
    save(dense, tmp_path / "dense")
    save(pack(dense, FBI), tmp_path / "packed")
    with LargestTensor() as recorder:
        load(tmp_path / "packed", dtype=torch.bfloat16)
    assert embeddings <= recorder.nbytes < smallest_weight
    with LargestTensor() as recorder:  # the recorder does see a dense weight
        load(tmp_path / "dense", quantization_config=BitinferConfig(), dtype=torch.bfloat16)
    assert recorder.nbytes >= 256 * 1024 * 2


def test_packed_layers_are_replaced_on_the_meta_device(tmp_path):
    from bitinfer.integrations.transformers import BitinferQuantizer

    model = pack(llama(), FBI)
    config = BitinferConfig.from_dict(model.config.quantization_config)
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    BitinferQuantizer(config).preprocess_model(skeleton, checkpoint_files=None)
    assert packed_names(skeleton) == packed_names(model)
    assert all(p.is_meta for p in skeleton.parameters())
    assert all(isinstance(skeleton.get_submodule(n), BinaryLinear) for n in packed_names(model))
