"""The CUDA kernels under pytest-benchmark, for comparing commits: what ``bitinfer bench kernels --device cuda`` times.

    python -m pytest benchmarks/test_cuda_kernels.py --benchmark-autosave
    python -m pytest benchmarks/test_cuda_kernels.py --benchmark-compare

A round is one replay of a CUDA graph of many launches, each on the next cold weight; the time of a single launch, by
device events, stands in ``extra_info["launch_us"]``. ``BITINFER_BENCH_SHAPES`` and ``BITINFER_BENCH_TOKENS`` choose the
sizes.
"""

import os
import statistics

import pytest
import torch

from bitinfer.bench import parse_shapes, parse_tokens
from bitinfer.bench.cuda import OPS, capture, copies_of, gemm_cases, time_graph
from bitinfer.bench.machine import describe_gpu
from bitinfer.bench.peers import PEERS, peer_cases
from bitinfer.bench.report import Case
from bitinfer.dispatch import BACKENDS

REASON = BACKENDS["cuda"].unavailable()
if REASON is not None:
    pytest.skip(f"no CUDA kernels run here: {REASON}", allow_module_level=True)

SHAPES = parse_shapes(os.environ.get("BITINFER_BENCH_SHAPES", "4096x4096"))
TOKENS = parse_tokens(os.environ.get("BITINFER_BENCH_TOKENS", "1,16,2048"))


def time_case(benchmark, case: Case) -> None:
    case.check()
    times, launches = time_graph(case)
    with torch.inference_mode():
        graph, *_outputs = capture(case)

        def replay() -> None:
            graph.replay()
            torch.cuda.synchronize()

        benchmark.pedantic(replay, rounds=20, warmup_rounds=3)
    benchmark.group = f"{case.n} x {case.k}, M={case.m}"
    benchmark.extra_info.update(
        describe_gpu(), kernel=case.kernel, launches=launches, launch_us=statistics.median(times) * 1e6
    )


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("name", [f"{op} {activations}" for op, activations in OPS])
def test_op(benchmark, name, shape, m):
    (case,) = gemm_cases(*shape, [m], [name])
    time_case(benchmark, case)


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_dense(benchmark, shape, m):
    (case,) = peer_cases(PEERS["torch"], *shape, [m], copies_of, [])
    time_case(benchmark, case)
