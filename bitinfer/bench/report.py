"""What the measurements of every device share: cases, results, and the words that choose shapes, tokens and ops."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# (out_features, in_features)
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "130m": ((768, 768), (2048, 768), (768, 2048)),  # attention, gate and up, down
    "1.3b": ((2048, 2048), (5632, 2048), (2048, 5632)),
    "7b": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "7b-fused": ((12288, 4096), (22016, 4096)),  # queries, keys and values; gate and up
}
MATRIX_OPS = ("sign_gemm", "popcount_gemm", "binary_linear")  # those that multiply by a packed weight


@dataclass
class Measurement:
    """One timed call.

    Attributes:
        op: name of the op, or of a peer: ``F.linear`` and others.
        activations: ``fp32``, ``bf16``, ``int8``, ...
        backend: what ran it; ``torch`` for ``F.linear``.
        m, n, k: tokens, output features, input features.
        calls: how many calls were timed.
        median_us, iqr_us: median and interquartile range of a call, microseconds; on a GPU, of the averages over a
            graph of calls.
        weight_bytes: what a call reads of the weight (and writes, for packing ops).
        gb_per_s: ``weight_bytes`` over the median, in 1e9 bytes per second.
        bandwidth_share: that over the memory bandwidth measured in this process.
        kernel: the variant that ran, where the backend tells.
        tops: 2 M N K over the median, in 1e12 operations per second; None for packing ops.
        ratios: how many times faster than each peer at the same shape; empty where there is no equal.
    """

    op: str
    activations: str
    backend: str
    m: int
    n: int
    k: int
    calls: int
    median_us: float
    iqr_us: float
    weight_bytes: int
    gb_per_s: float
    bandwidth_share: float
    kernel: str | None = None
    tops: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)


@dataclass
class BenchReport:
    """All measurements of a run, where it ran, and what could not be measured."""

    machine: dict[str, Any]
    bandwidth_gb_per_s: float
    measurements: list[Measurement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return asdict(self)


@dataclass
class Case:
    """A call to time: ``run(i)`` uses the i-th of ``copies`` weights; ``check()`` raises where the result is wrong."""

    op: str
    activations: str
    backend: str
    m: int
    n: int
    k: int
    weight_bytes: int
    copies: int
    run: Callable[[int], Any]
    check: Callable[[], None]
    kernel: str | None = None
    peer: bool = False

    @property
    def name(self) -> str:
        return f"{self.op} {self.activations}"


def to_measurement(case: Case, quarters: Sequence[float], calls: int, bandwidth_gb_per_s: float) -> Measurement:
    """Turn the quartiles of a call's seconds into a result."""
    speed = case.weight_bytes / quarters[1] / 1e9
    multiplies = case.peer or case.op in MATRIX_OPS
    return Measurement(
        case.op,
        case.activations,
        case.backend,
        case.m,
        case.n,
        case.k,
        calls,
        quarters[1] * 1e6,
        (quarters[2] - quarters[0]) * 1e6,
        case.weight_bytes,
        speed,
        speed / bandwidth_gb_per_s,
        case.kernel,
        2e-12 * case.m * case.n * case.k / quarters[1] if multiplies else None,
    )


def fill_ratios(measurements: Iterable[Measurement]) -> None:
    """Compare the ops of one shape with its peers, which are those rows that are no op of ours."""
    rows = list(measurements)
    ours = {*MATRIX_OPS, "pack_activations", "pack_signs"}
    peers = [row for row in rows if row.op not in ours]
    for row in rows:
        if row.op in MATRIX_OPS:
            row.ratios = {f"{p.op} {p.activations}": p.median_us / row.median_us for p in peers if p.m == row.m}


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """Read ``"130m,7b,4096x11008"``: names of :data:`SHAPES`, or ``NxK`` (outputs x inputs)."""
    shapes: list[tuple[int, int]] = []
    for part in filter(None, (p.strip().lower() for p in text.split(","))):
        if part in SHAPES:
            shapes += SHAPES[part]
            continue
        sizes = part.split("x")
        if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise ValueError(f"shapes: {part!r} is neither one of {', '.join(SHAPES)} nor NxK like 4096x11008")
        shapes.append((int(sizes[0]), int(sizes[1])))
    if not shapes:
        raise ValueError(f"shapes: give at least one of {', '.join(SHAPES)} or NxK like 4096x11008")
    return list(dict.fromkeys(shapes))


def parse_tokens(text: str) -> list[int]:
    """Read ``"1,16,64..512"``: numbers of tokens, and ranges in which each is twice the one before."""
    tokens: list[int] = []
    for part in (p.strip() for p in text.split(",")):
        ends = part.split("..")
        if len(ends) > 2 or not all(end.isdecimal() and int(end) > 0 for end in ends):
            raise ValueError(f"tokens: {part!r} is neither a number from 1 nor a range like 1..4096")
        m, last = int(ends[0]), int(ends[-1])
        while m <= last:
            tokens.append(m)
            m *= 2
    return list(dict.fromkeys(tokens))


def wanted(op: str, activations: str, only: Sequence[str]) -> bool:
    """Whether ``only`` names this op, its activations, or both as ``"popcount_gemm int8"``; nothing names all."""
    return not only or bool({op, activations, f"{op} {activations}"} & set(only))
