"""What the Triton backend does on a GPU alone: larger sizes, CUDA graphs, torch.compile, streams, and a cold start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_problems import assert_packed, assert_product, make, pack_arguments, poisoned, popcount_arguments
from triton_problems import DEVICE, INTERPRETED, REFERENCE, TRITON, require_kernels

from bitinfer import ops, use_backend
from bitinfer.packing import unpack_signs
from bitinfer.testing.oracle import exact_linear, fp_error_bound
from bitinfer.testing.problems import FBI, LAYOUTS, ONEBIT, PLAIN, ROW
from bitinfer.weight import FLOAT_DTYPES

require_kernels()
if INTERPRETED:
    print("what needs a GPU is not tested in the interpreter")
    pytest.skip("what needs a GPU is not tested in the interpreter", allow_module_level=True)

TOKENS = (*range(1, 10), 16, 17, 33, 64, 100, 256, 2048)
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (4097, 768))
LARGER = [
    pytest.param(m, n, k, tuple(LAYOUTS)[(i + j) % len(LAYOUTS)], id=f"m{m}-n{n}-k{k}-{tuple(LAYOUTS)[(i + j) % 7]}")
    for i, m in enumerate(TOKENS)
    for j, (n, k) in enumerate(SHAPES)
]
needs_memory = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 40e9,
    reason="needs a GPU of 40 GB",
)
ACTIVATIONS = ((8, 0), (8, 256), (4, 0), (2, 0), (1, 0))


@pytest.fixture(autouse=True)
def on_triton():
    with use_backend("triton"):
        yield


@pytest.mark.parametrize(("m", "n", "k", "layout"), LARGER)
def test_contract_at_larger_sizes(m: int, n: int, k: int, layout: str) -> None:
    for dtype in FLOAT_DTYPES if m in (1, 16, 100) else (torch.float16,):
        x, weight = make(m, n, k, LAYOUTS[layout], dtype, bias=m % 2 == 1, device=DEVICE)
        y = poisoned(lambda x=x, weight=weight: ops.binary_linear(x, weight))
        error = (y.double() - exact_linear(x, weight)).abs().max().item()
        assert error <= fp_error_bound(x, weight), dtype


@pytest.mark.parametrize(("m", "n", "k", "layout"), LARGER)
def test_exact_at_larger_sizes(m: int, n: int, k: int, layout: str) -> None:
    x, weight = make(m, n, k, LAYOUTS[layout], bias=m % 2 == 1, device=DEVICE)
    for bits, block in ACTIVATIONS:
        arguments = pack_arguments(x, weight, bits, block)
        packed = REFERENCE.pack_activations(*arguments)
        assert_packed(poisoned(lambda a=arguments: TRITON.pack_activations(*a)), packed, arguments)
        arguments = popcount_arguments(packed, weight, block, x.dtype)
        y = poisoned(lambda a=arguments: TRITON.popcount_gemm(*a))
        assert_product(y, REFERENCE.popcount_gemm(*arguments), weight)


@pytest.mark.parametrize("bits", [None, 8, 1])
@pytest.mark.parametrize("m", [1, 40])
def test_graphs_replay_what_a_call_gives(m: int, bits: int | None) -> None:
    x, weight = make(m, 512, 1024, ONEBIT, bias=True, device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ops.binary_linear(x, weight, bits)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.binary_linear(x, weight, bits)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, ops.binary_linear(x, weight, bits))


@pytest.mark.parametrize("bits", [None, 8])
def test_compiled_layers_give_what_eager_ones_give(bits: int | None, compiler: str) -> None:
    _, weight = make(1, 256, 512, FBI, bias=True, device=DEVICE)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(ops.apply_weight(torch.tanh(x), weight, bits, 0))

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=compiler)
    for m in (1, 2, 40, 50, 300):
        x = torch.randn(m, 512, device=DEVICE, dtype=torch.float16)
        expected = layer(x)
        torch.testing.assert_close(compiled(x), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


def test_other_streams_and_devices() -> None:
    x, weight = make(3, 128, 256, ROW, device=DEVICE)
    expected = ops.binary_linear(x, weight)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        y = ops.binary_linear(x, weight)
    stream.synchronize()
    assert torch.equal(y, expected)
    if torch.cuda.device_count() > 1:
        assert torch.equal(ops.binary_linear(x.to("cuda:1"), weight.to("cuda:1")).cpu(), expected.cpu())
    else:
        print("one GPU: no second one is tested")


# a cold cache: compiling is all that it waits for
@pytest.mark.parametrize(("m", "bits"), [(1, None), (2048, None), (1, 8), (2048, 8)])
def test_the_first_call_is_quick(m: int, bits: int | None, tmp_path: Path) -> None:
    code = (
        "import time, torch; from bitinfer import ops, use_backend; from bitinfer.weight import BinaryWeight\n"
        "w = BinaryWeight.from_dense(torch.randn(4096, 4096, device='cuda', dtype=torch.float16))\n"
        f"x = torch.randn({m}, 4096, device='cuda', dtype=torch.float16); torch.cuda.synchronize(); t = time.time()\n"
        f"with use_backend('triton'): ops.binary_linear(x, w, {bits})\n"
        "torch.cuda.synchronize(); print('seconds', time.time() - t)"
    )
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    print(run.stdout)
    assert float(run.stdout.split()[-1]) < 5.0


@pytest.mark.slow
@needs_memory
@pytest.mark.parametrize("m", [1, 100])
def test_more_than_two_to_the_31_weights(m: int) -> None:
    n, k = 600_000, 4096
    x, weight = make(m, n, k, PLAIN, device=DEVICE)
    rows = torch.tensor([0, 1, 524_287, 524_288, 524_289, n - 1], device=DEVICE)  # 2**31 / 4096 = 524288
    few = weight.signs.view(torch.int32)[rows].view(torch.uint32)
    exact = x.double() @ unpack_signs(few, k, torch.float64).t()
    y = ops.binary_linear(x, weight)
    assert (y[:, rows].double() - exact).abs().max().item() <= 1e-3 * exact.abs().max().item()
    planes, scale, total, _ = TRITON.pack_activations(x, None, None, 8, 0, 0)
    y = ops.popcount_gemm(planes, scale, total, None, weight.signs, k)
    tail = (None, None, None, 0, 0, None, torch.float32)
    assert torch.equal(y[:, rows], REFERENCE.popcount_gemm(planes, scale, total, None, few, k, *tail))


@pytest.mark.slow
@needs_memory
@pytest.mark.parametrize("bits", [None, 8])
def test_more_than_two_to_the_31_outputs(bits: int | None) -> None:
    m, n, k = 40_000, 60_000, 128
    x, weight = make(m, n, k, ROW, device=DEVICE)
    y = ops.binary_linear(x, weight, bits)
    for start in (0, 35_760, m - 64):  # 2**31 / 60000 = 35791
        part = x[start : start + 64]
        if bits is None:
            error = (y[start : start + 64].double() - exact_linear(part, weight)).abs().max().item()
            assert error <= fp_error_bound(part, weight)
        else:
            with use_backend("reference"):
                assert torch.equal(y[start : start + 64], ops.binary_linear(part, weight, bits))
