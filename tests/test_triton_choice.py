"""Which backend, kernel and tiles run a product: dispatch and doctor, the table, and what `bitinfer tune` writes."""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bitinfer import BackendError, doctor, tables, tune
from bitinfer.backends.base import Problem
from bitinfer.backends.triton import MAX_INTEGER_COLUMNS, TritonBackend, interpreted
from bitinfer.dispatch import BACKENDS, explain
from bitinfer.terminal import console

TRITON = BACKENDS["triton"]
GPU_PROBLEM = Problem("sign_gemm", "cuda", torch.float16, m=1, n=64, k=64)
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (pip install triton)")

if find_spec("triton") is not None:
    from bitinfer.backends.triton import configs, tuned
    from bitinfer.backends.triton.configs import BUCKETS, Config, Product
    from bitinfer.backends.triton.launch import Device

    H200 = Device("H200", "cuda", "90", 132, 32, 227 << 10)
    DEVICES = (
        H200,
        Device("A100", "cuda", "80", 108, 32, 163 << 10),
        Device("RTX 4090", "cuda", "89", 128, 32, 99 << 10),
        Device("MI300X", "hip", "gfx942", 304, 64),
        Device("RX 7900", "hip", "gfx1100", 96, 32),
        Device("Arc", "xpu", "", 32, 32),
    )
else:
    print("the choice of Triton configurations is not tested here: Triton is not installed (pip install triton)")


# ---------------------------------------------------------------------------------------------------------- backends
def test_the_order_of_backends() -> None:
    names = list(BACKENDS)
    assert names.index("cuda") < names.index("triton") < names.index("reference")
    assert names.index("cpu") < names.index("triton")  # CPU tensors go there in the interpreter alone


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Problem("sign_gemm", "mps", torch.float16), "cuda and xpu, not of mps"),
        (Problem("sign_gemm", "cuda", torch.float64), "float32, float16 and bfloat16"),
        (Problem("popcount_gemm", "cuda", torch.float16, 8, k=MAX_INTEGER_COLUMNS + 1), "at most 4194304 columns"),
    ],
)
def test_what_it_does_not_take(problem: Problem, reason: str) -> None:
    assert reason in str(TRITON.unsupported(problem))
    assert reason in str(explain(problem)["triton"])


def test_it_serves_gpus_without_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS["cuda"].__dict__, "library_failure", "no CUDA library: no nvcc was found")
    monkeypatch.setitem(TRITON.__dict__, "library_failure", None)
    monkeypatch.setattr(TritonBackend, "gpu_failure", None)
    reasons = explain(GPU_PROBLEM)
    assert reasons["cuda"] == "no CUDA library: no nvcc was found" and reasons["triton"] is None
    assert next(name for name, reason in reasons.items() if reason is None) == "triton"


@pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET is set")
def test_cpu_tensors_are_for_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("sign_gemm", "cpu", torch.float16, m=1, n=64, k=64)
    assert "not of cpu" in str(TRITON.unsupported(problem))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert TRITON.unsupported(problem) is None


@pytest.mark.parametrize(
    ("version", "reason"), [(None, "Triton is not installed (pip install triton)"), ("3.1.0", "Triton 3.1.0 is older")]
)
def test_why_triton_cannot_be_used(monkeypatch: pytest.MonkeyPatch, version: str | None, reason: str) -> None:
    import bitinfer.backends.triton as module

    if version is None:
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(module, "find_spec", lambda name: object())
        monkeypatch.setattr(module, "import_module", lambda name: type("Old", (), {"__version__": version}))
    assert TritonBackend().unavailable().startswith(reason)


def test_doctor_says_which_backend_runs_and_why() -> None:
    found = doctor.diagnose()
    assert next(n for n, reason in found.choices["cpu"].items() if reason is None) in ("cpu", "reference")
    found.choices["cuda"] = {"cuda": "no CUDA library: not built", "cpu": "no", "triton": None, "reference": None}
    out = console()
    with out.capture() as text:
        out.print(tables.diagnosis(found))
    shown = " ".join(text.get().replace("│", " ").split())
    assert "cuda triton; not cuda: no CUDA library: not built; not cpu: no" in shown


def test_importing_bitinfer_imports_no_triton_of_ours() -> None:
    code = "import sys, bitinfer; print([m for m in sys.modules if m.startswith('bitinfer.backends.triton.')])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


# ------------------------------------------------------------------------------------------------- configurations
@needs_triton
@pytest.mark.parametrize("activations", ["fp16", "bf16", "fp32", "int8", "int4", "int2", "int1"])
def test_configurations_fit_what_they_are_for(activations: str) -> None:
    parts = {"fp32": 3, "bf16": 2}.get(activations, 1)
    for device in DEVICES:
        for m in (*range(1, 18), 33, 100, 2048, 100_000):
            for n, k in ((1, 1), (4096, 4096), (11008, 4096), (5, 4_194_304)):
                for planes, segment in ((1, 0), (2, 0), (1, 32), (2, 96), (1, 256)):
                    if segment >= k:
                        continue
                    product = Product(activations, configs.size_class(m), n, k, planes, segment, parts)
                    config = configs.choose(product, device)
                    assert config.splits >= 1 and config.rows >= 1
                    if config.kernel == "decode":
                        assert configs.decode_takes(product) and config.tokens <= 8
                        assert config.columns // (config.warps * device.lanes) in (
                            (32,) if product.bits else (8, 16, 32)
                        )
                        continue
                    assert config.columns >= 32 and config.tokens >= 16
                    assert segment % config.columns == 0
                    assert config.splits == 1 or not (product.bits and segment)
                    width = 1 if product.bits else 2 * parts
                    fits = config.stages * config.columns * (config.tokens * width + config.rows // 8) <= device.shared
                    assert fits or config.columns == 32


@needs_triton
def test_size_classes_are_few_and_cover() -> None:
    assert [configs.size_class(m) for m in (1, 3, 7, 8, 9, 16, 17, 4096, 9999)] == [1, 3, 7, 8, 16, 16, 32, 4096, 4096]
    assert Product("int8", 3, 64, 96).key == "int8 64x96 M=4"
    assert len({configs.size_class(m) for m in range(1, 10_000)}) == 7 + len(BUCKETS) - 3


@needs_triton
def test_splits_fill_the_device_where_tiles_are_few() -> None:
    one = configs.choose(Product("fp16", 16, 4096, 4096), H200)
    assert one.kernel == "tiled" and one.splits == 2
    assert configs.choose(Product("fp16", 2048, 4096, 4096), H200).splits == 1
    assert configs.choose(Product("int8", 1, 256, 16384), H200).splits > 1


# ---------------------------------------------------------------------------------------------------------- tuning
@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "folder" / "tuned.json"
    monkeypatch.setenv("BITINFER_TUNE_CACHE", str(path))
    tuned.read_tuned.cache_clear()
    yield path
    tuned.read_tuned.cache_clear()


@needs_triton
def test_the_cache_comes_before_the_table(cache: Path) -> None:
    product, mine = Product("fp16", 64, 512, 1024), Config("tiled", 128, 32, 16, 2, 2, 1)
    table = configs.choose(product, H200)
    assert table != mine and tuned.write_tuned("H200", {product.key: mine}) == cache
    assert configs.choose(product, H200) == mine
    assert configs.choose(product, DEVICES[1]) == configs.fit(
        configs.from_table(product, DEVICES[1]), product, DEVICES[1]
    )
    other = Product("fp16", 64, 512, 2048)
    tuned.write_tuned("H200", {other.key: mine})  # adds
    tuned.write_tuned("A100", {product.key: table})
    assert set(tuned.read_tuned("H200")) == {product.key, other.key} and set(tuned.read_tuned("A100")) == {product.key}
    assert os.listdir(cache.parent) == [cache.name]  # no temporary file is left


@needs_triton
@pytest.mark.parametrize("change", [{"version": 0}, {"triton": "1.0"}, {"devices": {"H200": {"key": {"rows": 1}}}}])
def test_caches_of_other_versions_are_ignored(cache: Path, change: dict[str, object]) -> None:
    tuned.write_tuned("H200", {"key": Config("decode", 4, 4096)})
    assert tuned.read_tuned("H200")
    cache.write_text(json.dumps({**json.loads(cache.read_text()), **change}))
    tuned.read_tuned.cache_clear()
    assert tuned.read_tuned("H200") == {}
    for text in ("", "[]", "{", "null"):
        cache.write_text(text)
        tuned.read_tuned.cache_clear()
        assert tuned.read_tuned("H200") == {}


@needs_triton
def test_a_failed_write_leaves_the_cache_as_it_was(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.write_tuned("H200", {"key": Config("decode", 4, 4096)})
    before = cache.read_text()
    monkeypatch.setattr(tuned.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="disk is full"):
        tuned.write_tuned("H200", {"other": Config("decode", 8, 4096)})
    assert cache.read_text() == before and os.listdir(cache.parent) == [cache.name]


@needs_triton
@pytest.mark.parametrize("activations", ["fp16", "int8", "int1"])
def test_the_search_finds_the_fastest(activations: str) -> None:
    product = Product(activations, 16, 4096, 4096)
    table = configs.from_table(product, H200)
    around = list(tune.candidates(product, table))
    assert len(around) > 20 and len(set(around)) == len(around) and table not in around
    assert all(configs.fit(config, product, H200).kernel == config.kernel for config in around)
    wanted = around[7]

    def timer(config: Config) -> float:
        if config == around[3]:
            raise RuntimeError("out of resource: shared memory")
        return 1.0 if config == wanted else 2.0

    best, row = tune.search(product, table, timer, seconds=60)
    assert best == wanted and row.tried == len(around) and (row.before_us, row.after_us) == (2e6, 1e6)


@needs_triton
def test_the_search_is_bounded_and_wrong_results_end_it() -> None:
    product = Product("fp16", 64, 4096, 4096)
    table = configs.from_table(product, H200)
    start = time.monotonic()
    best, row = tune.search(product, table, lambda config: time.sleep(0.05) or 1.0, seconds=0.2)
    assert time.monotonic() - start < 1.0 and row.tried <= 5 and best == table

    def wrong(config: Config) -> float:
        raise BackendError("differs from the reference")

    with pytest.raises(BackendError, match="differs"):
        tune.search(product, table, wrong, seconds=1)


@needs_triton
def test_tuning_all(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitinfer.backends.triton import launch

    monkeypatch.setattr(type(TRITON), "gpu_failure", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "describe", lambda device: H200)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(tune, "timer_of", lambda product: lambda config: time.sleep(0.01) or 1.0 / config.rows)
    report = tune.tune([(4096, 4096)], [1, 64], ["fp16", "int8"], seconds=1.0)
    assert [row.product for row in report.products] == [
        f"{a} 4096x4096 M={m}" for a in ("fp16", "int8") for m in (1, 64)
    ]
    assert not report.left_out and all(row.after_us <= row.before_us for row in report.products)
    assert tuned.read_tuned("H200")["fp16 4096x4096 M=64"].rows == report.products[1].config["rows"]
    assert json.loads(json.dumps(report.to_dict()))["device"] == "H200"
    late = tune.tune([(64, 64), (64, 128)], [1], ["fp16"], seconds=0.005)
    assert late.left_out == ["fp16 64x128 M=1"]


def test_tune_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRITON.__dict__, "library_failure", "Triton is not installed (pip install triton)")
    with pytest.raises(BackendError, match="nothing to tune: Triton is not installed"):
        tune.tune([(64, 64)], [1])
    with pytest.raises(ValueError, match="'int3' is none of"):
        tune.tune([(64, 64)], [1], ["int3"])


@needs_triton
def test_tune_takes_the_tokens_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonBackend, "gpu_failure", None)
    with pytest.raises(ValueError, match="tokens must be some of 1, 2, 4, 8"):
        tune.tune([(64, 64)], [3])
