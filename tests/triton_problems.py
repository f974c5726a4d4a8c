"""What the tests of the Triton backend share: where its kernels run here, and kernels that are forced."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from bitinfer.backends.triton import TritonBackend, interpreted
from bitinfer.dispatch import BACKENDS
from bitinfer.testing.problems import PROBLEMS

TRITON, REFERENCE = BACKENDS["triton"], BACKENDS["reference"]
assert isinstance(TRITON, TritonBackend)
REASON = TRITON.unavailable()
INTERPRETED = interpreted()
DEVICE = "cpu" if INTERPRETED else "xpu" if torch.xpu.is_available() else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# rows, columns, tokens, warps, stages, splits; the interpreter's time goes with the number of programs
VARIANTS: dict[str, tuple[object, ...] | None] = {
    "decode": ("decode", 32, 1024, 8, 1),
    "decode split": ("decode", 32, 256, 8, 1, 1, 3),
    "tiled": ("tiled", 64, 128, 64, 4, 2),
    "tiled split": ("tiled", 64, 32, 32, 4, 3, 3),
    "chosen": None,
}


# the interpreter gets fewer tokens and outputs of the largest, still more than a tile of each
TRIMMED = [replace(p, m=min(p.m, 34), n=min(p.n, 130)) for p in PROBLEMS] if INTERPRETED else PROBLEMS


def require_kernels() -> None:
    """Skip the module that calls this, and say why, where no Triton kernel runs in this process."""
    if REASON is not None:
        reason = f"no Triton kernel runs in this process: {REASON}; see test_triton_interpreter.py"
        print(reason)
        pytest.skip(reason, allow_module_level=True)


def dtypes(index: int) -> tuple[torch.dtype, ...]:
    """Return the dtypes to try a problem in: all on a GPU, one after the other in the slow interpreter."""
    return (DTYPES[index % 3],) if INTERPRETED else DTYPES


@contextmanager
def forced(variant: str) -> Iterator[None]:
    """Run products by a kernel and tiles of our choice, as far as they fit; a kernel that cannot run is replaced."""
    values = VARIANTS[variant]
    if values is None:
        yield
        return
    configs = import_module("bitinfer.backends.triton.configs")
    with pytest.MonkeyPatch.context() as patch, configs.use_config(configs.Config(*values)):
        if INTERPRETED:  # has no registers to run out of
            patch.setattr(configs, "DECODE_SUMS", {"float": 1 << 20, "int": 1 << 20})
        yield
