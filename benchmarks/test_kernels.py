"""The CPU kernels under pytest-benchmark, for comparing commits: the cases of ``bitinfer bench kernels``.

    python -m pytest benchmarks --benchmark-autosave
    python -m pytest benchmarks --benchmark-compare

``BITINFER_BENCH_SHAPES`` (names or NxK, with commas) and ``BITINFER_BENCH_TOKENS`` choose the sizes, small by default,
and ``BITINFER_BENCH_THREADS`` (with commas) the threads, one and all by default; ``BITINFER_CPU_ISA`` forces an
instruction set. For all of FBI-LLM: ``BITINFER_BENCH_SHAPES=130m,1.3b,7b BITINFER_BENCH_TOKENS=1,4,16,64,512``.
Every case is checked before it is timed, and its weights rotate through more memory than the last cache.
"""

import os
from collections.abc import Iterator
from itertools import count

import pytest
import torch

from bitinfer.bench import ggml, parse_shapes
from bitinfer.bench.cpu import cold_copies, dense_cases, gemm_cases, pack_case
from bitinfer.bench.machine import describe
from bitinfer.bench.report import Case

SHAPES = parse_shapes(os.environ.get("BITINFER_BENCH_SHAPES", "768x768,2048x768"))
TOKENS = [int(m) for m in os.environ.get("BITINFER_BENCH_TOKENS", "1,16").split(",")]
ALL = torch.get_num_threads()
THREADS = sorted({int(t) for t in os.environ.get("BITINFER_BENCH_THREADS", f"1,{ALL}").split(",")})


@pytest.fixture(params=THREADS, ids=lambda threads: f"{threads}-threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(ALL)


def cases(n: int, k: int, m: int) -> Iterator[Case]:
    yield from dense_cases(n, k, [m])
    yield from gemm_cases(n, k, [m])
    if ggml.missing() is None:
        yield from ggml.cases(n, k, [m], cold_copies)


def time_case(benchmark, case: Case) -> None:
    case.check()
    turns = count()
    with torch.inference_mode():
        benchmark.pedantic(lambda: case.run(next(turns) % case.copies), rounds=50, warmup_rounds=3)
    benchmark.group = f"{case.n} x {case.k}, M={case.m}, {torch.get_num_threads()} threads"
    if benchmark.stats:  # none under --benchmark-disable
        gb_per_s = case.weight_bytes / benchmark.stats["median"] / 1e9
        benchmark.extra_info.update(describe(), backend=case.backend, weight_gb_per_s=gb_per_s)


NAMES = [
    "F.linear fp32",
    "F.linear bf16",
    "sign_gemm fp32",
    "sign_gemm bf16",
    "pack_activations int8",
    *(f"popcount_gemm int{bits}" for bits in (8, 4, 2, 1)),
    *(f"ggml {kind}" for kind in ggml.TYPES),
]


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("name", NAMES)
def test_gemm(benchmark, threads, name, shape, m):
    if name.startswith("ggml"):
        if (reason := ggml.missing()) is not None:
            pytest.skip(reason)
        if shape[1] % ggml.TYPES[name.split()[1]][0]:
            pytest.skip(f"K={shape[1]} is no multiple of a block of {name}")
    time_case(benchmark, next(case for case in cases(*shape, m) if case.name == name))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_pack_signs(benchmark, threads, shape):
    time_case(benchmark, pack_case(*shape))
