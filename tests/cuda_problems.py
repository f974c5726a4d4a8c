"""What the tests of the CUDA backend share: problems made on the GPU, poisoned outputs, and forced kernel variants."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from bitinfer.dispatch import BACKENDS
from bitinfer.packing import WORD_BITS
from bitinfer.weight import BinaryWeight, WeightLayout

CUDA, REFERENCE = BACKENDS["cuda"], BACKENDS["reference"]
REASON = CUDA.unavailable()
VARIABLE = "BITINFER_CUDA_KERNEL"
FORCED = os.environ.get(VARIABLE)


def require_cuda() -> None:
    """Skip the module that calls this, and say why, where no CUDA kernel runs."""
    if REASON is not None:
        print(f"the CUDA backend is not tested here: {REASON}")
        pytest.skip(f"the CUDA backend is not tested here: {REASON}", allow_module_level=True)


def fresh_seed() -> int:
    """Return another seed in each run; pytest prints it where a test fails."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return seed


def words(tensor: Tensor) -> Tensor:
    """Return a tensor that torch can compare."""
    return tensor.view(torch.int32) if tensor.dtype == torch.uint32 else tensor


def make(
    m: int,
    n: int,
    k: int,
    layout: WeightLayout,
    dtype: torch.dtype = torch.float16,
    bias: bool = False,
    seed: int | None = None,
    device: str = "cuda",
) -> tuple[Tensor, BinaryWeight]:
    """Return ``x [M, K]`` and a weight, made on the GPU: for sizes that the CPU would take long to draw."""
    generator = torch.Generator(device).manual_seed(fresh_seed() if seed is None else seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    shapes = layout.shapes(k, n)
    size = (-(1 << 31), 1 << 31, shapes.pop("weight"))
    signs = torch.randint(*size, generator=generator, dtype=torch.int32, device=device)
    if k % WORD_BITS:
        signs[..., -1] &= (1 << k % WORD_BITS) - 1
    tensors = {"weight": signs.view(torch.uint32)}
    for name, shape in shapes.items():
        tensors[name] = (normal(*shape) * 0.5 + (0.0 if name.endswith("shift") else 1.0)).to(dtype)
    if bias:
        tensors["bias"] = normal(n).to(dtype)
    return normal(m, k).to(dtype), BinaryWeight.from_tensors(tensors, k, layout)


def pack_arguments(x: Tensor, weight: BinaryWeight, bits: int, block: int) -> tuple[Any, ...]:
    return x, weight.in_scale, weight.in_shift, bits, block, weight.group_size


def popcount_arguments(
    packed: tuple[Tensor, ...], weight: BinaryWeight, block: int, dtype: torch.dtype
) -> tuple[Any, ...]:
    """The arguments of popcount_gemm for what pack_activations returned."""
    planes, scale, total, shift = packed
    w = weight
    shift = None if w.in_shift is None else shift
    tail = (w.scale, w.group_shift, w.bias, w.group_size, block, w.norm_eps, dtype)
    return planes, scale, total, shift, w.signs, w.in_features, *tail


def on(device: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in arguments)


def poisoned(run: Callable[[], Any]) -> Any:
    """Call with every new tensor full of NaN or of the largest integer, so that what is not written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        return run()
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def allow_refusal() -> Iterator[None]:
    """Skip where a forced variant says that it cannot run the problem."""
    try:
        yield
    except RuntimeError as error:
        if FORCED is None or VARIABLE not in str(error):
            raise
        pytest.skip(f"{FORCED} refuses: {str(error).splitlines()[0]}")


def assert_packed(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], arguments: tuple[Any, ...]) -> None:
    """Check what pack_activations returned: integers exactly, means and dot products to a few roundings."""
    actual = on("cpu", actual)
    expected = on("cpu", expected)
    x, _, in_shift, bits, *_ = on("cpu", arguments)
    assert torch.equal(words(actual[0]), words(expected[0])), "planes"
    assert torch.equal(actual[2], expected[2]), "sums"
    tolerance = 0 if bits > 1 else 1e-6
    torch.testing.assert_close(actual[1], expected[1], rtol=tolerance, atol=0, equal_nan=True)
    assert actual[3].shape == expected[3].shape
    if in_shift is not None:
        magnitude = (x.double() * in_shift.double().flatten()).abs().sum(-1, keepdim=True)
        assert ((actual[3].double() - expected[3].double()).abs() <= 1e-6 * magnitude).all(), "shift"


def assert_product(actual: Tensor, expected: Tensor, weight: BinaryWeight) -> None:
    """Check a popcount_gemm: bit for bit, but for a norm, which sums in an order of its own."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    expected = expected.to(actual.device)
    if weight.norm_eps is None:
        assert torch.equal(actual, expected)
    else:
        tolerance = max(1e-5, torch.finfo(actual.dtype).eps)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-5)


def normal(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)
