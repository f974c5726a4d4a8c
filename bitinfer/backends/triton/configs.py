"""Which kernel runs a product, and with which tiles: a small table by device and number of tokens, and what fits it.

Nothing is tuned at import or on a first call. ``bitinfer tune`` (:mod:`bitinfer.tune`) measures on request, and what it
found comes before the table.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache

from bitinfer.backends.triton.launch import Device, ceil_div, power_of_two_from
from bitinfer.backends.triton.tuned import read_tuned

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # tokens that are tuned for
MOST = BUCKETS[-1]  # whatever has more is like it
SMALLEST_DOT = 16  # tokens of a tile of the matrix units
DECODE_TOKENS = 8  # of a program
MOST_SEGMENTS = 1024  # whose integers the decode kernel writes one by one
PLANED_SUMS, SEGMENTED_SUMS = 64, 32  # accumulators that a thread of the tiled kernels may hold twice
SPARE_SHARED = 2 << 10  # bytes that Triton may need beside the tiles
DECODE_SUMS = {"float": 64, "int": 32}  # accumulators that a thread of the decode kernels may hold
WORD = 32


@dataclass(frozen=True)
class Config:
    """How a kernel cuts up a product.

    Attributes:
        kernel: ``decode`` (no matrix units, weights read once) or ``tiled``.
        rows: of the weight, to a program.
        columns: to a step of a program; in the decode kernels all of its threads lie along them.
        tokens: to a program.
        warps: to a program.
        stages: of the software pipeline.
        splits: programs that share a row's columns; 0 for as many as keep the device busy.
    """

    kernel: str
    rows: int
    columns: int
    tokens: int = DECODE_TOKENS
    warps: int = 4
    stages: int = 1
    splits: int = 0


@dataclass(frozen=True)
class Product:
    """A product, as far as the choice of its configuration depends on it.

    ``activations`` is ``fp16``, ``bf16``, ``fp32``, or ``int8`` to ``int1``; ``m`` the :func:`size_class` of the
    tokens; ``segment`` the columns that share a scale, 0 for all of them; ``parts`` how many 16-bit numbers stand for
    one floating point activation in the matrix units.
    """

    activations: str
    m: int
    n: int
    k: int
    planes: int = 1
    segment: int = 0
    parts: int = 1

    @property
    def bits(self) -> int:
        """Bits of an integer activation; 0 for floating point ones."""
        return int(self.activations[3:]) if self.activations.startswith("int") else 0

    @property
    def key(self) -> str:
        """The name of its entry among the tuned ones."""
        return f"{self.activations} {self.n}x{self.k} M={next(b for b in BUCKETS if b >= self.m)}"


Rules = tuple[tuple[int, Config], ...]  # (most tokens, configuration), ascending

# What any GPU runs well enough: tiles that need at most 64 KiB of shared memory.
SAFE: dict[str, Rules] = {
    "fp": (
        (2, Config("decode", 8, 2048)),
        (8, Config("decode", 4, 1024)),
        (32, Config("tiled", 64, 64, 32, 4, 3)),
        (64, Config("tiled", 64, 64, 64, 4, 3)),
        (MOST, Config("tiled", 128, 32, 128, 8, 3)),
    ),
    "int": (
        (8, Config("decode", 4, 4096)),
        (32, Config("tiled", 64, 128, 32, 4, 3)),
        (64, Config("tiled", 64, 128, 64, 4, 3)),
        (MOST, Config("tiled", 128, 64, 128, 8, 3)),
    ),
}
# the fewer the bits, the longer popcounts keep up with the matrix units
SAFE["int4"] = SAFE["int2"] = ((16, Config("decode", 4, 4096)), *SAFE["int"][1:])
SAFE["int1"] = ((32, Config("decode", 4, 4096)), *SAFE["int"][2:])

HOPPER: dict[str, Rules] = {
    "fp": (
        *SAFE["fp"][:2],
        (16, Config("tiled", 64, 128, 16, 4, 4)),
        (32, Config("tiled", 64, 128, 32, 4, 4)),
        (64, Config("tiled", 64, 128, 64, 4, 4)),
        (128, Config("tiled", 128, 64, 128, 8, 4)),
        (MOST, Config("tiled", 128, 64, 256, 8, 4)),
    ),
    "int": (
        SAFE["int"][0],
        (16, Config("tiled", 64, 256, 16, 4, 4)),
        (32, Config("tiled", 64, 256, 32, 4, 4)),
        (64, Config("tiled", 64, 256, 64, 4, 4)),
        (128, Config("tiled", 128, 128, 128, 8, 4)),
        (MOST, Config("tiled", 128, 128, 256, 8, 4)),
    ),
}
CDNA: dict[str, Rules] = {
    "fp": (*SAFE["fp"][:2], (32, Config("tiled", 64, 64, 32, 4, 2)), (MOST, Config("tiled", 128, 64, 128, 8, 2))),
    "int": (SAFE["int"][0], (32, Config("tiled", 64, 128, 32, 4, 2)), (MOST, Config("tiled", 128, 128, 128, 8, 2))),
}
# a device's architecture, or how it begins -> its rules, before the safe ones
TABLES: dict[str, dict[str, Rules]] = {"90": HOPPER, "gfx9": CDNA}


_used: ContextVar[Config | None] = ContextVar("bitinfer_triton_config", default=None)


@contextmanager
def use_config(config: Config) -> Iterator[None]:
    """Run every product inside the ``with`` block as ``config`` says, cut down to what it needs and allows."""
    token = _used.set(config)
    try:
        yield
    finally:
        _used.reset(token)


def size_class(m: int) -> int:
    """Return the number that stands for ``m`` tokens where kernels are chosen: itself up to 8, else the next bucket.

    ``m`` may be symbolic: a graph then holds for the tokens of one class, not for one number of them.
    """
    return next((c for c in (*range(1, DECODE_TOKENS), *BUCKETS[3:]) if m <= c), MOST)


def choose(product: Product, device: Device) -> Config:
    """Return the configuration of ``product`` on ``device``: a tuned one, else the table's, and how many splits."""
    config = _used.get() or read_tuned(device.name).get(product.key) or from_table(product, device)
    return fit(config, product, device)


def from_table(product: Product, device: Device) -> Config:
    """Return the table's configuration, before anything is fitted."""
    kinds = (product.activations, "int" if product.bits else "fp")
    tables = (*(rules for arch, rules in TABLES.items() if device.arch.startswith(arch)), SAFE)
    rules = next(table[kind] for table in tables for kind in kinds if kind in table)
    return next(config for most, config in rules if product.m <= most)


@lru_cache(maxsize=4096)
def fit(config: Config, product: Product, device: Device) -> Config:
    """Return ``config`` cut down to what ``product`` needs and allows."""
    if config.kernel == "decode" and not decode_takes(product):
        config = Config("tiled", 64, 64, SMALLEST_DOT, 4, 2)
    if config.kernel == "decode":
        return _fit_decode(config, product, device)
    columns = min(config.columns, max(WORD, power_of_two_from(product.k)))
    if product.segment:
        columns = min(columns, product.segment & -product.segment)  # a step stays inside a segment
    tokens = config.tokens
    # two sets of accumulators: the product's, and a plane's, a segment's or, in float32, a step's
    if product.planes > 1 or product.segment or product.parts == 3:
        sums = SEGMENTED_SUMS if product.segment else PLANED_SUMS
        while tokens > SMALLEST_DOT and config.rows * tokens > sums * config.warps * device.lanes:
            tokens //= 2
    tokens = min(tokens, max(SMALLEST_DOT, power_of_two_from(product.m)))
    width = 1 if product.bits else 2 * product.parts
    stages = config.stages
    while stages * columns * (tokens * width + config.rows // 8) > device.shared - SPARE_SHARED and columns > WORD:
        if stages > 2:
            stages -= 1
        else:
            columns //= 2
    tiles = ceil_div(product.n, config.rows) * ceil_div(product.m, tokens)
    splits = config.splits
    if not splits:  # where tiles are too few for the device, but each split still has four steps
        splits = max(1, min(device.processors // tiles, product.k // (4 * columns)))
    if product.bits and product.segment:
        splits = 1  # segments follow each other in the accumulators
    return replace(
        config, columns=columns, tokens=tokens, stages=stages, splits=min(splits, ceil_div(product.k, columns) or 1)
    )


def decode_takes(product: Product) -> bool:
    """Return whether the op's decode kernel can run it: tokens in one chunk, or integers that share one segment."""
    if product.bits:
        segments = ceil_div(product.k, product.segment) if product.segment else 1
        return segments == 1 or (segments <= MOST_SEGMENTS and product.m <= DECODE_TOKENS)
    return product.m <= DECODE_TOKENS


def _fit_decode(config: Config, product: Product, device: Device) -> Config:
    tokens = min(product.m, DECODE_TOKENS)
    rows = config.rows
    sums = tokens * (product.planes if product.bits else 1)
    while rows > 1 and rows * sums > DECODE_SUMS["int" if product.bits else "float"]:
        rows //= 2
    threads = config.warps * device.lanes
    if product.bits:
        columns, length = threads * WORD, product.segment or product.k
    else:
        columns, length = threads * min(WORD, max(8, config.columns // threads)), product.k
    splits = config.splits
    if not splits:
        programs = ceil_div(product.n, rows) * (ceil_div(product.k, length) if length else 1)
        splits = max(1, 2 * device.processors // programs) if programs < device.processors else 1
    splits = max(1, min(splits, ceil_div(length, columns)))
    return replace(config, rows=rows, columns=columns, tokens=tokens, splits=splits)
