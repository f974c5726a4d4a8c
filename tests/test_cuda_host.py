"""The CUDA backend without a GPU: why it is not available, and what doctor and the benchmark make of it."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitinfer import BackendError, doctor, ops, tables, use_backend
from bitinfer.backends import cuda as backend
from bitinfer.backends.base import Problem
from bitinfer.backends.cuda import MAX_INTEGER_COLUMNS, CUDABackend, _settled
from bitinfer.bench import BenchReport, Measurement, bench_kernels, peers
from bitinfer.bench import cuda as bench
from bitinfer.bench import plot as figures
from bitinfer.bench.report import fill_ratios
from bitinfer.build_record import read_build_record
from bitinfer.dispatch import BACKENDS, explain

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------------------------------------------------- the backend
def test_importing_and_computing_on_the_cpu_ask_nothing_of_a_gpu():
    code = """
import torch
def asked(*args): raise AssertionError("the GPU was asked about")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = asked
import bitinfer
from bitinfer import ops
for bits in (None, 8):
    bitinfer.BinaryLinear.from_linear(torch.nn.Linear(40, 3), act_bits=bits)(torch.ones(2, 40))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_it_comes_before_the_others():
    assert list(BACKENDS) == ["cuda", "cpu", "triton", "reference"]


def test_no_library(monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setattr(backend, "read_build_record", lambda: {"cuda_reason": "no nvcc was found when it was built"})
    reason = CUDABackend().unavailable()
    assert "no CUDA library: no nvcc was found when it was built" in reason and "BITINFER_CUDA=1 pip install" in reason


@pytest.mark.parametrize(
    ("cuda", "reason"),
    [(None, r"built, but torch \S+ has no CUDA"), ("13.0", "built, but it does not load under torch")],
)
def test_a_library_that_this_torch_cannot_load(monkeypatch, tmp_path, cuda, reason):
    (tmp_path / "broken.so").write_text("no library")
    monkeypatch.setattr(backend, "LIBRARY", tmp_path / "broken.so")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(CUDABackend().unavailable())


def with_gpus(monkeypatch, *capabilities) -> CUDABackend:
    """A backend whose library loads, on a machine with these GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {capabilities[index]}")
    made = CUDABackend()
    monkeypatch.setattr(made, "library_failure", None)
    return made


def test_gpus(monkeypatch):
    assert with_gpus(monkeypatch, (8, 0), (12, 0)).unavailable() is None
    assert "sees no GPU" in with_gpus(monkeypatch).unavailable()
    reason = with_gpus(monkeypatch, (9, 0), (7, 5)).unavailable()
    assert reason.startswith("GPU 1 (") and "capability 7.5, but 8.0 or later is needed" in reason


def test_problems_that_it_does_not_take():
    def reason(**changes):
        values = {"op": "popcount_gemm", "device": "cuda", "dtype": torch.float16, "bits": 8, "k": 64, **changes}
        return BACKENDS["cuda"].unsupported(Problem(**values))

    assert reason() is None and reason(k=MAX_INTEGER_COLUMNS) is None and reason(bits=0, k=1 << 23) is None
    assert "on CUDA tensors, not on cpu" in reason(device="cpu")
    assert "not torch.float64" in reason(dtype=torch.float64)
    assert "at most 4194304 columns, not 4194305" in reason(k=MAX_INTEGER_COLUMNS + 1)


def test_forcing_it_on_the_cpu_says_why_not():
    assert "not on cpu" in explain(Problem("sign_gemm", "cpu", torch.float32))["cuda"]
    with use_backend("cuda"), pytest.raises(BackendError, match="'cuda' cannot run here: it runs on CUDA tensors"):
        ops.pack_signs(torch.ones(1, 3))


# ------------------------------------------------------------------------------------------------- the build and doctor
def test_the_record_tells_whether_there_is_a_library():
    record = read_build_record()
    if not record:
        pytest.skip("this tree was not built")
    assert record["cuda"] == backend.LIBRARY.exists() and (record["cuda_reason"] is None) == record["cuda"]
    if record["native"] and shutil.which("nvcc") and "BITINFER_CUDA" not in str(record["cuda_reason"]):
        assert record["cuda"], f"nvcc is here, but: {record['cuda_reason']}"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Pretend what was built, what the backend says and whether torch sees a GPU; return doctor's findings."""

    def pretend(library: str | None, built: bool = True, gpu: bool = False, gpus: str | None = None, **record):
        path = tmp_path / "_C_cuda.abi3.so"
        if built:
            path.touch()
        cuda = BACKENDS["cuda"]
        monkeypatch.setattr(doctor, "LIBRARY", path)
        monkeypatch.setattr(doctor, "read_build_record", lambda: {"native": True, "cuda": built, **record})
        monkeypatch.setattr(BACKENDS["cpu"], "unavailable", lambda: None)
        monkeypatch.setattr(cuda, "library_failure", library)
        monkeypatch.setattr(cuda, "gpu_failure", gpus if gpu else "torch sees no GPU")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(doctor, "_check_backend", lambda name, report: doctor.BackendState(name, True, None))
        found = doctor.diagnose()
        return found, {p["problem"]: p for p in found.problems if "CUDA" in p["problem"]}

    return pretend


def test_doctor_where_all_is_well(machine):
    found, problems = machine(None, gpu=True)
    assert found.install == "full" and found.libraries["CUDA kernels"] == "yes" and not problems


def test_doctor_without_a_gpu(machine):
    found, problems = machine(None)
    assert found.install == "full" and not problems


def test_doctor_with_a_torch_without_cuda(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    found, problems = machine("built, but torch 2.13.0+cpu has no CUDA")
    assert found.install == "cpu only" and found.healthy
    assert found.libraries["CUDA kernels"] == "no: built, but torch 2.13.0+cpu has no CUDA"
    ((text, problem),) = problems.items()
    assert text == "the CUDA kernels are built, but torch 2.13.0+cpu has no CUDA"
    assert problem["next_step"].startswith("to use a GPU install a torch with CUDA")


def test_doctor_where_the_library_does_not_load(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found, problems = machine("built, but it does not load under torch 2.11: undefined symbol", gpu=True)
    ((text, problem),) = problems.items()
    assert not found.healthy and "undefined symbol" in text and problem["next_step"].startswith("rebuild against this")


def test_doctor_where_nothing_was_built(machine):
    found, problems = machine("no CUDA library", built=False, gpu=True, cuda_reason="no nvcc was found")
    assert found.install == "cpu only" and found.libraries["CUDA kernels"] == "no: no nvcc was found"
    assert problems["torch sees a GPU but there are no CUDA kernels: no nvcc was found"]["next_step"].startswith(
        "with nvcc on the PATH run: BITINFER_CUDA=1 pip install"
    )
    assert not machine("no CUDA library", built=False)[1]


def test_doctor_with_an_old_gpu(machine):
    _, problems = machine(None, gpu=True, gpus="GPU 0 (V100) has compute capability 7.0")
    assert list(problems) == ["the CUDA kernels cannot run: GPU 0 (V100) has compute capability 7.0"]


def test_doctor_shows_which_kernel_serves_what(machine, monkeypatch):
    monkeypatch.setattr(CUDABackend, "kernel", lambda self, op, m, *rest: "decode" if m < 64 else "wgmma")
    found, _ = machine(None, gpu=True)
    assert [row["op"] for row in found.cuda_kernels] == ["sign_gemm", "popcount_gemm", "popcount_gemm"]
    assert found.cuda_kernels[0]["kernels"] == {1: "decode", 16: "decode", 64: "wgmma", 256: "wgmma", 2048: "wgmma"}
    assert "CUDA kernels at 4096 x 4096" in printed(tables.diagnosis(found))


def test_doctor_with_a_forced_kernel_that_cannot_run(machine, monkeypatch):
    def refuse(*args):
        raise RuntimeError("BITINFER_CUDA_KERNEL=nonsense: there is no such kernel")

    monkeypatch.setattr(CUDABackend, "kernel", refuse)
    found, _ = machine(None, gpu=True)
    assert not found.healthy and found.cuda_kernels == []
    assert any("nonsense" in p["problem"] and "unset BITINFER_CUDA_KERNEL" in p["next_step"] for p in found.problems)


def printed(renderable) -> str:
    from rich.console import Console

    console = Console(width=250, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


# ------------------------------------------------------------------------------------------------------- the benchmark
def test_weights_rotate_through_more_than_the_cache(monkeypatch):
    monkeypatch.setattr(bench, "l2_bytes", lambda: 60 << 20)
    assert bench.copies_of(2 << 20) * (2 << 20) >= 200 << 20 and bench.copies_of(1 << 30) == 2
    monkeypatch.setattr(bench, "l2_bytes", lambda: 150 << 20)
    assert bench.copies_of(2 << 20) == 150 and bench.copies_of(64) == bench.MAX_COPIES
    for m in (1, 64, 256, 2048):
        for copies in (2, 19, 100, 4096):
            launches = bench.launches_of(m, copies)
            # many tokens move more than the cache holds between two uses of a weight, whole rotation or not
            assert launches >= 20 and (m > 512 or launches % copies == 0)


def test_peers_that_are_not_installed_are_noted(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "humming" else name)
    notes: list[str] = []
    assert [p.name for p in peers.choose_peers(None, notes)] == ["torch", "fp8", "triton", "gemlite"]
    assert notes == ["humming is not installed (pip install humming-kernels)"]
    assert [p.op for p in peers.choose_peers(["fp8"], notes)] == ["_scaled_mm"]
    with pytest.raises(ValueError, match="'cutlass' is none of torch, fp8"):
        peers.choose_peers(["cutlass"], notes)


def test_a_peer_that_fails_is_noted(monkeypatch):
    notes: list[str] = []
    cases = list(peers.peer_cases(peers.PEERS["fp8"], 40, 96, [1], lambda nbytes: 2, notes))
    assert cases == [] and "ValueError: it takes multiples of 16 alone" in notes[0]


@pytest.mark.skipif(BACKENDS["cuda"].unavailable() is None, reason="there are CUDA kernels here")
def test_no_benchmark_without_kernels():
    with pytest.raises(BackendError, match="device 'cuda' has no kernels here: "):
        bench_kernels(device="cuda")


def report() -> BenchReport:
    """A small report of a GPU, with the figures of no real one."""
    rows = []
    for m in (1, 16, 256, 2048):
        for op, activations, us in (("F.linear", "fp16", 13.0), ("gemlite", "fp16", 8.0)):
            rows.append(Measurement(op, activations, op, m, 4096, 4096, 2200, us + m / 20, 0.1, 1 << 25, 2e3, 0.5))
        for op, activations, us in (("popcount_gemm", "int8", 2.0), ("pack_activations", "int8", 1.5)):
            kernel = "decode" if m < 64 else "wgmma"
            row = Measurement(
                op, activations, "cuda", m, 4096, 4096, 2200, us + m / 40, 0.01, 1 << 21, 1e3, 0.25, kernel
            )
            rows.append(row)
    for row in rows:
        row.tops = None if row.op == "pack_activations" else 2e-6 * row.m * row.n * row.k / row.median_us
    fill_ratios(rows)
    machine = dict.fromkeys(("python", "bitinfer", "commit", "humming-kernels", "forced_kernel"))
    machine |= {"device": "cuda", "device_name": "NVIDIA H200", "driver": "580", "cuda": "13.0", "torch": "2.11"}
    machine |= {"triton": "3.6", "gemlite": "0.6", "layout": "fbi", "load": 0.1, "cores": 16, "threads": 8}
    machine["peak_tops"] = {"int8": 1940.0, "fp16": 970.0}
    return BenchReport(machine, 4500.0, rows, ["humming is not installed"])


def test_the_table_of_a_gpu():
    text = printed(tables.benchmark(report()))
    for expected in ("NVIDIA H200, driver 580, CUDA 13.0", "decode", "x fp16", "x gemlite", "TOPS", "humming is not"):
        assert expected in text


def page_writer():
    spec = importlib.util.spec_from_file_location("report_page", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_performance_page_of_a_gpu(tmp_path):
    result = json.loads(json.dumps(report().to_dict()))
    (tmp_path / "h200-roofline.png").touch()
    text = page_writer().gpu_section(result, "h200", tmp_path)
    assert text.startswith("## NVIDIA H200: h200\n") and "gemlite 0.6" in text and "- humming is not installed" in text
    assert "(../benchmarks/results/h200-roofline.png)" in text and "sweep" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("| `popcount_gemm` | int8 | 4096 x 4096 | 2048 |")]
    assert "| wgmma |" in line and line.count("|") == text.splitlines()[-1].count("|")


def test_the_figures_of_a_gpu(tmp_path):
    pytest.importorskip("matplotlib")
    result = report().to_dict()
    paths = figures.plot(result, tmp_path / "figures", "h200")
    assert [path.name for path in paths] == figures.figure_names(result, "h200")
    assert [path.name for path in paths] == ["h200-sweep-4096x4096.png", "h200-roofline.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)
    assert figures.intensity(result["measurements"][2]) == 16


def test_constants_settle_until_they_are_written_to():
    weight, bias = torch.zeros(3), torch.zeros(2)
    assert not _settled(weight, None, bias)
    assert _settled(weight, None, bias) and _settled(weight)
    bias.add_(1)
    assert not _settled(weight, bias)
    assert _settled(weight, bias) and not _settled(weight.clone())
    with torch.inference_mode():
        created = torch.zeros(1)
    assert not _settled(created) and not _settled(created)
