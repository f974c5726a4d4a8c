"""bench on CPUs: cases take turns, ggml's blocks are read as it reads them, what is missing is said."""

from pathlib import Path

import numpy as np
import pytest

from bitinfer.bench import bench_kernels, cpu, ggml
from bitinfer.bench.plot import plot
from bitinfer.bench.report import Case


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "cache_bytes", lambda: 1 << 16)
    monkeypatch.setattr(cpu, "read_bandwidth", lambda: 2e9)


def test_cases_take_turns() -> None:
    seen: list[str] = []

    def case(name: str) -> Case:
        return Case(name, "fp32", "none", 1, 1, 1, 1, 3, lambda i: seen.append(f"{name}{i}"), lambda: None)

    times = cpu._time([case("a"), case("b")], 0.0)
    assert [len(t) for t in times] == [cpu.MIN_CALLS] * 2
    turn = cpu.SKIPPED + 1
    assert "".join(seen[: 2 * turn]) == "a0a1a2b0b1b2"  # and each call the next of the weights
    assert seen[2 * turn] == "a0" and seen[-1].startswith("b")


@pytest.mark.parametrize("only", [[], ["sign_gemm"], ["int8"], ["pack_signs"], ["pack_activations", "fp32"]])
def test_what_is_counted_is_measured(only: list[str]) -> None:
    seen: list[tuple[int, int]] = []
    report = bench_kernels(
        [(32, 256), (8, 40)],
        [1, 2],
        only=only,
        seconds=0.001,
        progress=lambda done, total, _: seen.append((done, total)),
    )
    assert {total for _, total in seen} == {len(report.measurements)}
    assert [done for done, _ in seen] == list(range(len(report.measurements) + 1))


def test_a_missing_peer_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "find_spec", lambda name: None)
    assert bench_kernels([(8, 32)], [1], seconds=0.001).notes == [ggml.missing()]
    assert bench_kernels([(8, 32)], [1], seconds=0.001, peers=[]).notes == []
    with pytest.raises(ValueError, match="peers: 'gemlite' is not 'ggml'"):
        bench_kernels([(8, 32)], [1], peers=["gemlite"])


def test_ternary_blocks_are_read_as_gguf_reads_them() -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")  # which does not read Q1_0
    blocks = ggml._blocks("TQ2_0", 3, 512)
    expected = gguf.quants.dequantize(blocks.reshape(3, -1), gguf.GGMLQuantizationType.TQ2_0)
    signs = ggml._signs("TQ2_0", blocks)
    assert np.array_equal(signs.numpy(), expected) and set(signs.unique().tolist()) == {-1.0, 1.0}


def test_ggml_gives_the_product() -> None:
    if (reason := ggml.missing()) is not None:
        pytest.skip(reason)
    cases = list(ggml.cases(32, 512, [1, 5], lambda nbytes: 2))
    assert [(case.activations, case.m) for case in cases] == [(kind, m) for kind in ggml.TYPES for m in (1, 5)]
    for case in cases:
        case.check()
        case.run(1)
    assert not list(ggml.cases(32, 96, [1], lambda nbytes: 2))  # whole blocks alone


def test_a_roofline_of_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    report = bench_kernels([(32, 64)], [1, 2, 4], only=["sign_gemm"], seconds=0.001, peers=[])
    for sweeps, names in ((False, ["cpu-roofline.png"]), (True, ["cpu-sweep-32x64.png", "cpu-roofline.png"])):
        paths = plot(report.to_dict(), tmp_path, "cpu", sweeps)
        assert [path.name for path in paths] == names and all(path.exists() for path in paths)
