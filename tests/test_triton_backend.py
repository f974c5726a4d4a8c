"""The Triton kernels: float results against the float64 oracle, integer ones bit for bit against the reference.

On a GPU every problem runs in every dtype. Under TRITON_INTERPRET=1 the kernels run on the CPU, one dtype a problem;
test_triton_interpreter.py starts this file so.
"""

import pytest
import torch
from cuda_problems import assert_packed, assert_product, on, pack_arguments, popcount_arguments, words
from torch import Tensor
from triton_problems import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    REFERENCE,
    TRIMMED,
    TRITON,
    VARIANTS,
    dtypes,
    forced,
    require_kernels,
)

from bitinfer.packing import pack_signs as python_pack_signs
from bitinfer.testing.oracle import exact_linear, fp_error_bound
from bitinfer.testing.problems import EVERYTHING, FBI, LAYOUTS, PLAIN, ROW, GemmProblem
from bitinfer.weight import FLOAT_DTYPES, BinaryWeight

require_kernels()

ACTIVATIONS = [(bits, block) for bits in (8, 4, 2, 1) for block in (0, 256)]
INDEXED = [pytest.param(i, problem, id=problem.name) for i, problem in enumerate(TRIMMED)]
# those that the interpreter tries on every problem; "chosen" has a test of its own
KERNELS = [v for v in VARIANTS if v != "chosen" or not INTERPRETED]
FLOAT_CASES = [
    pytest.param(i, problem, variant, id=f"{problem.name}-{variant}")
    for i, problem in enumerate(TRIMMED)
    for variant in KERNELS
    if problem.m <= 8 or not variant.startswith("decode")  # which has a loop over tokens for integers alone
]


def sign_gemm(x: Tensor, w: BinaryWeight) -> Tensor:
    rest = (w.scale, w.in_scale, w.in_shift, w.group_shift, w.bias, w.group_size, w.norm_eps)
    return TRITON.sign_gemm(x, w.signs, w.in_features, *rest)


def assert_contract(y: Tensor, x: Tensor, weight: BinaryWeight) -> None:
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], weight.out_features)
    error = (y.double() - exact_linear(x, weight)).abs()
    assert error.numel() == 0 or error.max().item() <= fp_error_bound(x, weight)


# ------------------------------------------------------------------------------------------------ numerical contract
@pytest.mark.parametrize(("index", "problem", "variant"), FLOAT_CASES)
def test_contract_of_floating_point_activations(index: int, problem: GemmProblem, variant: str) -> None:
    for dtype in dtypes(index):
        x, weight = problem.make(dtype, device=DEVICE)
        with forced(variant):
            assert_contract(sign_gemm(x, weight), x, weight)


@pytest.mark.parametrize(("bits", "block"), ACTIVATIONS)
@pytest.mark.parametrize(("index", "problem"), INDEXED)
def test_exact_packing_of_activations(index: int, problem: GemmProblem, bits: int, block: int) -> None:
    for dtype in dtypes(index + bits):
        arguments = pack_arguments(*problem.make(dtype), bits, block)
        actual = TRITON.pack_activations(*on(DEVICE, arguments))
        assert_packed(actual, REFERENCE.pack_activations(*arguments), arguments)


@pytest.mark.parametrize("variant", KERNELS)
@pytest.mark.parametrize(("index", "problem"), INDEXED)
def test_exact_integer_products(index: int, problem: GemmProblem, variant: str) -> None:
    # in the interpreter one format of the activations for each problem and variant, all of them in all
    turn = index + KERNELS.index(variant)
    for bits, block in ACTIVATIONS[turn % 8 :][:1] if INTERPRETED else ACTIVATIONS:
        for dtype in dtypes(index):
            x, weight = problem.make(dtype)
            packed = REFERENCE.pack_activations(*pack_arguments(x, weight, bits, block))
            arguments = popcount_arguments(packed, weight, block, dtype)
            with forced(variant):
                y = TRITON.popcount_gemm(*on(DEVICE, arguments))
            assert_product(y, REFERENCE.popcount_gemm(*arguments), weight)


@pytest.mark.parametrize("bits", [None, 8, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_table_chooses(layout: str, bits: int | None) -> None:
    for m in (2, 17):
        x, weight = GemmProblem("", m, 33, 300, LAYOUTS[layout], bias=True).make(torch.float16)
        if bits is None:
            x, weight = x.to(DEVICE), weight.to(DEVICE)
            assert_contract(sign_gemm(x, weight), x, weight)
            continue
        packed = REFERENCE.pack_activations(*pack_arguments(x, weight, bits, 0))
        arguments = popcount_arguments(packed, weight, 0, torch.float16)
        assert_product(TRITON.popcount_gemm(*on(DEVICE, arguments)), REFERENCE.popcount_gemm(*arguments), weight)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 31, 32, 33, 513, 2049])
def test_pack_signs(dtype: torch.dtype, k: int) -> None:
    weight = torch.randn(15, k).to(dtype)
    weight[0, 0], weight[1, 0], weight[2, 0], weight[3, 0] = 0.0, -0.0, float("nan"), -float("inf")
    expected = words(python_pack_signs(weight))
    ours = weight.to(DEVICE)
    assert torch.equal(words(TRITON.pack_signs(ours)).cpu(), expected)
    assert torch.equal(words(TRITON.pack_signs(ours.t().contiguous().t())).cpu(), expected)
    wider = torch.cat([ours[:, :1], ours], -1)[:, 1:]  # rows that begin anywhere
    assert torch.equal(words(TRITON.pack_signs(wider)).cpu(), expected)
    assert torch.equal(words(TRITON.pack_signs(ours.view(3, 5, k))).cpu(), expected.view(3, 5, -1))


# a hand-written golden word holds the layout, as in test_packing.py: column j is bit j, a set bit is -1
def test_the_layout_of_bits() -> None:
    weight = torch.ones(1, 33, device=DEVICE)
    weight[0, [0, 5, 31, 32]] = -1.0
    assert words(TRITON.pack_signs(weight)).tolist() == [[0x80000021 - (1 << 32), 1]]
    planes, _, total, _ = TRITON.pack_activations(
        torch.tensor([[127.0, -128 * 127 / 128, 3.0]]).to(DEVICE), None, None, 8, 0, 0
    )
    assert words(planes).tolist() == [[[0b111], [0b101], [0b001], [0b001], [0b001], [0b001], [0b001], [0b010]]]
    assert total.tolist() == [[3]]


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_tokens_that_are_not_finite_show_and_stay_apart(bad: float) -> None:
    x, weight = GemmProblem("", 3, 17, 600, ROW).make()
    clean = sign_gemm(x.to(DEVICE), weight.to(DEVICE))
    x[1, 599] = bad
    y = sign_gemm(x.to(DEVICE), weight.to(DEVICE))
    assert not y[1].isfinite().any() and torch.equal(y[::2], clean[::2])
    for bits, block in ACTIVATIONS:
        arguments = (x, None, None, bits, block, 0)
        assert_packed(
            TRITON.pack_activations(*on(DEVICE, arguments)), REFERENCE.pack_activations(*arguments), arguments
        )


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_extreme_activations(bits: int) -> None:
    x = torch.tensor([[3e38, -1e38, 1e30, 0.0], [1e-30, -1e-30, 2e-38, 0.0], [1e-42, -1e-45, 0.0, 0.0], [0.0] * 4])
    arguments = (x, None, None, bits, 0, 0)
    assert_packed(TRITON.pack_activations(*on(DEVICE, arguments)), REFERENCE.pack_activations(*arguments), arguments)


# ------------------------------------------------------------------------------------------------ shapes and strides
@pytest.mark.parametrize("variant", ["decode", "tiled"])
@pytest.mark.parametrize("layout", ["row", "fbi"])
def test_any_strides_and_alignment(layout: str, variant: str) -> None:
    m, n, k = 5, 12, 256
    for dtype in (torch.float16, torch.float32):
        x, weight = GemmProblem("", m, n, k, LAYOUTS[layout], bias=True).make(dtype, device=DEVICE)
        for view in (
            torch.cat([x[:, :1], x], -1)[:, 1:],
            torch.empty(x.numel() + 1, dtype=dtype, device=DEVICE)[1:].view_as(x).copy_(x),
            torch.stack([x, -x], -1)[..., 0],
            torch.nn.functional.pad(x, (0, 8))[:, :k],
            x.t().contiguous().t(),
            x.view(m, 1, 1, k).expand(m, 2, 1, k).transpose(0, 1),
        ):
            with forced(variant):
                assert_contract(sign_gemm(view, weight), view, weight)
        arguments = pack_arguments(x.t().contiguous().t().view(m, 1, k).expand(m, 2, k), weight, 8, 0)
        assert_packed(TRITON.pack_activations(*arguments), REFERENCE.pack_activations(*arguments), arguments)
        with forced(variant):
            assert_contract(sign_gemm(x[0], weight), x[0], weight)


@pytest.mark.parametrize("variant", ["decode", "tiled"])
def test_weights_of_any_strides_and_scales_of_any_dtype(variant: str) -> None:
    x, w = GemmProblem("", 4, 20, 200, EVERYTHING, bias=True).make(device=DEVICE)
    assert w.scale is not None and w.in_scale is not None and w.bias is not None
    spread = torch.empty(2, 20, 2 * w.signs.shape[-1], dtype=torch.int32, device=DEVICE).view(torch.uint32)[..., ::2]
    spread.copy_(w.signs)
    shuffled = w.scale.transpose(1, 2).contiguous().transpose(1, 2)
    rest = (w.in_scale.half(), w.in_shift, w.group_shift, w.bias.bfloat16(), w.group_size, w.norm_eps)
    moved = BinaryWeight(spread, 200, shuffled, *rest)
    for dtype in DTYPES:
        with forced(variant):
            assert_contract(sign_gemm(x.to(dtype), moved), x.to(dtype), moved)
    packed = REFERENCE.pack_activations(*pack_arguments(x, w, 4, 0))
    arguments = popcount_arguments(packed, moved, 0, torch.bfloat16)
    with forced(variant):
        assert_product(TRITON.popcount_gemm(*arguments), REFERENCE.popcount_gemm(*arguments), moved)


@pytest.mark.parametrize("group", [32, 96, 256, 1024])
@pytest.mark.parametrize("variant", ["decode", "tiled"])
def test_groups_of_any_size(group: int, variant: str) -> None:
    layout = type(PLAIN)(group_size=group, tensors=("weight_scale", "group_shift"))
    x, weight = GemmProblem("", 3, 10, 600, layout).make(device=DEVICE)
    with forced(variant):
        assert_contract(sign_gemm(x, weight), x, weight)
    for block in (0, 256):
        if block and block % group and group % block:
            continue
        arguments = pack_arguments(x, weight, 8, block)
        packed = REFERENCE.pack_activations(*arguments)
        assert_packed(TRITON.pack_activations(*arguments), packed, arguments)
        arguments = popcount_arguments(packed, weight, block, torch.float32)
        with forced(variant):
            assert_product(TRITON.popcount_gemm(*arguments), REFERENCE.popcount_gemm(*arguments), weight)


@pytest.mark.parametrize(("m", "n"), [(0, 24), (3, 0), (0, 0)])
def test_nothing_to_compute(m: int, n: int) -> None:
    x, weight = GemmProblem("", m, n, 160, FBI).make(device=DEVICE)
    assert sign_gemm(x, weight).shape == (m, n)
    assert sign_gemm(x.view(m, 1, 160), weight).shape == (m, 1, n)
    packed = TRITON.pack_activations(*pack_arguments(x, weight, 8, 0))
    assert [tuple(t.shape) for t in packed] == [(m, 8, 5), (m, 1), (m, 1), (m, 1)]
    y = TRITON.popcount_gemm(*popcount_arguments(packed, weight, 0, torch.float16))
    assert y.shape == (m, n) and y.dtype == torch.float16
    assert TRITON.pack_signs(x.new_empty(m, 0)).shape == (m, 0)


def test_the_fused_packers_are_those_of_every_backend() -> None:
    x, weight = GemmProblem("", 3, 8, 300, FBI).make(torch.float16)
    norm_weight, residual = torch.randn(300).half(), torch.randn(3, 300).half()
    pack = (weight.in_scale, weight.in_shift, 8, 0, 0)
    for op, first in (
        ("rms_norm_pack_activations", (x, residual, norm_weight, 1e-5)),
        ("silu_mul_pack_activations", (x, residual)),
    ):
        actual = on("cpu", getattr(TRITON, op)(*on(DEVICE, (*first, *pack))))
        expected = getattr(REFERENCE, op)(*first, *pack)
        if INTERPRETED:  # a GPU's own mean and silu may round another way
            assert torch.equal(words(actual[0]), words(expected[0])) and torch.equal(actual[2], expected[2])
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-2, atol=0)
