"""The CUDA backend as part of a program: streams, graphs, torch.compile, several GPUs, weights that change."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cuda_problems import CUDA, REFERENCE, make, poisoned, require_cuda, words
from torch import Tensor

from bitinfer import BinaryLinear, ops
from bitinfer.backends.reference import unpack_activations
from bitinfer.testing.problems import EVERYTHING, FBI, GROUPS, ROW
from bitinfer.weight import FLOAT_DTYPES, BinaryWeight

require_cuda()

BITS = [None, 8, 1]
WORKER = Path(__file__).with_name("cuda_sanitizer_worker.py")
SLEEP = 200_000_000  # cycles: about a tenth of a second


# -------------------------------------------------------------------------------------------------- streams and graphs
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [1, 16, 64, 512])
def test_a_side_stream_does_not_wait_for_the_default_one(m: int, bits: int | None) -> None:
    x, weight = make(m, 2048, 4096, FBI)
    expected = ops.binary_linear(x, weight, bits)
    torch.cuda.synchronize()
    side, busy = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(side):
        ops.binary_linear(x, weight, bits)  # gets the stream its memory, which may wait
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    busy.record()
    with torch.cuda.stream(side):
        y = ops.binary_linear(x, weight, bits)
    side.synchronize()
    assert not busy.query(), "the op ran on, or waited for, the default stream"
    assert torch.equal(y, expected)
    torch.cuda.synchronize()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [1, 16, 64, 512])
def test_an_op_waits_for_what_is_ahead_of_it_in_its_stream(m: int, bits: int | None) -> None:
    x, weight = make(m, 2048, 4096, FBI)
    other = torch.randn_like(x)
    expected = ops.binary_linear(other, weight, bits)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP // 10)
        x.copy_(other)
        y = ops.binary_linear(x, weight, bits)
        x.zero_()  # after the op has read it
    side.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [1, 16, 64, 512])
def test_ops_in_a_row_wait_for_each_other(m: int, bits: int | None) -> None:
    """Layer after layer without a pause between: each reads what the one before it wrote."""
    layers = [make(1, 2048, 2048, ROW)[1] for _ in range(8)]
    x = make(m, 8, 2048, ROW)[0]

    def chain(pause: bool) -> list[Tensor]:
        outputs = [x]
        for weight in layers * 4:
            y = ops.binary_linear(outputs[-1], weight, bits)
            outputs.append(y / y.abs().amax())
            if pause:
                torch.cuda.synchronize()
        return outputs[1:]

    slowly = chain(True)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(chain(False), slowly, strict=True))


def capture(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    return graph, y


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [1, 16, 64, 512])
def test_a_graph_replays_with_new_inputs(m: int, bits: int | None) -> None:
    x, weight = make(m, 2048, 4096, FBI, bias=True)
    graph, y = capture(lambda: ops.binary_linear(x, weight, bits))
    for _ in range(5):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, ops.binary_linear(x, weight, bits))


@pytest.mark.parametrize("bits", BITS)
def test_a_graph_of_many_layers(bits: int | None) -> None:
    weights = [make(1, 2048, 2048, FBI)[1] for _ in range(6)]
    x = make(1, 8, 2048, ROW)[0]

    def run() -> Tensor:
        y = x
        for weight in weights:
            y = ops.binary_linear(y, weight, bits)
            y = y / y.abs().amax()
        return y

    graph, y = capture(run)
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, run())


def test_no_call_waits_for_the_gpu() -> None:
    x, weight = make(16, 256, 512, EVERYTHING, bias=True)
    for bits in BITS:
        ops.binary_linear(x, weight, bits)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for bits in BITS:
            ops.binary_linear(x, weight, bits)
        ops.pack_signs(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bits", [None, 8, 4, 2, 1])
@pytest.mark.parametrize("m", [1, 16, 64, 300])
def test_the_same_call_gives_the_same_bits(m: int, bits: int | None) -> None:
    for layout in (FBI, EVERYTHING):
        x, weight = make(m, 2050, 4096, layout)
        first = ops.binary_linear(x, weight, bits)
        assert all(torch.equal(ops.binary_linear(x, weight, bits), first) for _ in range(20))


# ------------------------------------------------------------------------------------------------ weights that change
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [1, 16, 256])
def test_weights_rewritten_just_before_a_call_are_seen(m: int, bits: int | None) -> None:
    problems = [make(m, 4096, 4096, ROW) for _ in range(4)]
    x = problems[0][0]
    layer = BinaryLinear.from_weight(problems[0][1].to("cpu"), act_bits=bits).cuda()
    expected = []
    for _, weight in problems:
        layer.load_state_dict(BinaryLinear.from_weight(weight).state_dict())
        torch.cuda.synchronize()
        expected.append(layer(x))
        torch.cuda.synchronize()
    assert not torch.equal(expected[0], expected[1])
    outputs = []
    for i in range(200):
        weight = problems[i % 4][1]
        assert weight.scale is not None and layer.weight_scale is not None
        layer.weight.copy_(weight.signs)
        layer.weight_scale.copy_(weight.scale)
        outputs.append(layer(x))
    assert all(torch.equal(y, expected[i % 4]) for i, y in enumerate(outputs))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [1, 16, 256])
def test_weights_packed_just_before_a_call_are_seen(m: int, bits: int | None) -> None:
    """pack_signs is a kernel of ours, which may let the next one begin before it has written its words."""
    x = make(m, 8, 4096, ROW)[0]
    dense = [torch.randn(4096, 4096, device="cuda", dtype=torch.float16) for _ in range(4)]
    expected = []
    for d in dense:
        signs = ops.pack_signs(d)
        torch.cuda.synchronize()
        expected.append(ops.binary_linear(x, BinaryWeight(signs, 4096), bits))
        torch.cuda.synchronize()
    storage = torch.zeros_like(signs)
    outputs = []
    with torch.no_grad():
        for i in range(100):
            outputs.append(ops.binary_linear(x, BinaryWeight(ops.pack_signs(dense[i % 4]), 4096), bits))
            storage.copy_(ops.pack_signs(dense[i % 4]))
            outputs.append(ops.binary_linear(x, BinaryWeight(storage, 4096), bits))
    assert all(torch.equal(y, expected[i // 2 % 4]) for i, y in enumerate(outputs))


# -------------------------------------------------------------------------------------------------------- fused packers
def assert_same_but_for_ties(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], x: Tensor) -> None:
    """Integers may fall to the other side of a half, rarely: the values behind them are rounded once more or less."""
    k = x.shape[-1]
    off = (unpack_activations(actual[0], k) - unpack_activations(expected[0], k)).abs()
    assert off.max() <= 1 and (off != 0).float().mean() < 0.02
    assert torch.equal(actual[2].squeeze(-1), unpack_activations(actual[0], k).sum(-1).to(torch.int32))
    for a, b in zip(actual[1::2], expected[1::2], strict=True):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(x.dtype).eps, atol=0.05)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("k", [320, 1111, 4096, 11008])
@pytest.mark.parametrize("m", [1, 5, 64])
def test_fused_packers(m: int, k: int, dtype: torch.dtype) -> None:
    x, weight = make(m, 8, k, FBI, dtype)
    residual, norm = torch.randn_like(x), torch.randn_like(x[0])
    tail = (weight.in_scale, weight.in_shift, 8, 0, 0)
    for other in (residual, None):
        for _ in range(2):  # the second time the weights are settled
            *packed, hidden = poisoned(lambda other=other: CUDA.rms_norm_pack_activations(x, other, norm, 1e-5, *tail))
        *expected, exact = REFERENCE.rms_norm_pack_activations(x, other, norm, 1e-5, *tail)
        assert torch.equal(hidden, exact)
        assert_same_but_for_ties(tuple(packed), tuple(expected), x)
    gate, up = torch.randn(m, 2 * k, device="cuda").to(dtype).split(k, -1)  # rows with a stride
    packed = poisoned(lambda: CUDA.silu_mul_pack_activations(gate, up, *tail))
    assert_same_but_for_ties(packed, REFERENCE.silu_mul_pack_activations(gate, up, *tail), x)


# -------------------------------------------------------------------------------------------------------- torch's tools
@pytest.mark.parametrize("bits", BITS)
def test_compile_has_no_graph_break(bits: int | None, compiler: str) -> None:
    _, weight = make(1, 64, 320, FBI)

    def run(x: Tensor) -> Tensor:
        return ops.binary_linear(torch.relu(x), weight, bits) + 1

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=compiler)
    for m in (3, 5):
        x = torch.randn(m, 320, device="cuda", dtype=torch.float16)
        torch.testing.assert_close(compiled(x), run(x))


def test_compile_into_graphs(compiler: str) -> None:
    if compiler != "inductor":
        pytest.skip("mode='reduce-overhead' is inductor's")
    layers = [BinaryLinear.from_weight(make(1, 512, 512, FBI)[1], act_bits=bits) for bits in (None, 8)]
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1])
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.inference_mode():
        for _ in range(4):
            x = torch.randn(2, 512, device="cuda", dtype=torch.float16)
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x).clone(), model(x), rtol=1e-2, atol=1e-2)


def op_calls() -> dict[str, tuple]:
    x, w = make(3, 7, 320, EVERYTHING, bias=True)
    packed = torch.ops.bitinfer.pack_activations(x, w.in_scale, w.in_shift, 4, 256, 64)
    plain = make(3, 7, 320, GROUPS)[1]
    act = torch.ops.bitinfer.pack_activations(x, None, None, 8, 0, 128)[:3]
    return {
        "pack_signs": (x,),
        "pack_activations": (x, w.in_scale, w.in_shift, 4, 256, 64),
        "sign_gemm": (x, w.signs, 320, w.scale, w.in_scale, w.in_shift, w.group_shift, w.bias, 64, 1e-5),
        "popcount_gemm": (*packed, w.signs, 320, w.scale, w.group_shift, w.bias, 64, 256, 1e-5, torch.bfloat16),
        "popcount_gemm, few": (*act, None, plain.signs, 320, plain.scale, None, None, 128, 0, None, torch.float32),
        "rms_norm_pack_activations": (x, x + 1, x[0], 1e-5, w.in_scale, w.in_shift, 4, 256, 64),
        "silu_mul_pack_activations": (x, x + 1, w.in_scale, w.in_shift, 4, 256, 64),
    }


OPS = ["pack_signs", "pack_activations", "sign_gemm", "popcount_gemm", "popcount_gemm, few"]


@pytest.mark.parametrize("name", [*OPS, "rms_norm_pack_activations", "silu_mul_pack_activations"])
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.bitinfer, name.split(",")[0])
    torch.library.opcheck(op.default, op_calls()[name])


def test_gradients_flow_to_the_input() -> None:
    x, weight = make(5, 64, 320, FBI, torch.float32)
    x.requires_grad_()
    y = ops.binary_linear(x, weight)
    y.sum().backward()
    expected = weight.to_dense(torch.float64).sum(0).float().expand(5, -1)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- other GPUs
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [1, 16, 64, 512])
def test_a_second_gpu(m: int, bits: int | None) -> None:
    x, weight = make(m, 2048, 4096, FBI)
    expected = ops.binary_linear(x, weight, bits)
    x, weight = x.to("cuda:1"), weight.to("cuda:1")
    torch.cuda.synchronize(1)
    assert torch.cuda.current_device() == 0
    y = ops.binary_linear(x, weight, bits)
    assert y.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert torch.equal(y.cpu(), expected.cpu())
    signs = ops.pack_signs(x)
    assert signs.device == x.device and torch.equal(words(signs).cpu(), words(ops.pack_signs(x.cpu())))


# --------------------------------------------------------------------------------------------- the library's own checks
@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(3, 65)},
        {"x": torch.zeros(3, 64, dtype=torch.float64)},
        {"weight": torch.zeros(5, 3, dtype=torch.int32).view(torch.uint32)},
        {"weight": torch.zeros(5, 2, dtype=torch.int32)},
        {"weight_scale": torch.zeros(5)},
        {"in_scale": torch.zeros(1, 63)},
        {"in_shift": torch.zeros(2, 64)},
        {"group_shift": torch.zeros(4, 1)},
        {"bias": torch.zeros(6)},
        {"group_size": 33},
    ],
    ids=lambda change: next(iter(change)),
)
def test_compiled_sign_gemm_checks_on_its_own(change: dict[str, object]) -> None:
    signs = torch.zeros(5, 2, dtype=torch.int32, device="cuda").view(torch.uint32)
    arguments = {"x": torch.zeros(3, 64, device="cuda"), "weight": signs, "in_features": 64, "group_size": 0}
    for name in ("weight_scale", "in_scale", "in_shift", "group_shift", "bias", "norm_eps"):
        arguments[name] = None
    torch.ops.bitinfer_native.sign_gemm(**arguments)
    moved = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in change.items()}
    with pytest.raises(RuntimeError, match="sign_gemm: "):
        torch.ops.bitinfer_native.sign_gemm(**{**arguments, **moved})


@pytest.mark.parametrize("name", ["weight", "bias", "in_scale"])
def test_compiled_sign_gemm_wants_everything_on_the_gpu(name: str) -> None:
    x, w = make(3, 5, 64, FBI, bias=True)
    arguments = {"weight": w.signs, "bias": w.bias, "in_scale": w.in_scale}
    arguments[name] = arguments[name].cpu()
    with pytest.raises(RuntimeError, match="sign_gemm: "):
        CUDA.sign_gemm(
            x, arguments["weight"], 64, None, arguments["in_scale"], w.in_shift, None, arguments["bias"], 0, None
        )


# ----------------------------------------------------------------------------------------------------------- sanitizer
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    result = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable, str(WORKER)],
        env={
            **os.environ,
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # else a read past a tensor's end stays inside torch's own memory
            "PYTHONPATH": os.pathsep.join([str(WORKER.parents[1]), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    assert re.search(r"^\d+ calls$", result.stdout, re.M), result.stdout[-5000:]
