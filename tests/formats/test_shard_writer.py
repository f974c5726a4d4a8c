"""ShardWriter: what it writes is what safetensors reads, aligned, in bounded files."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from bitinfer.shard_writer import ShardWriter
from bitinfer.weight_files import SAFETENSORS_DTYPES


def write(folder, values, **options):
    with ShardWriter(folder, **options) as writer:
        for name, tensor in values.items():
            writer.add(name, tensor)
        writer.finish()
    return writer


def read(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


DTYPES = [torch.uint32, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.float64]


def make(shape, dtype, seed):
    values = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int64)
    return values.to(torch.int32).view(torch.uint32) if dtype == torch.uint32 else values.to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    specs=st.lists(
        st.tuples(st.lists(st.integers(0, 9), max_size=3), st.sampled_from(DTYPES)),
        min_size=1,
        max_size=12,
    ),
    max_bytes=st.sampled_from([1, 200, 10**9]),
)
def test_safetensors_reads_what_was_written(tmp_path_factory, specs, max_bytes):
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i}": make(shape, dtype, i) for i, (shape, dtype) in enumerate(specs)}
    writer = write(folder, tensors, max_bytes=max_bytes)
    loaded = read(folder)
    assert loaded.keys() == tensors.keys() == writer.weight_map.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert writer.total == sum(t.nbytes for t in tensors.values())


def test_every_tensor_is_aligned(tmp_path):
    """A reader maps tensors where they lie: an odd number of halves must not push the words after it off."""
    tensors = {f"{i}.{d}": make((3, 5), d, i) for i in range(3) for d in DTYPES}
    write(tmp_path, tensors)
    raw = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert length % 8 == 0
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            start, _ = entry["data_offsets"]
            assert start % SAFETENSORS_DTYPES[entry["dtype"]].itemsize == 0, name
    assert all(torch.equal(t.view(torch.uint8), tensors[n].view(torch.uint8)) for n, t in read(tmp_path).items())


def test_shards_and_index(tmp_path):
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(10)}
    writer = write(tmp_path, tensors, max_bytes=1300)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 4000}, "weight_map": writer.weight_map}
    assert sorted(f.name for f in tmp_path.glob("*.safetensors")) == [
        f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)
    ]
    for name, file in writer.weight_map.items():
        with safe_open(tmp_path / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert torch.equal(opened.get_tensor(name), tensors[name])


def test_a_full_header_starts_a_shard(tmp_path):
    tensors = {"x" * 100 + str(i): torch.zeros(2) for i in range(100)}
    write(tmp_path, tensors, tensors=1)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert read(tmp_path).keys() == tensors.keys()


def test_casts_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("bitinfer.shard_writer.CHUNK_BYTES", 100)
    tensor = torch.randn(33, 7, generator=torch.Generator().manual_seed(0))
    with ShardWriter(tmp_path) as writer:
        writer.add("x", tensor, torch.bfloat16)
        writer.add("strided", tensor.T)
        writer.add("even", tensor[:32].T, torch.float16)
        writer.finish()
    loaded = read(tmp_path)
    assert torch.equal(loaded["x"], tensor.bfloat16())
    assert torch.equal(loaded["strided"], tensor.T)
    assert torch.equal(loaded["even"], tensor[:32].T.half())


def test_nothing_loads_before_the_end(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path, max_bytes=10) as writer:
        writer.add("a", torch.zeros(10))
        writer.add("b", torch.zeros(10))
        raise RuntimeError("stop")
    assert {f.suffix for f in tmp_path.iterdir()} == {".partial"}
