"""Triton's compiler without a GPU: every kernel for NVIDIA and AMD targets, and what torch.compile sees of the ops.

What a call would launch is recorded, and compiled down to machine code. What each kernel needs is checked too: that it
uses the matrix units of its target, keeps its sums in registers, and fits the shared memory.
"""

import re
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_problems import make, pack_arguments, popcount_arguments
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from bitinfer import ops
from bitinfer.backends.triton import interpreted
from bitinfer.dispatch import BACKENDS, use_backend
from bitinfer.testing.problems import EVERYTHING, FBI, LAYOUTS, ONEBIT, ROW, GemmProblem
from bitinfer.weight import BinaryWeight, WeightLayout

REASON = (
    "Triton is not installed (pip install triton)"
    if find_spec("triton") is None
    else "the interpreter has no compiler"
    if interpreted()
    else None
)
if REASON is not None:
    print(f"Triton's compiler is not tested here: {REASON}")
    pytest.skip(f"Triton's compiler is not tested here: {REASON}", allow_module_level=True)
else:
    import triton
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    from bitinfer.backends.triton.launch import Device

OPS: dict[str, Any] = import_module("bitinfer.backends.triton.compiled").OPS
MODULES = [
    import_module(f"bitinfer.backends.triton.{name}")
    for name in ("sign_gemm", "popcount_gemm", "finish", "pack_activations", "pack_signs")
]
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Device("A100", "cuda", "80", 108, 32, 163 << 10)),
    "sm_90": (GPUTarget("cuda", 90, 32), Device("H200", "cuda", "90", 132, 32, 227 << 10)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Device("MI300X", "hip", "gfx942", 304, 64)),
}
MATRIX_UNITS = {"sm_80": r"mma\.sync", "sm_90": r"wgmma\.mma_async", "gfx942": "v_mfma"}
CALLS = [(layout, op, m) for layout in (ROW, FBI, EVERYTHING) for op in ("fp16", "int8", "int1") for m in (1, 48, 2048)]
CALLS += [(ROW, "fp32", 16), (ONEBIT, "bf16", 8), (ROW, "int4", 12)]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Record kernels in place of launching them."""
    recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    for module in MODULES:
        monkeypatch.setattr(module, "launch", lambda kernel, grid, *args, **kw: recorded.append((kernel, args, kw)))
    return recorded


def use_device(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    for module in MODULES:
        if hasattr(module, "describe"):
            monkeypatch.setattr(module, "describe", lambda _: device)


def compile_for(target: GPUTarget, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Compile a launch as Triton's own launcher would have it compiled on ``target``."""
    backend = make_backend(target)
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        value = values[parameter.name]
        kind, key = "constexpr", None
        if not parameter.is_constexpr:
            special, align = not parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment
            kind, key = native_specialize_impl(type(backend), value, False, special, align)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(parameter.num,)] = value
        elif key:
            attributes[(parameter.num,)] = backend.parse_attr(key)
    chosen = {name: value for name, value in options.items() if name in ("num_warps", "num_stages")}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=chosen)


def call(name: str, x: Tensor, w: BinaryWeight, bits: int) -> None:
    if name == "sign_gemm":
        rest = (w.scale, w.in_scale, w.in_shift, w.group_shift, w.bias, w.group_size, w.norm_eps)
        OPS[name](x, w.signs, w.in_features, *rest)
    elif name == "pack_activations":
        OPS[name](*pack_arguments(x, w, bits, 0))
    else:
        m, words, groups = x.shape[0], w.signs.shape[-1], 1 if w.scale is None else w.scale.shape[-1]
        planes = torch.zeros(m, bits, words, dtype=torch.int32).view(torch.uint32)
        sums = torch.zeros(m, groups, dtype=torch.int32)
        OPS[name](*popcount_arguments((planes, torch.zeros(m, 1), sums, torch.zeros(m, 1)), w, 0, x.dtype))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("layout", "activations", "m"), CALLS)
def test_kernels_compile(
    monkeypatch: pytest.MonkeyPatch, launches: list[Any], layout: WeightLayout, activations: str, m: int, target: str
) -> None:
    gpu, device = TARGETS[target]
    use_device(monkeypatch, device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(activations, torch.float16)
    x, weight = make(m, 4096, 1024, layout, dtype, bias=True, seed=1, device="cpu")
    bits = int(activations[3:]) if activations.startswith("int") else 0
    for name in ("pack_activations", "popcount_gemm") if bits else ("sign_gemm",):
        call(name, x, weight, bits)
    assert launches
    for kernel, args, options in launches:
        compiled = compile_for(gpu, kernel, args, options)
        assert compiled.metadata.shared <= device.shared
        assembly = compiled.asm["amdgcn" if gpu.backend == "hip" else "ptx"]
        if kernel.__name__.endswith("tiled"):
            assert re.search(MATRIX_UNITS[target], assembly), f"{kernel.__name__} multiplies without matrix units"
        if kernel.__name__ == "popcount_decode":
            assert re.search("v_bcnt_u32" if gpu.backend == "hip" else r"popc\.b32", assembly)
        if kernel.__name__ in ("scale_integers", "popcount_decode", "popcount_tiled"):
            # the products of the epilogue are rounded by themselves
            assert not re.search(r"fma\.rn\.f32|v_fma_f32|v_fmac_f32|v_mad_f32", assembly)


@pytest.mark.parametrize("target", TARGETS)
def test_pack_signs_compiles(launches: list[Any], target: str) -> None:
    OPS["pack_signs"](torch.randn(3, 100))
    for kernel, args, options in launches:
        gpu, device = TARGETS[target]
        assert compile_for(gpu, kernel, args, options).metadata.shared <= device.shared


@pytest.mark.parametrize("activations", ["fp16", "int8"])
def test_the_signs_of_tiles_stay_in_registers_on_hopper(
    monkeypatch: pytest.MonkeyPatch, launches: list[Any], activations: str
) -> None:
    gpu, device = TARGETS["sm_90"]
    use_device(monkeypatch, device)
    x, weight = make(2048, 4096, 4096, ROW, torch.float16, seed=1, device="cpu")
    call("popcount_gemm" if activations == "int8" else "sign_gemm", x, weight, 8)
    (kernel, args, options) = next(launch for launch in launches if launch[0].__name__.endswith("tiled"))
    compiled = compile_for(gpu, kernel, args, options)
    # the left operand of wgmma is a list of registers, not the descriptor of a tile in shared memory
    operands = re.findall(r"wgmma\.mma_async[^{]*\{[^}]*\},\s*(\S)", compiled.asm["ptx"])
    assert operands and set(operands) == {"{"}
    assert ".local " not in compiled.asm["ptx"]


# ------------------------------------------------------------------------------------------------ torch.compile
@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Let torch trace as on a Hopper GPU."""
    gpu, device = TARGETS["sm_90"]
    use_device(monkeypatch, device)
    monkeypatch.setattr(type(BACKENDS["triton"]), "gpu_failure", None)
    driver = SimpleNamespace(get_current_target=lambda: gpu, get_current_device=lambda: 0)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    return device


def trace(problem: GemmProblem, bits: int | None, symbolic: bool = False) -> tuple[torch.fx.GraphModule, ShapeEnv]:
    """Return the graph that a compiler is given of a binary layer and a ReLU behind it."""
    x, weight = problem.make(torch.float16)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    names, environment = list(weight.tensors()), mode.shape_env
    with mode:
        tensors = [torch.empty(t.shape, dtype=t.dtype, device="cuda:0") for t in weight.tensors().values()]
        m: Any = problem.m
        if symbolic:
            source = import_module("torch._dynamo.source").ConstantSource("m")
            symbol = environment.create_symbol(problem.m, source=source, dynamic_dim=DimDynamic.DYNAMIC)
            m = environment.create_symintnode(symbol, hint=problem.m)
        tokens = torch.empty((m, problem.k), dtype=x.dtype, device="cuda:0")

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor]:
            w = BinaryWeight.from_tensors(dict(zip(names, tensors, strict=True)), problem.k, weight.layout)
            return (torch.relu(ops.apply_weight(x, w, bits, 0)),)

    graph, _ = aot_export_module(Layer(), [tokens, *tensors], trace_joint=False)
    return graph, environment


def kernels_of(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("m", [1, 100])
def test_torch_compile_sees_inside(hopper: Device, monkeypatch: pytest.MonkeyPatch, m: int, bits: int | None) -> None:
    with use_backend("triton"):
        graph, _ = trace(GemmProblem("", m, 64, 512, EVERYTHING, bias=True), bits)
    nodes = kernels_of(graph)
    assert len(nodes) >= (2 if bits is None else 3)
    assert not [node for node in graph.graph.nodes if "bitinfer" in str(node.target)]
    for node in nodes:  # torch has understood that kernels write to nothing but what was allocated for it
        written = node.kwargs["tensors_to_clone"]
        assert written and not {"w_ptr", "x_ptr", "scale_ptr", "bias_ptr", "act_scale_ptr"} & set(written) - (
            {"scale_ptr"} if "planes_ptr" in written else set()
        )


def test_other_backends_stay_opaque(hopper: Device) -> None:
    with use_backend("reference"):
        graph, _ = trace(GemmProblem("", 3, 64, 512, LAYOUTS["row"]), None)
    assert not kernels_of(graph)
    assert [str(node.target) for node in graph.graph.nodes if "bitinfer" in str(node.target)] == [
        "bitinfer.sign_gemm.default"
    ]


@pytest.mark.parametrize("bits", [None, 8])
def test_one_graph_for_a_range_of_tokens(hopper: Device, bits: int | None) -> None:
    with use_backend("triton"):
        graph, environment = trace(GemmProblem("", 100, 64, 512, ROW), bits, symbolic=True)
    assert kernels_of(graph)
    bounds = [str(guard.expr) for guard in environment.guards]
    assert any(bound.endswith("<= 128") for bound in bounds) and not any("Eq" in bound for bound in bounds), bounds
