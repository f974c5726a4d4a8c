"""Large pages change where tensors are, and nothing else."""

import mmap

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import nn

from bitinfer import huge_pages

linux = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no MADV_HUGEPAGE")


def tensors() -> list[torch.Tensor]:
    words = torch.randint(-(1 << 31), 1 << 31, (700, 1001), dtype=torch.int32).view(torch.uint32)
    return [nn.Parameter(words, requires_grad=False), nn.Parameter(torch.randn(7, 3).bfloat16()), torch.randn(1 << 18)]


@linux
def test_tensors_move_and_stay_what_they_are():
    moved = tensors()
    before, places = [t.clone() for t in moved], [t.data_ptr() for t in moved]
    huge_pages.move(moved)
    assert moved[0].data_ptr() % huge_pages.PAGE == 0
    for tensor, old, place in zip(moved, before, places, strict=True):
        assert tensor.data_ptr() != place and tensor.data_ptr() % huge_pages.LINE == 0
        assert tensor.dtype == old.dtype and tensor.shape == old.shape and tensor.requires_grad == old.requires_grad
        assert torch.equal(tensor.view(torch.uint8), old.view(torch.uint8))
    places = [t.data_ptr() for t in moved]
    huge_pages.move(moved)
    assert [t.data_ptr() for t in moved] == places  # they are there
    del moved[0]  # the others keep the memory
    assert torch.equal(moved[1], before[2])


@linux
def test_a_model_that_was_moved_is_saved_and_cast(tmp_path):
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 9))
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    huge_pages.move(model.parameters())
    save_model(model, str(tmp_path / "model.safetensors"))
    assert all(torch.equal(t, expected[name]) for name, t in load_file(tmp_path / "model.safetensors").items())
    model.to(torch.bfloat16)
    assert torch.equal(model[0].weight, expected["0.weight"].bfloat16())


@pytest.mark.parametrize("shape", [(3, 5), (4, 1024, 300), (0, 7)], ids=str)
def test_zeros(shape):
    fresh = huge_pages.zeros(shape, torch.bfloat16)
    assert fresh.shape == shape and fresh.dtype == torch.bfloat16 and not fresh.any()
    fresh.fill_(1)
    assert fresh.sum() == fresh.numel()


def test_little_and_other_systems_stay(monkeypatch):
    little = [torch.randn(100), torch.randn(50)]
    places = [t.data_ptr() for t in little]
    huge_pages.move(little)
    assert [t.data_ptr() for t in little] == places
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    much = torch.randn(1 << 20)
    place = much.data_ptr()
    huge_pages.move([much])
    assert much.data_ptr() == place and not huge_pages.zeros((1 << 20,), torch.float32).any()
