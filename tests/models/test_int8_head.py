"""A head whose rows are rounded to 8 bits: the op on every instruction set, and the models that use it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_models import llama, pack
from torch import nn

import bitinfer
from bitinfer import WeightLayout
from bitinfer.dispatch import BACKENDS
from bitinfer.doctor import diagnose
from bitinfer.int8_rows import RowsLinear, restore_rows, round_rows
from bitinfer.models import generation as loop
from bitinfer.verify import verify

REASON = BACKENDS["cpu"].unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
ISAS = ("scalar", "avx2", "avx512")
ULPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@pytest.mark.parametrize("dtype", ULPS, ids=str)
@pytest.mark.parametrize("m", [0, 1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize(("v", "k"), [(1, 1), (7, 15), (40, 31), (33, 64), (129, 100), (64, 768), (0, 8)])
def test_the_op_against_float64(m, v, k, dtype):
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    codes, scale = (
        round_rows(torch.randn(v, k, generator=generator)) if v else (torch.zeros(0, k).char(), torch.ones(0))
    )
    x = torch.randn(m, 2 * k, generator=generator).to(dtype)[:, :k]  # rows apart
    y = torch.ops.bitinfer_native.rows_linear(x, codes, scale.flatten())
    assert y.dtype == dtype and y.shape == (m, v)
    exact = x.double() @ (codes.double() * scale.double().reshape(-1, 1)).t()
    magnitude = x.double().abs() @ (codes.double().abs() * scale.double().reshape(-1, 1)).t()
    rounding, sums = ULPS[dtype] * exact.abs(), k * 2.0**-24 * magnitude  # of the result, and of float32 sums
    assert ((y.double() - exact).abs() <= rounding + sums).all()


@pytest.mark.parametrize("isa", ISAS)
def test_under_every_instruction_set(isa):
    if isa not in {row["name"] for row in diagnose().instruction_sets if row["supported"]}:
        print(f"this processor or build has no {isa}")
        pytest.skip(f"this processor or build has no {isa}")
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-k", "float64", __file__]
    environment = {**os.environ, "BITINFER_CPU_ISA": isa}
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent
    )
    assert run.returncode == 0 and "passed" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"codes": torch.zeros(4, 9).char()}, "codes must be"),
        ({"codes": torch.zeros(4, 8)}, "int8"),
        ({"scale": torch.ones(3)}, "scale must have 4"),
        ({"scale": torch.ones(4).half()}, "float32"),
        ({"x": torch.ones(2, 8).int()}, "float"),
    ],
)
def test_bad_arguments(change, says):
    arguments = {"x": torch.ones(2, 8), "codes": torch.zeros(4, 8).char(), "scale": torch.ones(4), **change}
    with pytest.raises(RuntimeError, match=says):
        torch.ops.bitinfer_native.rows_linear(*arguments.values())


def test_a_model_with_such_a_head():
    model = pack(llama(), WeightLayout(tensors=("in_scale",)))
    rounded = pack(llama(), WeightLayout(tensors=("in_scale",)))
    weight = rounded.lm_head.weight
    rounded.lm_head.weight = nn.Parameter(restore_rows(*round_rows(weight.detach())), requires_grad=False)
    ids = torch.arange(3, 11).reshape(1, -1)
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = rounded.generate(ids, **options)
    bitinfer.fuse(model, head_bits=8)
    assert isinstance(loop._decoders[model].head, RowsLinear)
    assert torch.equal(model.generate(ids, **options), expected)
    bitinfer.fuse(model)  # as it was
    assert not isinstance(loop._decoders[model].head, RowsLinear)


def test_what_cannot_be_rounded_says_why():
    model = pack(llama(), WeightLayout(tensors=("in_scale",)))
    with pytest.raises(ValueError, match="head_bits must be None or 8"):
        bitinfer.fuse(model, head_bits=4)
    model.lm_head = nn.Linear(96, 80, bias=True)
    with pytest.raises(ValueError, match="without a bias"):
        bitinfer.fuse(model, head_bits=8)


def test_verify_tells_what_it_costs():
    folder = bitinfer.embedded_model()
    exact, rounded = (verify(folder, folder, tokens=32, head_bits=bits) for bits in (None, 8))
    assert exact.passed and rounded.passed is None
    assert any("head is rounded" in note for note in rounded.notes)
    assert rounded.kl_mean < 1e-6  # this head is stored in 8 bits, and rounding it again changes nothing
    with pytest.raises(ValueError, match="head_bits"):
        verify(folder, folder, head_bits=2)
