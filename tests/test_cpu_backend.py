"""The compiled CPU kernels: float results against the float64 oracle, integer ones bit for bit against the reference.

A process keeps the instruction set that it chose first, so this file tests the one in use, and then runs itself once
more under BITINFER_CPU_ISA for every other one that this processor has.
"""

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitinfer import ops
from bitinfer.dispatch import BACKENDS, use_backend
from bitinfer.doctor import read_build_record
from bitinfer.packing import pack_signs as python_pack_signs
from bitinfer.packing import unpack_signs
from bitinfer.testing.oracle import exact_linear, fp_error_bound
from bitinfer.testing.problems import EVERYTHING, FBI, PROBLEMS, GemmProblem
from bitinfer.weight import FLOAT_DTYPES, BinaryWeight

CPU, REFERENCE = BACKENDS["cpu"], BACKENDS["reference"]
REASON = CPU.unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

VARIABLE = "BITINFER_CPU_ISA"
FORCED = os.environ.get(VARIABLE)
ACTIVATIONS = [(bits, block) for bits in (8, 4, 2, 1) for block in (0, 256)]


def native() -> Any:
    """The numpy bindings; a test that needs them is skipped where the build found no Python.h."""
    return pytest.importorskip("bitinfer._native", reason=f"no numpy bindings: {read_build_record()}")


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


@functools.cache
def supported_isas() -> list[str]:
    """Every instruction set that runs here, the preferred one first, as the error for an unknown one lists them."""
    if REASON is not None:
        return []
    code = "import torch, bitinfer; torch.ops.bitinfer_native.cpu_isa()"
    return run_python(code, **{VARIABLE: "unknown"}).stderr.strip().split("This processor supports: ")[1].split(", ")


def words(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32) if tensor.dtype == torch.uint32 else tensor


def popcount_arguments(x: Tensor, weight: BinaryWeight, bits: int, block: int, dtype: torch.dtype) -> tuple[Any, ...]:
    planes, scale, total, shift = REFERENCE.pack_activations(
        x, weight.in_scale, weight.in_shift, bits, block, weight.group_size
    )
    return (
        planes,
        scale,
        total,
        None if weight.in_shift is None else shift,
        weight.signs,
        weight.in_features,
        weight.scale,
        weight.group_shift,
        weight.bias,
        weight.group_size,
        block,
        weight.norm_eps,
        dtype,
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Problems here are too small for more; tests of threads set their own number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ numerical contract
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_floating_point_activations_meet_the_contract(problem: GemmProblem, dtype: torch.dtype) -> None:
    x, weight = problem.make(dtype)
    with use_backend("cpu"):
        y = ops.binary_linear(x, weight)
    assert y.dtype == dtype and y.shape == (problem.m, problem.n)
    error = (y.double() - exact_linear(x, weight)).abs()
    assert error.numel() == 0 or error.max().item() <= fp_error_bound(x, weight)


@pytest.mark.parametrize(("bits", "block"), ACTIVATIONS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_packed_activations_are_those_of_the_reference(problem: GemmProblem, bits: int, block: int) -> None:
    for dtype in FLOAT_DTYPES:
        x, weight = problem.make(dtype)
        arguments = (x, weight.in_scale, weight.in_shift, bits, block, weight.group_size)
        planes, scale, total, shift = CPU.pack_activations(*arguments)
        expected_planes, expected_scale, expected_total, expected_shift = REFERENCE.pack_activations(*arguments)
        assert torch.equal(words(planes), words(expected_planes))
        assert torch.equal(total, expected_total)
        # means and dot products are summed in double, in any order
        torch.testing.assert_close(scale, expected_scale, rtol=0 if bits > 1 else 2e-7, atol=0)
        torch.testing.assert_close(shift, expected_shift, rtol=2e-7, atol=1e-12)


@pytest.mark.parametrize(("bits", "block"), ACTIVATIONS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_integer_products_are_bit_exact(problem: GemmProblem, bits: int, block: int) -> None:
    for dtype in FLOAT_DTYPES:
        x, weight = problem.make(dtype)
        arguments = popcount_arguments(x, weight, bits, block, dtype)
        actual, expected = CPU.popcount_gemm(*arguments), REFERENCE.popcount_gemm(*arguments)
        assert actual.dtype == dtype
        if weight.norm_eps is None:
            assert torch.equal(actual, expected)
        else:  # double inside, in any order: at most the last bit of the result
            torch.testing.assert_close(actual, expected, rtol=max(1e-6, torch.finfo(dtype).eps), atol=1e-6)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 31, 32, 33, 511, 513, 1111])
def test_pack_signs(dtype: torch.dtype, k: int) -> None:
    weight = torch.randn(5, k, generator=torch.Generator().manual_seed(k)).to(dtype)
    weight[0, 0], weight[1, 0], weight[2, 0], weight[3, 0] = 0.0, -0.0, float("nan"), -float("inf")
    assert torch.equal(words(CPU.pack_signs(weight)), words(python_pack_signs(weight)))
    strided = torch.cat([weight, weight], -1)[:, :k].t().contiguous().t()
    assert torch.equal(words(CPU.pack_signs(strided)), words(python_pack_signs(weight)))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_activations_that_are_not_finite_show(bad: float) -> None:
    x, weight = GemmProblem("", 3, 20, 300).make()
    x[1, 299] = bad
    with use_backend("cpu"):
        y = ops.binary_linear(x, weight)
        quantised = ops.binary_linear(x, weight, 8)
    assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()
    assert quantised[1].isnan().all() and quantised[[0, 2]].isfinite().all()
    for bits, block in ACTIVATIONS:
        arguments = (x, None, None, bits, block, 0)
        for actual, expected in zip(
            CPU.pack_activations(*arguments), REFERENCE.pack_activations(*arguments), strict=True
        ):
            torch.testing.assert_close(words(actual), words(expected), rtol=2e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", [8, 1])
def test_extreme_activations(bits: int) -> None:
    x = torch.tensor([[3e38, -1e38, 1e30, 0.0], [1e-30, -1e-30, 2e-38, 0.0], [1e-42, -1e-45, 0.0, 0.0], [0.0] * 4])
    for actual, expected in zip(
        CPU.pack_activations(x, None, None, bits, 0, 0),
        REFERENCE.pack_activations(x, None, None, bits, 0, 0),
        strict=True,
    ):
        torch.testing.assert_close(words(actual), words(expected), rtol=2e-7 if bits == 1 else 0, atol=0)


# ------------------------------------------------------------------------------------------------ shapes and strides
def test_any_strides_and_leading_dimensions() -> None:
    x, weight = GemmProblem("", 12, 40, 200, EVERYTHING, bias=True).make()
    assert weight.scale is not None
    spread = torch.empty(2, 40, 2 * weight.signs.shape[-1], dtype=torch.int32).view(torch.uint32)[..., ::2]
    spread.copy_(weight.signs)
    awkward = BinaryWeight(
        spread,
        weight.in_features,
        weight.scale.transpose(1, 2).contiguous().transpose(1, 2),
        weight.in_scale,
        weight.in_shift,
        weight.group_shift,
        weight.bias,
        weight.group_size,
        weight.norm_eps,
    )
    unaligned = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    with use_backend("cpu"):
        for bits in (None, 8):
            expected = ops.binary_linear(x, weight, bits)
            assert torch.equal(ops.binary_linear(x, awkward, bits), expected)
            assert torch.equal(ops.binary_linear(unaligned, weight, bits), expected)
            assert torch.equal(ops.binary_linear(x.t().contiguous().t(), weight, bits), expected)
            assert torch.equal(ops.binary_linear(x.view(3, 4, 200), weight, bits), expected.view(3, 4, 40))
            assert torch.equal(
                ops.binary_linear(x.view(3, 4, 200).transpose(0, 1), weight, bits),
                expected.view(3, 4, 40).transpose(0, 1),
            )
            assert torch.equal(ops.binary_linear(x[0], weight, bits), expected[0])
            assert torch.equal(ops.binary_linear(x[:1].expand(5, -1), weight, bits), expected[:1].expand(5, -1))


def test_dtypes_mix() -> None:
    x, weight = GemmProblem("", 4, 33, 100, FBI, bias=True).make()
    assert weight.in_scale is not None and weight.bias is not None
    mixed = BinaryWeight(
        weight.signs,
        100,
        in_scale=weight.in_scale.to(torch.float16),
        in_shift=weight.in_shift,
        bias=weight.bias.to(torch.bfloat16),
    )
    with use_backend("cpu"):
        for dtype in FLOAT_DTYPES:
            y = ops.binary_linear(x.to(dtype), mixed)
            error = (y.double() - exact_linear(x.to(dtype), mixed)).abs().max().item()
            assert y.dtype == dtype and error <= fp_error_bound(x.to(dtype), mixed)


@pytest.mark.slow
def test_a_matrix_of_more_than_two_to_the_31_weights() -> None:
    n, k = 70_001, 32_768
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(-(2**31), 2**31, (n, k // 32), generator=generator, dtype=torch.int64).to(torch.int32)
    x = torch.randn(1, k, generator=generator)
    y = CPU.sign_gemm(x, signs.view(torch.uint32), k, None, None, None, None, None, 0, None)
    planes, scale, total, _ = CPU.pack_activations(x, None, None, 8, 0, 0)
    rows = torch.tensor([0, 1, 65_535, 65_536, n - 1])
    few = signs[rows].view(torch.uint32)
    exact = x.double() @ unpack_signs(few, k, torch.float64).t()
    torch.testing.assert_close(y[:, rows].double(), exact, rtol=1e-4, atol=1e-2)
    tail = (None, None, None, 0, 0, None, torch.float32)
    integers = CPU.popcount_gemm(planes, scale, total, None, signs.view(torch.uint32), k, *tail)
    assert torch.equal(integers[:, rows], REFERENCE.popcount_gemm(planes, scale, total, None, few, k, *tail))


# ----------------------------------------------------------------------------------------------------------- threads
@pytest.mark.parametrize("m", [1, 5, 70])
def test_results_do_not_depend_on_threads(m: int) -> None:
    x, weight = GemmProblem("", m, 1000, 1100, EVERYTHING, bias=True).make()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with use_backend("cpu"):
            results.append([ops.binary_linear(x, weight), ops.binary_linear(x, weight, 8), ops.pack_signs(x)])
    for other in results[1:]:
        assert all(torch.equal(words(a), words(b)) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_set_num_threads_is_honoured() -> None:
    code = """
import os, torch
from bitinfer.backends.cpu import CPUBackend
cpu = CPUBackend()
torch.set_num_threads(1)
signs, x = torch.zeros(4096, 64, dtype=torch.int32).view(torch.uint32), torch.randn(8, 2048)
def run(threads):
    torch.set_num_threads(threads)
    cpu.sign_gemm(x, signs, 2048, None, None, None, None, None, 0, None)
    return len(os.listdir("/proc/self/task"))
one, again, two, three = run(1), run(1), run(2), run(3)
assert one == again, (one, again)
assert two == one + 1 and three == one + 2, (one, two, three)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_calls_from_several_threads_at_once() -> None:
    x, weight = GemmProblem("", 4, 600, 700, FBI).make()
    expected = CPU.sign_gemm(x, weight.signs, 700, None, weight.in_scale, weight.in_shift, None, None, 0, None)

    def call(_: int) -> Tensor:
        return CPU.sign_gemm(x, weight.signs, 700, None, weight.in_scale, weight.in_shift, None, None, 0, None)

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(y, expected) for y in pool.map(call, range(40)))


# -------------------------------------------------------------------------------------------------- instruction sets
def test_the_forced_instruction_set_ran() -> None:
    active = torch.ops.bitinfer_native.cpu_isa()
    assert active == (FORCED or supported_isas()[0])
    assert native().active_isa() == active
    assert [isa["name"] for isa in native().isas() if isa["supported"]] == supported_isas()


@pytest.mark.parametrize("name", ["mmx", "AVX2 "])
def test_an_unknown_instruction_set_is_an_error_that_names_the_others(name: str) -> None:
    code = "import torch, bitinfer; from bitinfer import ops; ops.pack_signs(torch.ones(1, 3))"
    result = run_python(code, **{VARIABLE: name})
    assert result.returncode == 1  # an exception and not a signal
    assert f"{VARIABLE}: instruction set '{name}' cannot be used" in result.stderr
    assert f"This processor supports: {', '.join(supported_isas())}" in result.stderr
    native()
    result = run_python("import bitinfer._native as n; n.isas(); n.active_isa()", **{VARIABLE: name})
    assert result.returncode == 1 and f"instruction set '{name}' cannot be used" in result.stderr


@pytest.mark.parametrize("isa", supported_isas())
def test_numpy_bindings_reach_every_table(isa: str) -> None:
    x, weight = GemmProblem("", 7, 45, 300, EVERYTHING, bias=True).make()
    names = ("weight_scale", "in_scale", "in_shift", "group_shift", "bias")
    numpy = {name: tensor.numpy() for name, tensor in weight.tensors().items()}
    signs = words(weight.signs).numpy().view(np.uint32)
    flat = {name: numpy[name].reshape(-1) for name in ("in_scale", "in_shift", "bias")}
    rows = {"weight_scale": numpy["weight_scale"], "group_shift": numpy["group_shift"][0], "bias": flat["bias"]}
    assert set(numpy) == {"weight", *names}

    packed = native().pack_signs(x.numpy(), isa=isa)
    assert np.array_equal(packed, words(python_pack_signs(x)).numpy().view(np.uint32))

    common = {"group_size": weight.group_size, "norm_eps": weight.norm_eps, "isa": isa}
    y = native().sign_gemm(
        x.numpy(), signs, 300, in_scale=flat["in_scale"], in_shift=flat["in_shift"], **rows, **common
    )
    assert np.abs(y - exact_linear(x, weight).numpy()).max() <= fp_error_bound(x, weight)

    for bits, block in ACTIVATIONS:
        arguments = popcount_arguments(x, weight, bits, block, torch.float32)
        planes, scale, total, shift = native().pack_activations(
            x.numpy(), flat["in_scale"], flat["in_shift"], bits, block, weight.group_size, isa
        )
        assert np.array_equal(planes, words(arguments[0]).numpy().view(np.uint32))
        assert np.array_equal(total, arguments[2].numpy())
        y = native().popcount_gemm(planes, scale, total, shift, signs, 300, block_size=block, **rows, **common)
        np.testing.assert_allclose(y, REFERENCE.popcount_gemm(*arguments).numpy(), rtol=2e-6, atol=2e-6)


def test_numpy_bindings_refuse_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(2, 64\)"):
        native().sign_gemm(np.zeros((2, 65), np.float32), np.zeros((3, 2), np.uint32), 64)
    with pytest.raises(ValueError, match="words"):
        native().sign_gemm(np.zeros((2, 65), np.float32), np.zeros((3, 2), np.uint32), 65)
    with pytest.raises(RuntimeError, match="cannot be used"):
        native().pack_signs(np.zeros((2, 65), np.float32), isa="mmx")


if FORCED is None:

    @pytest.mark.parametrize("isa", supported_isas()[1:])
    def test_this_file_under_every_other_instruction_set(isa: str) -> None:
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", __file__],
            env={**os.environ, VARIABLE: isa},
            capture_output=True,
            text=True,
            timeout=540,
        )
        assert result.returncode == 0, result.stdout[-5000:]
        if importlib.util.find_spec("bitinfer._native") is not None:  # or else the tests of the bindings are skipped
            assert "skipped" not in result.stdout.splitlines()[-1]


# ------------------------------------------------------------------------------------------------------------ errors
SIGNS = torch.zeros(5, 2, dtype=torch.int32).view(torch.uint32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 65)}, "sign_gemm: weight has in_features=64 but x has last dimension 65"),
        ({"x": torch.zeros(3, 64, dtype=torch.float64)}, "x must be float32, float16 or bfloat16"),
        ({"x": torch.tensor(1.0)}, "x must have at least one dimension"),
        ({"x": torch.zeros(3, 65), "in_features": 65}, r"weight must be \[N, 3\]"),
        ({"weight": SIGNS.view(torch.int32)}, "weight must be torch.uint32"),
        ({"weight": SIGNS[0]}, r"weight must be \[N, 2\]"),
        ({"weight_scale": torch.zeros(5)}, r"weight_scale must have shape \(5, 1\), got \(5,\)"),
        ({"weight_scale": torch.zeros(5, 1, dtype=torch.int32)}, "weight_scale must be float32"),
        ({"weight_scale": torch.zeros(5, 1), "group_size": 32}, r"weight_scale must have shape \(5, 2\)"),
        ({"in_scale": torch.zeros(1, 63)}, r"in_scale must have shape \(1, 64\)"),
        ({"in_shift": torch.zeros(2, 64)}, r"in_shift must have shape \(1, 64\)"),
        ({"group_shift": torch.zeros(4, 1)}, r"group_shift must have shape \(5, 1\)"),
        ({"bias": torch.zeros(6)}, r"bias must have shape \(5,\), got \(6,\)"),
        ({"group_size": 33}, "group_size must be 0 or a multiple of 32"),
        ({"group_size": -32}, "group_size must be 0 or a multiple of 32"),
    ],
)
def test_compiled_sign_gemm_checks_on_its_own(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(3, 64),
        "weight": SIGNS,
        "in_features": 64,
        "weight_scale": None,
        "in_scale": None,
        "in_shift": None,
        "group_shift": None,
        "bias": None,
        "group_size": 0,
        "norm_eps": None,
    }
    torch.ops.bitinfer_native.sign_gemm(**arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bitinfer_native.sign_gemm(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"planes": torch.zeros(3, 8, 3, dtype=torch.int32).view(torch.uint32)}, r"planes must have shape \(3, 8, 2\)"),
        ({"planes": torch.zeros(3, 7, 2, dtype=torch.int32).view(torch.uint32)}, "bits must be 8, 4, 2 or 1, got 7"),
        ({"planes": torch.zeros(3, 8, 2, dtype=torch.int32)}, "planes must be torch.uint32"),
        ({"act_scale": torch.zeros(3, 2)}, r"act_scale must have shape \(3, 1\), got \(3, 2\)"),
        ({"act_scale": torch.zeros(3, 1, dtype=torch.float16)}, "act_scale must be torch.float32"),
        ({"act_sum": torch.zeros(2, 1, dtype=torch.int32)}, r"act_sum must have shape \(3, 1\)"),
        ({"act_shift": torch.zeros(3)}, r"act_shift must have shape \(3, 1\)"),
        ({"block_size": 128}, "block_size must be 0 or 256"),
        ({"block_size": 256, "group_size": 96}, "overlap unevenly"),
        ({"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16"),
    ],
)
def test_compiled_popcount_gemm_checks_on_its_own(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "planes": torch.zeros(3, 8, 2, dtype=torch.int32).view(torch.uint32),
        "act_scale": torch.zeros(3, 1),
        "act_sum": torch.zeros(3, 1, dtype=torch.int32),
        "act_shift": None,
        "weight": SIGNS,
        "in_features": 64,
        "weight_scale": None,
        "group_shift": None,
        "bias": None,
        "group_size": 0,
        "block_size": 0,
        "norm_eps": None,
        "dtype": torch.float32,
    }
    torch.ops.bitinfer_native.popcount_gemm(**arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bitinfer_native.popcount_gemm(**{**arguments, **change})


@pytest.mark.parametrize(("bits", "block", "group"), [(3, 0, 0), (8, 32, 0), (8, 0, 31), (8, 256, 96)])
def test_compiled_pack_activations_checks_on_its_own(bits: int, block: int, group: int) -> None:
    with pytest.raises(RuntimeError, match="pack_activations: "):
        torch.ops.bitinfer_native.pack_activations(torch.zeros(2, 64), None, None, bits, block, group)
