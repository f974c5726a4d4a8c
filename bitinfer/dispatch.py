"""The choice of a backend for a problem, with the reason why each other one cannot run it.

:func:`use_backend` forces one, and so does ``BITINFER_BACKEND=<name>``, read at import; a forced backend that
cannot run is an error.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Any

import torch

from bitinfer.backends.base import Backend, Problem
from bitinfer.backends.cpu import CPUBackend
from bitinfer.backends.cuda import CUDABackend
from bitinfer.backends.reference import ReferenceBackend
from bitinfer.backends.triton import TritonBackend
from bitinfer.errors import BackendError

# In order of preference; the reference runs everything and comes last.
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (CUDABackend(), CPUBackend(), TritonBackend(), ReferenceBackend())
}

_COMPILED_CPU_OPS = torch.ops.bitinfer_native if BACKENDS["cpu"].unavailable() is None else None
_forced: ContextVar[str | None] = ContextVar(
    "bitinfer_forced_backend", default=os.environ.get("BITINFER_BACKEND") or None
)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force the backend ``name`` for every op called inside the ``with`` block.

    Raises:
        BackendError: there is no such backend. Whether it can run a problem shows when an op is called.
    """
    _known(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def explain(problem: Problem) -> dict[str, str | None]:
    """Return for every backend, in order of preference, why it cannot run ``problem``, or None if it can."""
    # unsupported() first: a problem on the CPU asks nothing of a GPU, which would start the driver in this process
    return {name: b.unsupported(problem) or b.unavailable() for name, b in BACKENDS.items()}


def select(problem: Problem) -> Backend:
    """Return the backend that runs ``problem``: the forced one, else the first that can.

    Raises:
        BackendError: the forced backend is unknown or cannot run the problem.
    """
    return _select(problem, _forced.get())


def compiled_cpu_ops() -> Any:
    """Return the namespace of the compiled CPU ops, None where they are missing or another backend is forced."""
    return None if _forced.get() else _COMPILED_CPU_OPS


@lru_cache(maxsize=4096)
def _select(problem: Problem, forced: str | None) -> Backend:
    reasons = explain(problem)
    able = [name for name, reason in reasons.items() if reason is None]
    if forced is not None:
        _known(forced)
        if forced not in able:
            raise BackendError(
                f"{problem.op}: backend {forced!r} cannot run here: {reasons[forced]}. These can: {', '.join(able)}"
            )
        return BACKENDS[forced]
    if able[0] == "reference":
        _warn_slow(problem.device)
    return BACKENDS[able[0]]


@cache
def _warn_slow(device: str) -> None:
    """Say once per device that only the slow path runs there, and why."""
    faster = explain(Problem("sign_gemm", device, torch.float32))
    reasons = "; ".join(
        f"{name}: {reason or 'it does not take this problem'}" for name, reason in faster.items() if name != "reference"
    )
    warnings.warn(
        f"bitinfer runs {device} tensors on the pure torch reference backend, which is slow ({reasons}). "
        "`bitinfer doctor` tells more.",
        stacklevel=2,
    )


def _known(name: str) -> None:
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; known are {', '.join(BACKENDS)}")
