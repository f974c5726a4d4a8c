"""Time each op on the CPU at the shapes of FBI-LLM, against ``F.linear`` in float32 and bfloat16 and against ggml.

Weights rotate through twice the last cache. Results are checked against the float64 oracle for floating point
activations, and for equality with the reference backend for integer ones. The calls for one shape and number of tokens
take turns, and memory is read beside each shape: a machine that slows down for a while slows all of them alike.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitinfer import huge_pages, ops
from bitinfer.backends.base import Problem
from bitinfer.bench import ggml
from bitinfer.bench.machine import cache_bytes, describe, read_bandwidth
from bitinfer.bench.report import BenchReport, Case, Measurement, fill_ratios, to_measurement, wanted
from bitinfer.dispatch import BACKENDS, select
from bitinfer.errors import BackendError
from bitinfer.packing import WORD_BITS, unpack_signs, words_per_row
from bitinfer.testing.oracle import exact_linear, fp_error_bound
from bitinfer.weight import BinaryWeight

MIN_CALLS, MAX_CALLS = 7, 10_000
MAX_COPIES = 20_000  # reached by matrices of a few kilobytes alone
CHECKED_ROWS = 64  # of a float64 product; the op computes every row
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
DENSE = (torch.float32, torch.bfloat16)
OPS = (
    ("sign_gemm", "fp32"),
    ("sign_gemm", "bf16"),
    *(("popcount_gemm", f"int{bits}") for bits in (8, 4, 2, 1)),
    ("pack_activations", "int8"),
    ("pack_signs", "fp32"),
)
GEMM_OPS = ("sign_gemm", "popcount_gemm", "pack_activations")
TURN = 0.03  # seconds of calls before the next case has its turn
SKIPPED = 2  # calls at the start of a turn: other libraries' threads may still be waiting for work


def bench(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    only: Sequence[str],
    seconds: float,
    peers: bool,
    progress: Callable[[int, int, str], None] | None,
) -> BenchReport:
    """Measure; see :func:`bitinfer.bench.bench_kernels`."""
    reason = ggml.missing() if peers else None
    report = BenchReport({"device": "cpu", **describe()}, 0.0, notes=[reason] if reason else [])
    with_ggml = peers and reason is None
    done, total = 0, sum(_count(k, tokens, only, with_ggml) for _, k in shapes)
    bandwidths = []
    for n, k in shapes:
        bandwidths.append(read_bandwidth() / 1e9)
        for cases in _groups(n, k, tokens, only, with_ggml):
            for i, case in enumerate(cases):
                if progress is not None:
                    progress(done + i, total, f"{case.name}  {n} x {k}  M={case.m}")
                case.check()
            rows = measure(cases, seconds, bandwidths[-1])
            fill_ratios(rows)
            report.measurements += rows
            done += len(rows)
    report.bandwidth_gb_per_s = statistics.median(bandwidths) if bandwidths else read_bandwidth() / 1e9
    if progress is not None:
        progress(total, total, "done")
    return report


def measure(cases: Sequence[Case], seconds: float, bandwidth_gb_per_s: float) -> list[Measurement]:
    """Time cases, which have been checked, in turns."""
    with torch.inference_mode():
        times = _time(cases, seconds)
    return [
        to_measurement(case, statistics.quantiles(seen, n=4), len(seen), bandwidth_gb_per_s)
        for case, seen in zip(cases, times, strict=True)
    ]


def gemm_cases(n: int, k: int, tokens: Sequence[int]) -> Iterator[Case]:
    """Yield the ops that multiply by a packed weight ``[n, k]`` laid out as FBI-LLM's, for each number of tokens."""
    weights = _packed_copies(n, k)
    for m in tokens:
        x32 = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        for dtype in (torch.float32, torch.bfloat16):
            x = x32.to(dtype)
            backend = select(Problem("sign_gemm", "cpu", dtype, m=m, n=n, k=k)).name

            def run(i: int, x: Tensor = x) -> Tensor:
                return ops.binary_linear(x, weights[i])

            def check(x: Tensor = x) -> None:
                _check_sign_gemm(x, weights[0])

            yield Case("sign_gemm", SHORT[dtype], backend, m, n, k, weights[0].nbytes, len(weights), run, check)
        for bits in (8, 4, 2, 1):
            yield from _integer_cases(x32, weights, bits)


def dense_cases(n: int, k: int, tokens: Sequence[int]) -> Iterator[Case]:
    """Yield ``F.linear`` with a dense ``[n, k]`` in float32 and bfloat16, for each number of tokens."""
    for dtype in DENSE:
        one = torch.randn(n, k, dtype=dtype)
        copies = one.repeat(cold_copies(one.nbytes), 1, 1)
        for m in tokens:
            x = torch.randn(m, k, dtype=dtype)

            def run(i: int, x: Tensor = x, copies: Tensor = copies) -> Tensor:
                return F.linear(x, copies[i])

            yield Case(
                "F.linear", SHORT[dtype], "torch", m, n, k, one.nbytes, len(copies), run, lambda: None, peer=True
            )


def pack_case(n: int, k: int) -> Case:
    """Return the packing of a dense float32 ``[n, k]``; its bytes are those read and those written."""
    one = torch.randn(n, k)
    copies = one.repeat(cold_copies(one.nbytes), 1, 1)
    backend = select(Problem("pack_signs", "cpu", torch.float32)).name

    def check() -> None:
        expected = torch.where(one < 0, -1.0, 1.0)
        if not torch.equal(unpack_signs(ops.pack_signs(one), k), expected):
            raise BackendError(f"pack_signs: backend {backend!r} packed wrong bits at {n} x {k}; nothing was timed")

    moved = one.nbytes + 4 * n * words_per_row(k)
    return Case("pack_signs", "fp32", backend, 0, n, k, moved, len(copies), lambda i: ops.pack_signs(copies[i]), check)


def _groups(n: int, k: int, tokens: Sequence[int], only: Sequence[str], with_ggml: bool) -> Iterator[list[Case]]:
    """Yield the cases of a shape that are timed together: those of each number of tokens, and packing."""
    ours = [op for op, activations in OPS if op in GEMM_OPS and wanted(op, activations, only)]
    if ours:
        cases = [*gemm_cases(n, k, tokens), *dense_cases(n, k, tokens)]
        if with_ggml:
            cases += ggml.cases(n, k, tokens, cold_copies)
        for m in tokens:
            yield [case for case in cases if case.m == m and (case.peer or wanted(case.op, case.activations, only))]
        del cases
    if wanted("pack_signs", "fp32", only):
        yield [pack_case(n, k)]


def _count(k: int, tokens: Sequence[int], only: Sequence[str], with_ggml: bool) -> int:
    """How many measurements :func:`_groups` gives for a shape with K columns."""
    chosen = [op for op, activations in OPS if wanted(op, activations, only)]
    ours = sum(op in GEMM_OPS for op in chosen)
    peers = len(DENSE) + sum(with_ggml and k % block == 0 for block, _ in ggml.TYPES.values())
    return len(tokens) * (ours + peers) * (ours > 0) + chosen.count("pack_signs")


def _integer_cases(x: Tensor, weights: list[BinaryWeight], bits: int) -> Iterator[Case]:
    first, (m, k) = weights[0], x.shape
    n = first.out_features
    planes, scale, total, shift = ops.pack_activations(x, bits, in_scale=first.in_scale, in_shift=first.in_shift)
    backend = select(Problem("popcount_gemm", "cpu", x.dtype, bits, m=m, n=n, k=k)).name

    def run(i: int) -> Tensor:
        return ops.popcount_gemm(planes, scale, total, shift, weights[i].signs, k)

    def check() -> None:
        arguments = (planes, scale, total, shift, first.signs, k, None, None, None, 0, 0, None, torch.float32)
        if not torch.equal(run(0), BACKENDS["reference"].popcount_gemm(*arguments)):
            raise BackendError(
                f"popcount_gemm: backend {backend!r} differs from the reference at M={m} N={n} K={k} bits={bits}; "
                "nothing was timed"
            )

    yield Case("popcount_gemm", f"int{bits}", backend, m, n, k, first.signs.nbytes, len(weights), run, check)
    if bits == 8:
        backend = select(Problem("pack_activations", "cpu", x.dtype, bits, m=m, k=k)).name

        def pack(i: int) -> Any:
            return ops.pack_activations(x, bits, in_scale=first.in_scale, in_shift=first.in_shift)

        def check_pack() -> None:
            expected = BACKENDS["reference"].pack_activations(x, first.in_scale, first.in_shift, bits, 0, 0)
            if not torch.equal(pack(0)[0].view(torch.int32), expected[0].view(torch.int32)):
                raise BackendError(
                    f"pack_activations: backend {backend!r} differs from the reference at M={m} K={k}; "
                    "nothing was timed"
                )

        moved = x.nbytes + planes.nbytes
        yield Case("pack_activations", "int8", backend, m, n, k, moved, len(weights), pack, check_pack)


def _packed_copies(n: int, k: int) -> list[BinaryWeight]:
    words = words_per_row(k)
    generator = torch.Generator().manual_seed(0)
    copies = cold_copies(4 * n * words)
    signs = huge_pages.zeros((copies, n, words), torch.int32)  # where bitinfer.load puts them
    signs.random_(-(1 << 31), 1 << 31, generator=generator)
    if k % WORD_BITS:
        signs[..., -1] &= (1 << k % WORD_BITS) - 1
    in_scale, in_shift = torch.randn(2, 1, k, generator=generator)
    return [BinaryWeight(block.view(torch.uint32), k, in_scale=in_scale, in_shift=in_shift) for block in signs]


def cold_copies(nbytes: int) -> int:
    """Return how many weights of ``nbytes`` make twice the last cache; at least two, and no more than MAX_COPIES."""
    return min(max(2, -(-2 * cache_bytes() // nbytes)), MAX_COPIES)


def _check_sign_gemm(x: Tensor, weight: BinaryWeight) -> None:
    """Compare some rows with the float64 oracle: the first, the last and others between."""
    rows = torch.linspace(0, weight.out_features - 1, min(CHECKED_ROWS, weight.out_features)).long()
    signs = weight.signs.view(torch.int32)[rows].view(torch.uint32)
    part = BinaryWeight(signs, weight.in_features, in_scale=weight.in_scale, in_shift=weight.in_shift)
    error = (ops.binary_linear(x, weight)[:, rows].double() - exact_linear(x, part)).abs().max().item()
    bound = fp_error_bound(x, part)
    if not error <= bound:
        raise BackendError(
            f"sign_gemm: error {error:.3g} against float64 exceeds {bound:.3g} at M={x.shape[0]} "
            f"N={weight.out_features} K={weight.in_features} {x.dtype}; nothing was timed"
        )


def _time(cases: Sequence[Case], seconds: float) -> list[list[float]]:
    """Return the seconds of each call of each case; every call meets the next of the rotating weights."""
    times: list[list[float]] = [[] for _ in cases]
    calls = [0] * len(cases)
    waiting = list(range(len(cases)))
    while waiting:
        for c in waiting:
            turn: list[float] = []
            skipped = 0
            while not turn or (sum(turn) < min(TURN, seconds) and len(times[c]) + len(turn) < MAX_CALLS):
                start = time.perf_counter()
                cases[c].run(calls[c] % cases[c].copies)
                taken = time.perf_counter() - start
                calls[c] += 1
                if skipped < SKIPPED and taken < TURN:
                    skipped += 1
                else:
                    turn.append(taken)
            times[c] += turn
        waiting = [c for c in waiting if len(times[c]) < (MAX_CALLS if sum(times[c]) < seconds else MIN_CALLS)]
    return times
