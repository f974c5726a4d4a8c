"""The bit layout, held to words written by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitinfer import ops
from bitinfer.packing import pack_bits, pack_signs, unpack_bits, unpack_signs, words_per_row


def signs(negative: set[int], length: int) -> torch.Tensor:
    return torch.tensor([-1.0 if i in negative else 1.0 for i in range(length)])


# columns that are -1, row length, the words
GOLDEN = [
    (set(), 32, [0x00000000]),
    ({0}, 32, [0x00000001]),
    ({31}, 32, [0x80000000]),
    ({0, 1, 2, 3}, 32, [0x0000000F]),
    ({4, 8, 15, 16, 23}, 32, [0x00818110]),
    (set(range(32)), 32, [0xFFFFFFFF]),
    ({32}, 64, [0x00000000, 0x00000001]),
    ({7, 40, 63}, 64, [0x00000080, 0x80000100]),
    (set(range(33)), 33, [0xFFFFFFFF, 0x00000001]),
    ({0}, 1, [0x00000001]),
    ({30}, 31, [0x40000000]),
    (set(range(0, 70, 2)), 70, [0x55555555, 0x55555555, 0x00000015]),
]


@pytest.mark.parametrize(("negative", "length", "words"), GOLDEN)
@pytest.mark.parametrize("pack", [pack_signs, ops.pack_signs], ids=["python", "op"])
def test_golden_words(pack, negative, length, words):
    packed = pack(signs(negative, length).unsqueeze(0))
    assert packed.dtype == torch.uint32
    assert packed.tolist() == [words]
    assert torch.equal(unpack_signs(packed, length), signs(negative, length).unsqueeze(0))


def test_zero_and_nan_pack_as_plus_one():
    assert pack_signs(torch.tensor([[0.0, -0.0, float("nan"), -1e-45, -float("inf")]])).tolist() == [[0b11000]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 33), (2, 5, 64), (0, 40), (4, 1), (70,)])
def test_round_trip(shape, dtype):
    values = torch.randn(shape).to(dtype)
    packed = ops.pack_signs(values)
    assert packed.shape == (*shape[:-1], words_per_row(shape[-1]))
    assert torch.equal(unpack_signs(packed, shape[-1], dtype), torch.where(values < 0, -1.0, 1.0).to(dtype))


def test_op_takes_any_strides():
    values = torch.randn(40, 6)
    assert torch.equal(ops.pack_signs(values.t()).view(torch.int32), pack_signs(values.t()).view(torch.int32))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_bits_round_trip(bits):
    tensor = torch.tensor(bits)
    words = pack_bits(tensor)
    assert unpack_bits(words, len(bits)).bool().tolist() == bits
    # the words as the layout defines them: bit j of word w
    expected = [
        sum(1 << j for j in range(32) if 32 * w + j < len(bits) and bits[32 * w + j]) for w in range(len(words))
    ]
    assert words.tolist() == expected


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match="pack_signs: weight must be float32"):
        ops.pack_signs(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one dimension"):
        ops.pack_signs(torch.tensor(1.0))
