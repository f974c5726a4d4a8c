"""Keys and values rounded to 8 and 4 bits: the rows, what verify tells of them, and who cannot have them."""

import os

import pytest
import torch
from packed_models import llama, pack

import bitinfer
from bitinfer import WeightLayout
from bitinfer.models.cache import SCALE_COLUMNS, cache_row_bytes, read_cache, round_cache
from bitinfer.verify import verify


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_come_back_to_half_a_step(bits: int, head_dim: int, dtype: torch.dtype) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(3, 2, 5, head_dim, generator=generator) * torch.rand(3, 2, 5, 1, generator=generator) * 20).to(
        dtype
    )
    x[0, 0, 0] = 0
    rows = round_cache(x, bits)
    assert rows.dtype == torch.uint8 and rows.shape == (3, 2, 5, cache_row_bytes(head_dim, bits))
    back = read_cache(rows, head_dim, torch.float32)
    step = x.float().unflatten(-1, (-1, SCALE_COLUMNS)).abs().amax(-1, keepdim=True) / ((1 << (bits - 1)) - 1)
    error = (back - x.float()).abs().unflatten(-1, (-1, SCALE_COLUMNS))
    # half a step, and what rounding the step itself to float16 moves the largest code by
    assert (error <= step * (0.5 + ((1 << (bits - 1)) - 1) * 2.0**-11) + 2.0**-24 * 128).all()
    assert (back[0, 0, 0] == 0).all()
    assert read_cache(rows, head_dim, dtype).dtype == dtype


@pytest.mark.parametrize("bits", [8, 4])
def test_each_column_has_its_own_place(bits: int) -> None:
    x = torch.zeros(128, 128)
    x.fill_diagonal_(3.5)
    assert torch.equal(read_cache(round_cache(x, bits), 128, torch.float32).round(decimals=1), x)


def test_numbers_that_are_steps_are_exact() -> None:
    x = torch.arange(-7, 8).repeat(9)[:128].float().reshape(1, 128) / 4
    assert torch.equal(read_cache(round_cache(x, 4), 128, torch.float32), x)


@pytest.mark.parametrize("head_dim", [16, 48, 160])
def test_heads_that_do_not_fit_say_so(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 32 up to 128, got {head_dim}"):
        round_cache(torch.zeros(2, head_dim), 8)


def test_who_cannot_have_one() -> None:
    model = pack(llama(), WeightLayout(tensors=("in_scale",)))
    with pytest.raises(ValueError, match="cache_bits must be None, 8 or 4, got 3"):
        bitinfer.fuse(model, cache_bits=3)
    with pytest.raises(ValueError, match="cache_bits=8 needs an NVIDIA GPU"):
        bitinfer.fuse(model, cache_bits=8)
    assert type(model).__name__ == "LlamaForCausalLM" and bitinfer.fuse(model) is model


def test_verify_tells_what_it_costs() -> None:
    folder = bitinfer.embedded_model()
    exact, eight, four = (verify(folder, folder, tokens=48, cache_bits=bits) for bits in (None, 8, 4))
    assert exact.passed and eight.passed is None and four.passed is None
    assert any("rounded to 8 bits" in note for note in eight.notes)
    assert exact.kl_mean < eight.kl_mean < 1e-3 and eight.kl_mean < four.kl_mean < 0.5
    with pytest.raises(ValueError, match="cache_bits"):
        verify(folder, folder, cache_bits=2)
