"""bench: results are checked before they are timed, weights are cold, and the figures follow from the times."""

import json
from itertools import pairwise

import pytest
import torch

from bitinfer.backends.reference import ReferenceBackend
from bitinfer.bench import SHAPES, bench_kernels, cpu, machine, parse_shapes, parse_tokens
from bitinfer.bench.report import Measurement, fill_ratios, wanted
from bitinfer.dispatch import BACKENDS, use_backend
from bitinfer.errors import BackendError


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """Pretend that caches are small, so that little memory holds cold weights."""
    monkeypatch.setattr(cpu, "cache_bytes", lambda: 1 << 16)
    monkeypatch.setattr(cpu, "read_bandwidth", lambda: 2e9)


def test_every_op_is_measured():
    seen = []
    report = bench_kernels([(40, 96), (33, 65)], [1, 3], seconds=0.001, progress=lambda *args: seen.append(args))
    kinds = {(row.op, row.activations, row.m) for row in report.measurements if row.n == 40}
    for m in (1, 3):
        assert {
            ("F.linear", "fp32", m),
            ("F.linear", "bf16", m),
            ("sign_gemm", "fp32", m),
            ("sign_gemm", "bf16", m),
        } <= kinds
        assert {("popcount_gemm", f"int{bits}", m) for bits in (8, 4, 2, 1)} <= kinds
        assert ("pack_activations", "int8", m) in kinds
    assert ("pack_signs", "fp32", 0) in kinds
    done, total = zip(*[(done, total) for done, total, _ in seen], strict=True)
    assert set(total) == {len(report.measurements)} and done[-1] == total[0]
    assert all(b - a == 1 for a, b in pairwise(done))
    assert json.loads(json.dumps(report.to_dict()))["machine"]["torch"] == torch.__version__


def test_figures_follow_from_the_times():
    report = bench_kernels([(64, 128)], [2], seconds=0.001, peers=[])
    dense = {row.activations: row.median_us for row in report.measurements if row.op == "F.linear"}
    for row in report.measurements:
        assert row.calls >= 7 and row.median_us > 0 and row.iqr_us >= 0
        assert row.gb_per_s == pytest.approx(row.weight_bytes / row.median_us / 1e3)
        assert row.bandwidth_share == pytest.approx(row.gb_per_s / 2)
        if row.op.endswith("_gemm"):
            assert row.ratios == {f"F.linear {a}": pytest.approx(us / row.median_us) for a, us in dense.items()}
            assert row.tops == pytest.approx(2 * 2 * 64 * 128 / row.median_us / 1e6)
            assert row.weight_bytes == 64 * 128 // 8 + (2 * 4 * 128 if row.op == "sign_gemm" else 0)
        else:
            assert row.ratios == {} and (row.tops is None) == row.op.startswith("pack")


def test_weights_are_cold():
    for case in (*cpu.gemm_cases(64, 128, [1]), *cpu.dense_cases(64, 128, [1]), cpu.pack_case(64, 128)):
        if case.op != "pack_activations":
            assert case.copies * case.weight_bytes >= 2 * (1 << 16)
    big = next(cpu.dense_cases(512, 512, [1]))
    assert big.copies == 2  # larger than the cache: two take turns


class WrongFloats(ReferenceBackend):
    name = "wrong-floats"

    def sign_gemm(self, *args):
        y = super().sign_gemm(*args)
        y[..., -1] += 1  # one row of the weight, and the last
        return y


class WrongIntegers(ReferenceBackend):
    name = "wrong-integers"

    def popcount_gemm(self, *args):
        return super().popcount_gemm(*args) * (1 + 1e-6)


class WrongPlanes(ReferenceBackend):
    name = "wrong-planes"

    def pack_activations(self, *args):
        planes, *rest = super().pack_activations(*args)
        return (planes.view(torch.int32) ^ 1).view(torch.uint32), *rest


class WrongSigns(ReferenceBackend):
    name = "wrong-signs"

    def pack_signs(self, weight):
        return super().pack_signs(-weight)


@pytest.mark.parametrize("backend", [WrongFloats, WrongIntegers, WrongPlanes, WrongSigns])
def test_wrong_results_are_never_timed(monkeypatch, backend):
    monkeypatch.setitem(BACKENDS, backend.name, backend())
    with use_backend(backend.name), pytest.raises(BackendError, match="nothing was timed"):
        bench_kernels([(40, 96)], [2], seconds=0.001)


def test_threads_are_set_and_given_back():
    before = torch.get_num_threads()
    assert bench_kernels([(32, 32)], [1], seconds=0.001, threads=1).machine["threads"] == 1
    assert torch.get_num_threads() == before


def test_shapes():
    assert parse_shapes("130m") == list(SHAPES["130m"])
    assert parse_shapes("7B, 8x64,4096x4096") == [*SHAPES["7b"], (8, 64)]
    for text in ("", ",", "13b", "8x", "8x0", "8x8x8", "-1x8"):
        with pytest.raises(ValueError, match="shapes:"):
            parse_shapes(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device must be 'cpu' or 'cuda', got 'tpu'"),
        ({"only": ["int8", "sign_gem"]}, "ops: 'sign_gem' names none of sign_gemm fp32, "),
        ({"tokens": []}, "tokens must be at least 1"),
        ({"tokens": [0]}, "tokens must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        bench_kernels([(8, 32)], **{"tokens": [1], **options})


def test_tokens():
    assert parse_tokens("1,16, 3") == [1, 16, 3]
    assert parse_tokens("1..4096") == [1 << i for i in range(13)]
    assert parse_tokens("3..20,6") == [3, 6, 12]
    for text in ("", "0", "1,x", "1..", "1..2..3", "-1", "1.5"):
        with pytest.raises(ValueError, match="tokens:"):
            parse_tokens(text)


def test_a_choice_of_ops():
    report = bench_kernels([(40, 96)], [1, 2], seconds=0.001, only=["sign_gemm", "popcount_gemm int4"])
    kinds = {(row.op, row.activations) for row in report.measurements}
    ours = {("sign_gemm", "fp32"), ("sign_gemm", "bf16"), ("popcount_gemm", "int4")}
    assert kinds == {("F.linear", "fp32"), ("F.linear", "bf16"), *ours}
    assert wanted("sign_gemm", "fp16", []) and wanted("a", "int8", ["int8"]) and not wanted("a", "int8", ["a int4"])


def test_ratios_compare_equal_numbers_of_tokens():
    def row(op, m, us):
        return Measurement(op, "fp16", "", m, 8, 32, 1, us, 0.0, 1, 1.0, 1.0)

    rows = [row("F.linear", 1, 6.0), row("F.linear", 2, 8.0), row("sign_gemm", 2, 2.0), row("pack_activations", 2, 1.0)]
    fill_ratios(rows)
    assert [r.ratios for r in rows] == [{}, {}, {"F.linear fp16": 4.0}, {}]


def test_another_instruction_set_is_refused():
    with pytest.raises(BackendError, match="isa='sse9' was asked for"):
        bench_kernels([(8, 32)], [1], isa="sse9")


def test_the_machine_is_described():
    assert machine.cache_bytes() >= 1 << 15
    assert 1e8 < machine.read_bandwidth() < 1e13
    described = machine.describe()
    assert described["device_name"] and described["bitinfer"] and described["isa"] in (None, machine.active_isa())


@pytest.mark.parametrize("kind", ["Q1_0", "TQ2_0"])
def test_the_file_that_llama_cpp_reads(kind, monkeypatch, tmp_path):
    gguf = pytest.importorskip("gguf")
    from bitinfer.bench import llama_cpp
    from bitinfer.testing import checkpoints

    monkeypatch.setitem(checkpoints.SHAPES, "tiny", (256, 512, 2, 4))
    llama_cpp.write_model(tmp_path / "tiny.gguf", "tiny", kind)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    assert len(tensors) == 3 + 2 * 9
    down = tensors["blk.1.ffn_down.weight"]
    assert down.tensor_type.name == kind and down.shape.tolist() == [512, 256]
    block, size = llama_cpp.TYPES[kind]
    assert down.n_bytes == 256 * 512 // block * size
    assert tensors["output.weight"].tensor_type.name == "F16"


def test_a_machine_without_llama_cpp_says_so(monkeypatch):
    from bitinfer.bench import bench_model, llama_cpp
    from bitinfer.testing import checkpoints

    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    monkeypatch.setitem(checkpoints.SHAPES, "tiny", (64, 176, 1, 4))
    report = bench_model("tiny", batches=(1,), prompts=(), context=4, new_tokens=2, act_bits=(8,))
    assert report.notes == ["llama.cpp is not measured: llama-cpp-python is not installed"]
    assert {row.model for row in report.measurements} == {"packed", "dense"}
