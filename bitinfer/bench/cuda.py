"""Time each op on a GPU, against cuBLAS and other libraries, by device events around a CUDA graph of many launches.

Each launch meets the next weight of a rotation through more than the L2 cache, as the layers of a model do. A case is
checked first, whole outputs: against the float64 oracle for floating point activations, for equality with the reference
backend for integer ones; and the graph's own first and last output must equal those of a plain call.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bitinfer import ops
from bitinfer.backends.base import Problem
from bitinfer.backends.cuda import CUDABackend
from bitinfer.bench.machine import describe_gpu, gpu_read_bandwidth, l2_bytes
from bitinfer.bench.peers import JUST_IN_TIME, choose_peers, peer_cases
from bitinfer.bench.report import BenchReport, Case, Measurement, fill_ratios, to_measurement, wanted
from bitinfer.dispatch import BACKENDS, select
from bitinfer.errors import BackendError
from bitinfer.packing import WORD_BITS
from bitinfer.testing.oracle import exact_linear, fp_error_bound
from bitinfer.testing.problems import LAYOUTS
from bitinfer.weight import BinaryWeight

OPS = (
    ("sign_gemm", "fp16"),
    ("sign_gemm", "bf16"),
    *(("popcount_gemm", f"int{bits}") for bits in (8, 4, 2, 1)),
    ("binary_linear", "int8"),  # pack_activations and popcount_gemm
    ("pack_activations", "int8"),
)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
ROTATED_BYTES = 200 << 20
MAX_COPIES = 4096
PEER_SECONDS = 240.0
REPLAYS = 11


def bench(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    only: Sequence[str],
    peers: Sequence[str] | None,
    peer_seconds: float,
    layout: str,
    progress: Callable[[int, int, str], None] | None,
) -> BenchReport:
    """Measure; see :func:`bitinfer.bench.bench_kernels`."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    notes: list[str] = []
    chosen_peers = choose_peers(peers, notes)
    machine = {"device": "cuda", **describe_gpu(), "layout": layout, "seed": torch.seed()}  # other data in each run
    report = BenchReport(machine, gpu_read_bandwidth() / 1e9, notes=notes)
    ours = sum(wanted(op, activations, only) for op, activations in OPS)
    done, total = 0, len(shapes) * len(tokens) * (ours + sum(len(peer.activations) for peer in chosen_peers))
    spent = dict.fromkeys(JUST_IN_TIME, 0.0)
    for n, k in shapes:
        first = len(report.measurements)
        groups = [("", gemm_cases(n, k, tokens, only, layout))]
        groups += [(peer.op, peer_cases(peer, n, k, tokens, copies_of, notes)) for peer in chosen_peers]
        for op, cases in groups:
            if spent.get(op, 0.0) > peer_seconds:
                notes.append(f"{op} had its {peer_seconds:.0f} s before {n} x {k}")
                continue
            start = time.perf_counter()
            for case in cases:
                if progress is not None:
                    progress(done, total, f"{case.name}  {n} x {k}  M={case.m}")
                done += 1
                measurement = _measure_peer(case, report) if case.peer else measure(case, report.bandwidth_gb_per_s)
                if measurement is not None:
                    report.measurements.append(measurement)
                if op in spent and spent[op] + time.perf_counter() - start > peer_seconds:
                    notes.append(f"{op} had its {peer_seconds:.0f} s after {n} x {k} M={case.m}")
                    break
            if op in spent:
                spent[op] += time.perf_counter() - start
        fill_ratios(report.measurements[first:])
    if progress is not None:
        progress(total, total, "done")
    return report


def measure(case: Case, bandwidth_gb_per_s: float) -> Measurement:
    """Check a case, then time it."""
    case.check()
    times, launches = time_graph(case)
    return to_measurement(case, statistics.quantiles(times, n=4), len(times) * launches, bandwidth_gb_per_s)


def _measure_peer(case: Case, report: BenchReport) -> Measurement | None:
    try:
        return measure(case, report.bandwidth_gb_per_s)
    except Exception as error:  # another library's; it must not cost us the run
        text = (str(error).splitlines() or [""])[0][:200]
        report.notes.append(f"{case.name} {case.n} x {case.k} M={case.m}: {type(error).__name__}: {text}")
        return None


def gemm_cases(n: int, k: int, tokens: Sequence[int], only: Sequence[str], layout: str = "fbi") -> Iterator[Case]:
    """Yield our ops with packed weights ``[n, k]``, for each number of tokens."""
    chosen = [(op, activations) for op, activations in OPS if wanted(op, activations, only)]
    if not chosen:
        return
    weights = _packed_copies(n, k, layout)
    for m in tokens:
        x = torch.randn(m, k, device="cuda")
        for op, activations in chosen:
            if op == "sign_gemm":
                dtype = DTYPES[activations]
                # scales and shifts in the dtype of the activations, as a model has them
                yield _sign_case(x.to(dtype), [w.to(dtype) for w in weights], activations)
            else:
                yield _integer_case(op, x.half(), weights, int(activations.removeprefix("int")))


def copies_of(nbytes: int) -> int:
    """How many weights of ``nbytes`` to rotate through: twice the L2 cache and 200 MB, whatever is more."""
    return min(max(2, -(-max(2 * l2_bytes(), ROTATED_BYTES) // nbytes)), MAX_COPIES)


def launches_of(m: int, copies: int) -> int:
    """How many launches a graph has: enough for the graph's own start not to count.

    Whole rotations for few tokens, where the weights' bytes matter. Many tokens move more than the L2 cache holds
    between two uses of a weight anyway; there a graph stays short, because power limits clocks in long series.
    """
    if m > 512:
        return 20
    return -(-(200 if m <= 64 else 60) // copies) * copies


def capture(case: Case) -> tuple[torch.cuda.CUDAGraph, int, Any, Any]:
    """Record a graph of launches; return it, their number, and the outputs of its first and last one."""
    launches = launches_of(case.m, case.copies)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    # where capture wants the first calls, which may still allocate and compile, and which make each weight a known one
    with torch.cuda.stream(side):
        for i in range(min(case.copies, launches)):
            case.run(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    first = last = None
    with torch.cuda.graph(graph):
        for i in range(launches):
            last = case.run(i % case.copies)
            first = last if i == 0 else first
    return graph, launches, first, last


def time_graph(case: Case, replays: int = REPLAYS) -> tuple[list[float], int]:
    """Return the seconds of a launch, averaged over each replay of a graph, and how many launches that has."""
    with torch.inference_mode():
        graph, launches, first, last = capture(case)
        times = []
        for _ in range(replays + 2):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / launches)
        if not case.peer:
            _check_replay(case, first, case.run(0))
            _check_replay(case, last, case.run((launches - 1) % case.copies))
    return times[2:], launches


def _check_replay(case: Case, replayed: Any, plain: Any) -> None:
    for a, b in zip(_tensors(replayed), _tensors(plain), strict=True):
        if not torch.equal(a, b):
            raise BackendError(f"{case.name}: a CUDA graph gives other results at M={case.m} N={case.n} K={case.k}")


def _tensors(value: Any) -> list[Tensor]:
    tensors = [value] if isinstance(value, Tensor) else list(value)
    return [t.view(torch.int32) if t.dtype == torch.uint32 else t for t in tensors]


def _sign_case(x: Tensor, weights: list[BinaryWeight], activations: str) -> Case:
    first, (m, k) = weights[0], x.shape
    n, backend = first.out_features, select(_problem("sign_gemm", x, 0, weights[0])).name

    def run(i: int) -> Tensor:
        return ops.binary_linear(x, weights[i])

    def check() -> None:
        error = (run(0).double() - exact_linear(x, first)).abs().max().item()
        bound = fp_error_bound(x, first)
        if not error <= bound:
            raise BackendError(
                f"sign_gemm {activations}: error {error:.3g} against float64 exceeds {bound:.3g} at M={m} N={n} K={k}; "
                "nothing was timed"
            )

    kernel = _kernel("sign_gemm", m, first, 0)
    return Case("sign_gemm", activations, backend, m, n, k, first.signs.nbytes, len(weights), run, check, kernel)


def _integer_case(op: str, x: Tensor, weights: list[BinaryWeight], bits: int) -> Case:
    first, (m, k) = weights[0], x.shape
    n, backend = first.out_features, select(_problem(op, x, bits, first)).name
    packed = ops.pack_activations(
        x, bits, in_scale=first.in_scale, in_shift=first.in_shift, group_size=first.group_size
    )
    planes, scale, total, shift = packed
    act_shift = None if first.in_shift is None else shift

    def multiply(i: int) -> Tensor:
        w = weights[i]
        return torch.ops.bitinfer.popcount_gemm(planes, scale, total, act_shift, w.signs, *_rest(w, x.dtype))

    def linear(i: int) -> Tensor:
        return ops.binary_linear(x, weights[i], bits)

    def pack(i: int) -> Any:
        w = weights[i]
        return torch.ops.bitinfer.pack_activations(x, w.in_scale, w.in_shift, bits, 0, w.group_size)

    reference = BACKENDS["reference"]

    def check() -> None:
        expected = reference.pack_activations(x, first.in_scale, first.in_shift, bits, 0, first.group_size)
        right = all(torch.equal(a, b) for a, b in zip(_tensors(packed)[::2], _tensors(expected)[::2], strict=True))
        right &= all(torch.allclose(a, b, 1e-5, 1e-4) for a, b in zip(packed[1::2], expected[1::2], strict=True))
        if op != "pack_activations":
            product = reference.popcount_gemm(planes, scale, total, act_shift, first.signs, *_rest(first, x.dtype))
            tolerance = 0.0 if first.norm_eps is None else 2e-3
            right &= torch.allclose(run(0).float(), product.float(), rtol=tolerance, atol=tolerance)
        if not right:
            raise BackendError(
                f"{op} int{bits}: backend {backend!r} differs from the reference at M={m} N={n} K={k}; "
                "nothing was timed"
            )

    run = {"popcount_gemm": multiply, "binary_linear": linear, "pack_activations": pack}[op]
    moved = x.nbytes + planes.nbytes if op == "pack_activations" else first.signs.nbytes
    kernel = _kernel("pack_activations" if op == "pack_activations" else "popcount_gemm", m, first, bits)
    return Case(op, f"int{bits}", backend, m, n, k, moved, len(weights), run, check, kernel)


def _rest(weight: BinaryWeight, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of ``popcount_gemm`` that follow the sign words."""
    w = weight
    return w.in_features, w.scale, w.group_shift, w.bias, w.group_size, 0, w.norm_eps, dtype


def _problem(op: str, x: Tensor, bits: int, weight: BinaryWeight) -> Problem:
    op = "popcount_gemm" if op == "binary_linear" else op
    return Problem(op, "cuda", x.dtype, bits, x.shape[0], weight.out_features, x.shape[1], weight.planes)


def _kernel(op: str, m: int, weight: BinaryWeight, bits: int) -> str | None:
    backend = BACKENDS["cuda"]
    assert isinstance(backend, CUDABackend)
    if op == "pack_activations":
        return None
    return backend.kernel(op, m, weight.out_features, weight.in_features, bits, weight.group_size, weight.planes)


def _packed_copies(n: int, k: int, layout: str) -> list[BinaryWeight]:
    """Return weights of fresh random signs and scales, enough of them to rotate through more than the L2 cache."""
    shapes = LAYOUTS[layout].shapes(k, n)
    words = shapes.pop("weight")
    copies = copies_of(4 * torch.Size(words).numel())
    signs = torch.randint(-(1 << 31), 1 << 31, (copies, *words), dtype=torch.int32, device="cuda")
    if k % WORD_BITS:
        signs[..., -1] &= (1 << k % WORD_BITS) - 1
    tensors = {"weight": signs.view(torch.uint32)}
    for name, shape in shapes.items():
        noise = torch.randn(copies, *shape, device="cuda") * 0.5
        tensors[name] = (noise if name.endswith("shift") else noise + 1).half()
    return [
        BinaryWeight.from_tensors({name: t[i] for name, t in tensors.items()}, k, LAYOUTS[layout])
        for i in range(copies)
    ]
