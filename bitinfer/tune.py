"""Tune the Triton backend on request: time configurations of its kernels on this GPU, and keep the best in a cache.

Nothing here runs unless it is called: without it the backend uses a small table. The time is bounded; each product is
first timed as the table has it, so that what is kept is never slower than that in this run.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitinfer.errors import BackendError
from bitinfer.terminal import console, progress_bar

if TYPE_CHECKING:
    from bitinfer.backends.triton.configs import Config, Product
    from bitinfer.bench.report import Case

ACTIVATIONS = ("fp16", "bf16", "int8", "int4", "int2", "int1")
SHARED_BYTES = 200 << 10  # of a program; a device that has less refuses, and that configuration is passed over
THREAD_SUMS = 128  # accumulators that a thread may hold
Timer = Callable[["Config"], float]


@dataclass(frozen=True)
class Tuned:
    """A product: microseconds as the table has it, and with the best configuration that was found."""

    product: str
    before_us: float
    after_us: float
    config: dict[str, Any]
    tried: int


@dataclass(frozen=True)
class TuneReport:
    """What :func:`tune` found, where it was written, and the products that the time did not suffice for."""

    device: str
    path: Path
    products: list[Tuned]
    left_out: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return {**asdict(self), "path": str(self.path)}


def tune(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    activations: Sequence[str] = ("fp16", "int8"),
    *,
    seconds: float = 120.0,
    progress: Callable[[int, int, str], None] | None = None,
) -> TuneReport:
    """Time configurations for every combination, those nearest to the table's first, and write the best to the cache.

    Args:
        shapes: pairs ``(out_features, in_features)``.
        tokens: tokens M; each stands for all up to it, from the number tuned for before it.
        activations: of ``ACTIVATIONS``.
        seconds: for everything, shared evenly; a measurement that has begun is ended.
        progress: called with (products done, products in all, what runs next).

    Raises:
        BackendError: Triton cannot run here, or a configuration gave a wrong result; nothing is written.
        ValueError: an argument is out of range.
    """
    for name in activations:
        if name not in ACTIVATIONS:
            raise ValueError(f"activations: {name!r} is none of {', '.join(ACTIVATIONS)}")
    from bitinfer.dispatch import BACKENDS

    reason = BACKENDS["triton"].unavailable()
    if reason is not None:
        raise BackendError(f"there is nothing to tune: {reason}")
    import torch

    from bitinfer.backends.triton.configs import BUCKETS, Product, from_table
    from bitinfer.backends.triton.launch import INTERPRETED, describe
    from bitinfer.backends.triton.tuned import write_tuned

    if not tokens or not set(tokens) <= set(BUCKETS):
        raise ValueError(f"tokens must be some of {', '.join(map(str, BUCKETS))}, got {list(tokens)}")
    if INTERPRETED or not torch.cuda.is_available():
        raise BackendError("there is nothing to tune: timing needs a GPU that torch calls cuda")
    device = describe(torch.device("cuda", torch.cuda.current_device()))
    products = [Product(a, m, n, k) for n, k in shapes for a in activations for m in tokens]
    found: dict[str, Config] = {}
    rows: list[Tuned] = []
    end = time.monotonic() + seconds
    for done, product in enumerate(products):
        left = end - time.monotonic()
        if left <= 0:
            break
        if progress is not None:
            progress(done, len(products), product.key)
        table = from_table(product, device)
        best, row = search(product, table, timer_of(product), left / (len(products) - done))
        found[product.key] = best
        rows.append(row)
    return TuneReport(device.name, write_tuned(device.name, found), rows, [p.key for p in products[len(rows) :]])


def search(product: "Product", table: "Config", timer: Timer, seconds: float) -> tuple["Config", Tuned]:
    """Time ``table``, then its neighbours, until ``seconds`` have passed; return the fastest.

    A configuration that the device refuses is passed over; that it gives a wrong result is an error.
    """
    end = time.monotonic() + seconds
    before = timer(table)
    best, fastest, tried = table, before, 1
    for config in candidates(product, table):
        if time.monotonic() >= end:
            break
        try:
            spent = timer(config)
        except BackendError:
            raise
        except Exception:  # Triton's own: out of registers or of shared memory, or its compiler gave up
            continue
        tried += 1
        if spent < fastest:
            best, fastest = config, spent
    return best, Tuned(product.key, before * 1e6, fastest * 1e6, asdict(best), tried)


def candidates(product: "Product", table: "Config") -> Iterator["Config"]:
    """Yield the configurations worth a try, those that differ least from the table's first."""
    from bitinfer.backends.triton.configs import SMALLEST_DOT, Config, decode_takes

    found: list[Config] = []
    if decode_takes(product) and product.m <= 4 * SMALLEST_DOT:
        for rows, warps, unit in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8), (8, 16, 32)):
            if not product.bits or unit == 32:
                found.append(Config("decode", rows, 32 * warps * unit, warps=warps))
    width = 1 if product.bits else 2
    tiles = itertools.product((64, 128, 256), (16, 32, 64, 128, 256), (32, 64, 128, 256), (4, 8), (2, 3, 4, 5))
    for rows, tokens, columns, warps, stages in tiles if product.m > 1 else ():
        shared = stages * (tokens * columns * width + rows * columns // 8)
        few = rows * tokens <= THREAD_SUMS * 32 * warps and tokens <= max(SMALLEST_DOT, product.m)
        if few and shared <= SHARED_BYTES:
            found.append(Config("tiled", rows, columns, tokens, warps, stages))
    found.sort(key=lambda config: _distance(config, table))
    return iter(config for config in found if config != table)


def _distance(a: "Config", b: "Config") -> float:
    sizes = ("rows", "columns", "tokens", "warps", "stages")
    steps = sum(abs(math.log2(getattr(a, name) / getattr(b, name))) for name in sizes)
    return steps + (4.0 if a.kernel != b.kernel else 0.0)


def timer_of(product: "Product") -> Timer:
    """Return a function that checks a configuration and gives the seconds of a launch on cold weights."""
    import torch

    from bitinfer.backends.triton.configs import use_config
    from bitinfer.bench.cuda import DTYPES, gemm_cases, time_graph

    op = "popcount_gemm" if product.bits else "sign_gemm"
    assert product.bits or product.activations in DTYPES
    from bitinfer.dispatch import use_backend

    torch.manual_seed(0)
    with use_backend("triton"):
        cases = gemm_cases(product.n, product.k, [product.m], [f"{op} {product.activations}"], "row")
        case: Case = next(iter(cases))

    def seconds(config: "Config") -> float:
        with use_backend("triton"), use_config(config):
            case.check()
            times, _ = time_graph(case, replays=5)
        return sorted(times)[len(times) // 2]

    return seconds


def register(command: Callable[..., Any]) -> None:
    """Add the command to the command line."""
    command(
        "bitinfer tune --shapes 7b --tokens 1,16,256 --seconds 120",
        "bitinfer tune --shapes 4096x4096 --tokens 1..4096 --activations int8",
        name="tune",
    )(tune_command)


def tune_command(
    shapes: Annotated[
        str, typer.Option(help="130m, 1.3b, 7b, 7b-fused, or NxK (outputs x inputs); with commas.")
    ] = "7b",
    tokens: Annotated[str, typer.Option(help="Tokens M, powers of two with commas; 1..4096 doubles.")] = "1,8,64,2048",
    activations: Annotated[str, typer.Option(help="fp16, bf16, int8, int4, int2 or int1, with commas.")] = "fp16,int8",
    seconds: Annotated[float, typer.Option(min=1, help="How long all of it may take.")] = 120.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find the fastest tiles of the Triton kernels for some products on this GPU, and keep them in a cache.

    Without this the kernels use a table, and nothing is ever tuned on its own. BITINFER_TUNE_CACHE names another file.
    """
    import json

    from bitinfer.bench import parse_shapes, parse_tokens

    names = [part for part in map(str.strip, activations.split(",")) if part]
    with progress_bar("tuning") as progress:
        report = tune(parse_shapes(shapes), parse_tokens(tokens), names, seconds=seconds, progress=progress)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    out = console()
    for row in report.products:
        out.print(f"{row.product}: {row.before_us:.2f} us -> {row.after_us:.2f} us ({row.tried} tried)", soft_wrap=True)
    if report.left_out:
        out.print(f"no time was left for {', '.join(report.left_out)}: give more --seconds", soft_wrap=True)
    out.print(f"written to {report.path}", soft_wrap=True)
