"""Checkpoint: which files are found, and that tensors come from them one by one."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from bitinfer.checkpoint import Checkpoint
from bitinfer.errors import FormatError
from bitinfer.testing.checkpoints import Kind, write_fbi_llm, write_weights

TENSORS = {f"layers.{i}.weight": torch.full((4, 3), float(i)) for i in range(6)}
KINDS: list[Kind] = ["bin", "legacy_bin", "safetensors"]


def make(folder, config=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return folder


def assert_holds(checkpoint, tensors):
    assert set(checkpoint) == set(checkpoint.keys()) == set(tensors)
    assert len(checkpoint) == len(tensors)
    for name, tensor in tensors.items():
        assert name in checkpoint
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
        assert checkpoint.nbytes(name) == tensor.nbytes
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert torch.equal(checkpoint[name], tensor)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [1, 3])
def test_published_layouts(tmp_path, kind, shards):
    write_weights(make(tmp_path), TENSORS, shards, kind)
    checkpoint = Checkpoint(tmp_path)
    assert_holds(checkpoint, TENSORS)
    assert len(checkpoint.shards) == shards
    assert checkpoint.config == {"model_type": "llama"}
    # names come grouped by file, so that a pass over them opens each once
    files = [checkpoint.shard_of(name) for name in checkpoint]
    assert files == sorted(files)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool],
)
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(tmp_path, dtype, kind):
    tensors = {"x": torch.tensor([[0, 1], [1, 0]]).to(dtype), "scalar": torch.tensor(1).to(dtype)}
    write_weights(make(tmp_path), tensors, kind=kind)
    assert_holds(Checkpoint(tmp_path), tensors)


def test_other_single_names(tmp_path):
    save_file(TENSORS, make(tmp_path) / "weights.safetensors")
    torch.save({"lr": 1}, tmp_path / "training_args.bin")
    assert_holds(Checkpoint(tmp_path), TENSORS)


def test_other_index_names(tmp_path):
    write_weights(make(tmp_path), TENSORS, 2)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "language.safetensors.index.json")
    assert_holds(Checkpoint(tmp_path), TENSORS)


@pytest.mark.parametrize("kind", KINDS)
def test_complete_shards_need_no_index(tmp_path, kind):
    write_weights(make(tmp_path), TENSORS, 3, kind)
    next(tmp_path.glob("*.index.json")).unlink()
    assert_holds(Checkpoint(tmp_path), TENSORS)
    shard = next(tmp_path.glob("*-00002-of-00003.*"))
    shard.unlink()
    with pytest.raises(FormatError, match=rf"{shard.name}: this shard is missing; download it"):
        Checkpoint(tmp_path)


def test_safetensors_come_before_bin(tmp_path):
    write_weights(make(tmp_path), {"x": torch.zeros(2)}, kind="bin")
    write_weights(tmp_path, TENSORS)
    assert_holds(Checkpoint(tmp_path), TENSORS)


def test_several_sets_are_ambiguous(tmp_path):
    save_file(TENSORS, make(tmp_path) / "a.safetensors")
    save_file(TENSORS, tmp_path / "b.safetensors")
    with pytest.raises(FormatError, match=r"several sets of weights.*a\.safetensors, b\.safetensors; leave one"):
        Checkpoint(tmp_path)


def test_links_of_the_hub_cache(tmp_path):
    """A snapshot of the Hub's cache is a folder of links to ../../blobs."""
    write_weights(make(tmp_path / "real"), TENSORS, 2)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((tmp_path / "real").iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(os.path.join("..", "..", "blobs", str(number)))
    assert_holds(Checkpoint(snapshot), TENSORS)


def test_nested_state_dicts(tmp_path):
    torch.save({"state_dict": TENSORS, "epoch": 3}, make(tmp_path) / "pytorch_model.bin")
    assert_holds(Checkpoint(tmp_path), TENSORS)


def test_lightning_prefix_is_taken_off(tmp_path):
    inner = {"model.embed.weight": torch.ones(2, 2), "lm_head.weight": torch.zeros(2, 2)}
    outer = {f"model.{name}": tensor for name, tensor in inner.items()}
    torch.save({"state_dict": outer}, make(tmp_path) / "pytorch_model.bin")
    assert_holds(Checkpoint(tmp_path), inner)


def test_a_plain_state_dict_keeps_its_prefix(tmp_path):
    plain = {"model.embed.weight": torch.ones(2, 2)}
    torch.save({"state_dict": plain}, make(tmp_path) / "pytorch_model.bin")
    assert_holds(Checkpoint(tmp_path), plain)


def test_strided_and_shared_tensors(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    torch.save({"a": base, "b": base.T, "c": base[1:]}, make(tmp_path) / "pytorch_model.bin")
    assert_holds(Checkpoint(tmp_path), {"a": base, "b": base.T, "c": base[1:]})


def test_parameters_lose_their_gradient(tmp_path):
    torch.save({"a": torch.nn.Parameter(torch.ones(2))}, make(tmp_path) / "pytorch_model.bin")
    tensor = Checkpoint(tmp_path).tensor("a")
    assert not tensor.requires_grad


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="sees what is mapped in Linux's /proc alone")
def test_one_file_is_open_at_a_time(tmp_path):
    write_weights(make(tmp_path), TENSORS, 3, "bin")
    checkpoint = Checkpoint(tmp_path)

    def mapped():
        with open("/proc/self/maps") as file:
            return {line.split("/")[-1].strip() for line in file if str(tmp_path) in line}

    assert mapped() == set()
    kept = {}
    for name in checkpoint:
        tensor = checkpoint.tensor(name)
        assert mapped() == {checkpoint.shard_of(name).name}
        kept[name] = tensor.clone()
        del tensor
    checkpoint.close()
    assert mapped() == set()
    assert_holds(checkpoint, kept)


def test_auxiliary_files(tmp_path):
    write_fbi_llm(tmp_path / "src", shards=2)
    for name in ("README.md", "LICENSE", "trainer_state.json", "optimizer.pt", "vocab.txt", "tokenizer.model"):
        (tmp_path / "src" / name).write_text("{}")
    (tmp_path / "src" / "runs").mkdir()
    names = {file.name for file in Checkpoint(tmp_path / "src").aux_files()}
    assert names == {
        "LICENSE",
        "README.md",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.txt",
    }


def test_no_such_tensor(tmp_path):
    write_weights(make(tmp_path), TENSORS)
    with pytest.raises(FormatError, match=r"there is no tensor layers\.9\.weight"):
        Checkpoint(tmp_path).tensor("layers.9.weight")
    with pytest.raises(KeyError):
        Checkpoint(tmp_path)["layers.9.weight"]


def test_tensors_that_the_index_does_not_name_are_read_too(tmp_path):
    write_weights(make(tmp_path), TENSORS, 2)
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    del values["weight_map"]["layers.0.weight"]
    index.write_text(json.dumps(values))
    assert_holds(Checkpoint(tmp_path), TENSORS)
