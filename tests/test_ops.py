"""The ops on every backend that runs here: the oracle, exact integers, opcheck, torch.compile, clear errors."""

import os
import subprocess
import sys

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bitinfer import BackendError, checks, ops, registration, use_backend
from bitinfer.backends.base import Problem
from bitinfer.backends.reference import unpack_activations
from bitinfer.checks import ACT_BITS
from bitinfer.dispatch import BACKENDS, explain, select
from bitinfer.packing import pack_signs, unpack_signs
from bitinfer.testing.oracle import exact_linear, fp_error_bound
from bitinfer.testing.problems import EVERYTHING, FBI, GROUPS, PROBLEMS, ROW, GemmProblem

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def runnable(op: str = "sign_gemm") -> list[str]:
    reasons = explain(Problem(op, "cpu", torch.float32))
    for name, reason in reasons.items():
        if reason is not None:
            print(f"backend {name} does not run here: {reason}")
    return [name for name, reason in reasons.items() if reason is None]


BACKENDS_HERE = runnable()


@pytest.fixture(params=BACKENDS_HERE)
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_sign_gemm_meets_the_contract(backend, problem, dtype):
    x, weight = problem.make(dtype, seed=1)
    y = ops.binary_linear(x, weight)
    assert y.shape == (problem.m, problem.n) and y.dtype == dtype
    if y.numel():
        assert (y.double() - exact_linear(x, weight)).abs().max().item() <= fp_error_bound(x, weight)


def integers(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise one scale per token in plain Python floats, from the definition."""
    rows, scales = [], []
    for row in x.double().tolist():
        if bits == 1:
            rows.append([-1 if v < 0 else 1 for v in row])
            scales.append(sum(map(abs, row)) / len(row))
        else:
            highest = 2 ** (bits - 1) - 1
            absmax = max(map(abs, row))
            scales.append(absmax / highest)
            rows.append([round(v * highest / absmax) if absmax else 0 for v in row])
    return torch.tensor(rows), torch.tensor(scales)


@pytest.mark.parametrize("bits", ACT_BITS)
def test_quantisation_is_the_definition(backend, bits):
    x = torch.randn(6, 77)
    planes, scale, total, shift = ops.pack_activations(x, bits)
    assert planes.shape == (6, bits, 3) and planes.dtype == torch.uint32
    expected, scales = integers(x, bits)
    got = unpack_activations(planes, 77)
    # float32 against Python's float64: an exact tie may fall either way, so allow one step there and no more
    assert (got - expected).abs().max() <= 1 and (got != expected).sum() <= 1
    torch.testing.assert_close(scale.squeeze(-1).double(), scales.double(), rtol=1e-6, atol=0)
    assert torch.equal(total.squeeze(-1).long(), got.sum(-1))
    assert shift.shape == (6, 0)


@pytest.mark.parametrize("bits", ACT_BITS)
def test_planes_are_two_complement_bits(backend, bits):
    x = torch.randn(3, 45)
    planes, *_ = ops.pack_activations(x, bits)
    values = unpack_activations(planes, 45).tolist()
    words = planes.tolist()
    for m in range(3):
        for k in range(64):
            for b in range(bits):
                value = 0 if k >= 45 else (values[m][k] < 0 if bits == 1 else values[m][k] >> b & 1)
                assert words[m][b][k // 32] >> (k % 32) & 1 == int(value)


@pytest.mark.parametrize("block_size", [0, 256])
@pytest.mark.parametrize("bits", ACT_BITS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_popcount_gemm_is_exact(backend, problem, bits, block_size):
    """Against the same integers multiplied in float64 by the dequantised weight."""
    x, weight = problem.make(seed=2)
    args = (x, weight.in_scale, weight.in_shift, bits, block_size, weight.group_size)
    planes, scale, _, _ = torch.ops.bitinfer.pack_activations(*args)
    y = ops.binary_linear(x, weight, bits, block_size)
    if not y.numel():
        assert y.shape == (problem.m, problem.n)
        return
    z = unpack_activations(planes, problem.k).double()
    z = z * (scale.repeat_interleave(256, -1)[:, : problem.k] if block_size else scale).double()
    tensors = {n: t for n, t in weight.tensors().items() if n not in ("in_scale", "in_shift", "bias")}
    layout = type(weight.layout)(
        weight.planes, weight.group_size, tuple(n for n in weight.layout.tensors if n in tensors), None
    )
    a = z @ type(weight).from_tensors(tensors, problem.k, layout).to_dense(torch.float64).t()
    if weight.in_shift is not None:
        a = a + (x.double() * weight.in_shift.double()).sum(-1, keepdim=True)
    magnitude = a.abs().max().item()
    if weight.norm_eps is not None:
        a = torch.nn.functional.layer_norm(a, a.shape[-1:], eps=weight.norm_eps)
        magnitude = max(a.abs().max().item(), 1.0) * 10
    if weight.bias is not None:
        a = a + weight.bias.double()
    assert (y.double() - a).abs().max().item() <= 2e-6 * max(magnitude, 1e-3)


@pytest.mark.parametrize("name", [n for n in BACKENDS_HERE if n != "reference"])
@pytest.mark.parametrize("bits", ACT_BITS)
def test_integer_path_equals_the_reference_bit_for_bit(name, bits):
    for problem in PROBLEMS:
        for block_size in (0, 256):
            x, weight = problem.make(seed=3)
            with use_backend("reference"):
                expected = ops.binary_linear(x, weight, bits, block_size)
            with use_backend(name):
                y = ops.binary_linear(x, weight, bits, block_size)
            if weight.norm_eps is None:
                assert torch.equal(y, expected), (problem.name, block_size)
            else:
                torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_one_hot_singles_out_columns(backend):
    weight = torch.randn(37, 100)
    y = ops.sign_gemm(torch.eye(100), pack_signs(weight), 100)
    assert torch.equal(y, unpack_signs(pack_signs(weight), 100).t())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bits", [None, *ACT_BITS])
def test_non_finite_tokens_show_and_stay_apart(backend, bad, bits):
    x, weight = GemmProblem("f", 3, 9, 70, ROW).make()
    clean = ops.binary_linear(x, weight, bits)
    x[1, 13] = bad
    y = ops.binary_linear(x, weight, bits)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("bits", ACT_BITS)
def test_zero_tokens_give_zero(backend, bits):
    x, weight = GemmProblem("z", 2, 9, 70, ROW).make()
    x[1] = 0
    assert torch.equal(ops.binary_linear(x, weight, bits)[1], torch.zeros(9))


def test_leading_dimensions(backend):
    x, weight = GemmProblem("lead", 12, 5, 64, FBI).make()
    for bits in (None, 8):
        flat = ops.binary_linear(x, weight, bits)
        assert torch.equal(ops.binary_linear(x.view(2, 3, 2, 64), weight, bits), flat.view(2, 3, 2, 5))
        assert torch.equal(ops.binary_linear(x[0], weight, bits), ops.binary_linear(x[:1], weight, bits)[0])


def op_calls() -> dict[str, tuple]:
    x, w = GemmProblem("c", 3, 7, 320, EVERYTHING, bias=True).make()
    packed = torch.ops.bitinfer.pack_activations(x, w.in_scale, w.in_shift, 4, 256, 64)
    _, plain = GemmProblem("p", 3, 7, 320, GROUPS).make()
    act = torch.ops.bitinfer.pack_activations(x, None, None, 8, 0, 128)[:3]
    return {
        "pack_signs": (x,),
        "pack_activations": (x, w.in_scale, w.in_shift, 4, 256, 64),
        "sign_gemm": (x, w.signs, 320, w.scale, w.in_scale, w.in_shift, w.group_shift, w.bias, 64, 1e-5),
        "popcount_gemm": (*packed, w.signs, 320, w.scale, w.group_shift, w.bias, 64, 256, 1e-5, torch.bfloat16),
        "popcount_gemm, few": (*act, None, plain.signs, 320, plain.scale, None, None, 128, 0, None, torch.float32),
        "rms_norm_pack_activations": (x, x + 1, x[0], 1e-5, w.in_scale, w.in_shift, 4, 256, 64),
        "rms_norm_pack_activations, few": (x, None, x[0], 1e-5, None, None, 8, 0, 0),
        "silu_mul_pack_activations": (x, x + 1, w.in_scale, w.in_shift, 4, 256, 64),
    }


@pytest.mark.parametrize("name", op_calls())
def test_opcheck(backend, name):
    op = getattr(torch.ops.bitinfer, name.split(",")[0])
    torch.library.opcheck(op.default, op_calls()[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_in_front_is_that_of_transformers(backend, dtype):
    x, weight = GemmProblem("norm", 4, 9, 320, FBI).make(dtype)
    residual, norm = torch.randn_like(x), LlamaRMSNorm(320, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    options = {"in_scale": weight.in_scale, "in_shift": weight.in_shift}
    *packed, hidden = ops.rms_norm_pack_activations(x, norm.weight.data, 1e-5, 8, residual=residual, **options)
    assert torch.equal(hidden, x + residual)
    expected = ops.pack_activations(norm(hidden).detach(), 8, **options)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(packed[1:], expected[1:], strict=True))
    assert torch.equal(packed[0].view(torch.int32), expected[0].view(torch.int32))
    *packed, hidden = ops.rms_norm_pack_activations(x, norm.weight.data, 1e-5, 8)
    assert hidden.shape == (0,)
    assert torch.equal(packed[2], ops.pack_activations(norm(x).detach(), 8)[2])


def test_a_gate_in_front_is_that_of_transformers(backend):
    gate, up = torch.randn(2, 3, 320), torch.randn(2, 3, 320)
    packed = ops.silu_mul_pack_activations(gate, up, 8)
    expected = ops.pack_activations(torch.nn.functional.silu(gate) * up, 8)
    assert torch.equal(packed[0].view(torch.int32), expected[0].view(torch.int32))
    assert all(torch.equal(a, b) for a, b in zip(packed[1:], expected[1:], strict=True))


@pytest.mark.parametrize("bits", [None, 8, 1])
def test_compile_has_no_graph_break(backend, bits, compiler):
    _, weight = GemmProblem("c", 1, 7, 320, FBI).make()

    def run(x):
        return ops.binary_linear(torch.relu(x), weight, bits) + 1

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=compiler)
    for m in (3, 5):
        x = torch.randn(m, 320)
        torch.testing.assert_close(compiled(x), run(x))


FUSED_ERRORS = [
    ("rms_norm_pack_activations", TypeError, r"residual must have the dtype of x, torch.float32, got torch.float16",
     {1: torch.ones(3, 320).half()}),
    ("rms_norm_pack_activations", ValueError, r"residual must have shape \(3, 320\), got \(2, 320\)",
     {1: torch.ones(2, 320)}),
    ("rms_norm_pack_activations", ValueError, r"norm_weight must have shape \(320,\), got \(319,\)",
     {2: torch.ones(319)}),
    ("rms_norm_pack_activations", ValueError, "eps must be a finite number from 0, got -1.0", {3: -1.0}),
    ("rms_norm_pack_activations", ValueError, "bits must be one of", {6: 3}),
    ("silu_mul_pack_activations", TypeError, "gate must be float32, float16 or bfloat16", {0: torch.ones(320).int()}),
    ("silu_mul_pack_activations", ValueError, r"up must have shape \(3, 320\), got \(320,\)", {1: torch.ones(320)}),
    ("silu_mul_pack_activations", ValueError, "up is on meta", {1: torch.ones(3, 320).to("meta")}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "error", "match", "change"), FUSED_ERRORS)
def test_errors_of_the_fused_packers(name, error, match, change):
    with pytest.raises(error, match=name + ": .*" + match):
        getattr(torch.ops.bitinfer, name)(*(change.get(i, a) for i, a in enumerate(op_calls()[name])))


CALL = op_calls()["sign_gemm"]
POPCOUNT = op_calls()["popcount_gemm"]


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, r"weight has in_features=320 but x has last dimension 319 \(x.shape=\(3, 319\)\)",
         {0: torch.ones(3, 319)}),
        (TypeError, "x must be float32, float16 or bfloat16, got torch.float64", {0: torch.ones(3, 320).double()}),
        (TypeError, "weight must be torch.uint32 sign words", {1: CALL[1].view(torch.int32)}),
        (ValueError, r"weight must be \[N, 10\]", {1: CALL[1][..., :9]}),
        (ValueError, r"weight_scale must have shape \(2, 7, 5\), got \(7, 5\)", {3: CALL[3][0]}),
        (ValueError, r"in_scale must have shape \[1, 320\], got \(1, 1, 319\)", {4: CALL[4][..., 1:]}),
        (TypeError, "in_shift must be float32", {5: CALL[5].double()}),
        (ValueError, r"group_shift must have shape \(1, 7, 5\)", {6: CALL[6][..., 1:]}),
        (ValueError, r"bias must have shape \(7,\), got \(6,\)", {7: CALL[7][1:]}),
        (ValueError, "group_size must be 0 or a multiple of 32, got 40", {8: 40}),
        (ValueError, "norm_eps must be None or a finite number", {9: -1.0}),
        (ValueError, "bias is on meta but the activations are on cpu", {7: CALL[7].to("meta")}),
    ],
)  # fmt: skip
def test_sign_gemm_errors(error, match, change):
    with pytest.raises(error, match="sign_gemm: .*" + match):
        torch.ops.bitinfer.sign_gemm(*(change.get(i, a) for i, a in enumerate(CALL)))


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, r"planes must be \[..., bits, 10\]", {0: POPCOUNT[0][:, :3]}),
        (TypeError, "planes must be torch.uint32", {0: POPCOUNT[0].view(torch.int32)}),
        (ValueError, r"act_scale must have shape \(3, 2\), got \(3, 1\)", {1: POPCOUNT[1][:, :1]}),
        (TypeError, "act_sum must be torch.int32", {2: POPCOUNT[2].long()}),
        (ValueError, r"act_shift must have shape \(3, 1\)", {3: POPCOUNT[3][:, :0]}),
        (ValueError, "block_size must be 0 .one scale per token. or 256, got 128", {10: 128}),
        (TypeError, "dtype must be float32, float16 or bfloat16", {12: torch.float64}),
    ],
)
def test_popcount_gemm_errors(error, match, change):
    with pytest.raises(error, match="popcount_gemm: .*" + match):
        torch.ops.bitinfer.popcount_gemm(*(change.get(i, a) for i, a in enumerate(POPCOUNT)))


def changed(value, kind):
    """Yield what somebody might pass by mistake in place of an argument of a schema's type."""
    if isinstance(value, torch.Tensor):
        yield from (None, value.double(), value.to("meta"), value[:0], value[..., :-1], value.unsqueeze(0), value[0])
        yield from (
            value.new_zeros(()),
            value.new_zeros(*value.shape, 2),
            value.transpose(0, -1),
            value.view(torch.uint8),
        )
        yield torch.cat([value.view(torch.int32) if value.dtype == torch.uint32 else value] * 2).view(value.dtype)
        yield from (value.new_zeros(value.shape, dtype=dtype) for dtype in (*DTYPES, torch.int32, torch.uint32))
    elif isinstance(value, int):
        yield from (value + 1, value - 1, 2 * value, -value, 0, 32, 40, 96, 128, 1 << 40)
    elif isinstance(value, float) or "float" in kind:
        value = value or 1.0
        yield from (None, -value, 0.0, float("inf"), float("nan"))
    elif value is None:
        yield from (torch.ones(3, 1), torch.ones(7), torch.ones(1, 320), torch.ones(1, 320).half())
    else:
        yield from (torch.float32, torch.float16, torch.float64, torch.int32)


@pytest.mark.skipif("cpu" not in BACKENDS_HERE, reason="the compiled CPU library is not here")
@pytest.mark.parametrize("name", [name for name in op_calls() if name.split(",")[0] in registration.COMPILED])
def test_the_compiled_ops_refuse_what_the_checks_refuse(name):
    """Arguments on the CPU go to them unchecked; what they refuse is checked for an error with words."""
    op, arguments = name.split(",")[0], op_calls()[name]
    native, check = getattr(torch.ops.bitinfer_native, op), getattr(checks, f"check_{op}")
    refused = 0
    for i, argument in enumerate(arguments):
        for value in changed(argument, str(native.default._schema.arguments[i].type)):
            call = (*arguments[:i], value, *arguments[i + 1 :])
            try:
                check(*call)
            except (TypeError, ValueError, AttributeError, IndexError):
                refused += 1
                with pytest.raises(RuntimeError):
                    native(*call)
    assert refused >= 5


def test_pack_activations_errors():
    with pytest.raises(ValueError, match="bits must be one of"):
        ops.pack_activations(torch.ones(2, 3), 3)
    with pytest.raises(ValueError, match="block_size=256 and group_size=96 overlap unevenly"):
        ops.pack_activations(torch.ones(2, 300), 8, block_size=256, group_size=96)


def test_forced_backend_that_cannot_run_says_why(monkeypatch):
    with pytest.raises(BackendError, match=r"unknown backend 'gpu'; known are .*reference"), use_backend("gpu"):
        pass
    monkeypatch.setattr(type(BACKENDS["reference"]), "unsupported", lambda self, problem: "it is switched off")
    with (
        use_backend("reference"),
        pytest.raises(BackendError, match="sign_gemm: backend 'reference' cannot run here: it is switched off"),
    ):
        select(Problem("sign_gemm", "cpu", torch.float32, m=123457))


@pytest.mark.parametrize(
    "name, says", [("reference", "reference runs it"), ("nonsense", "BackendError: unknown backend 'nonsense'")]
)
def test_environment_forces_a_backend(name, says):
    program = """
import torch
from bitinfer.backends.base import Problem
from bitinfer.dispatch import select
print(select(Problem("sign_gemm", "cpu", torch.float32)).name, "runs it")
"""
    environment = {**os.environ, "BITINFER_BACKEND": name}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert says in result.stdout + result.stderr
