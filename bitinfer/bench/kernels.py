"""Time the kernels of a device against their peers in the same run.

Weights rotate through more than the last cache, since a real model never finds a layer's weights there. Nothing is
timed before the same inputs gave the right result.
"""

from collections.abc import Callable, Sequence

import torch

from bitinfer.bench import cpu, cuda
from bitinfer.bench.machine import active_isa
from bitinfer.bench.report import SHAPES, BenchReport, wanted
from bitinfer.dispatch import BACKENDS
from bitinfer.errors import BackendError

DEFAULT_SHAPES = {
    "cpu": (*SHAPES["130m"], *SHAPES["1.3b"], *SHAPES["7b"]),
    "cuda": (*SHAPES["7b"], *SHAPES["7b-fused"], (8192, 8192)),
}
DEFAULT_TOKENS = {"cpu": (1, 4, 16, 64, 512), "cuda": (1, 16, 64, 256, 2048)}
OPS = {"cpu": cpu.OPS, "cuda": cuda.OPS}


def bench_kernels(
    shapes: Sequence[tuple[int, int]] | None = None,
    tokens: Sequence[int] | None = None,
    *,
    device: str = "cpu",
    only: Sequence[str] = (),
    threads: int | None = None,
    isa: str | None = None,
    seconds: float = 0.3,
    peers: Sequence[str] | None = None,
    peer_seconds: float = cuda.PEER_SECONDS,
    layout: str = "fbi",
    progress: Callable[[int, int, str], None] | None = None,
) -> BenchReport:
    """Measure every op at ``shapes`` and ``tokens``.

    Args:
        shapes: pairs ``(out_features, in_features)``; None for a selection that suits the device.
        tokens: rows M of the activations; None for a selection that suits the device.
        device: ``"cpu"`` or ``"cuda"``.
        only: ops (``sign_gemm``), activations (``int8``) or both (``"popcount_gemm int8"``) to measure; empty for all.
            Peers are measured beside any op but ``pack_signs``.
        threads: CPU only: threads of torch and of the kernels while this runs; None leaves them.
        isa: CPU only: the instruction set that the cpu backend must be using; ``BITINFER_CPU_ISA`` is what forces it,
            before the first op. None takes any.
        seconds: CPU only: how long to repeat each call (at least 7 calls).
        peers: which of :data:`bitinfer.bench.peers.PEERS` to measure on CUDA, ``"ggml"`` or nothing on a CPU; None for
            all that are installed. ``F.linear`` is always measured on a CPU.
        peer_seconds: CUDA only: how long each peer that compiles at run time may take in all.
        layout: CUDA only: the terms of the weight, a name of :data:`bitinfer.testing.problems.LAYOUTS`.
        progress: called with (measurements done, measurements in all, what runs next).

    Raises:
        BackendError: a kernel gave a wrong result, and nothing is reported; or the device has no kernels here; or the
            cpu backend uses another ``isa``.
        ValueError: an argument is out of range.
    """
    if device not in DEFAULT_SHAPES:
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}: there are kernels for no other")
    shapes = DEFAULT_SHAPES[device] if shapes is None else shapes
    tokens = DEFAULT_TOKENS[device] if tokens is None else tokens
    if not tokens or min(tokens) < 1:
        raise ValueError(f"tokens must be at least 1, got {list(tokens)}")
    for name in only:
        if not any(wanted(op, activations, [name]) for op, activations in OPS[device]):
            known = ", ".join(f"{op} {activations}" for op, activations in OPS[device])
            raise ValueError(f"ops: {name!r} names none of {known}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if device == "cuda":
        reason = BACKENDS["cuda"].unavailable()
        if reason is not None and BACKENDS["triton"].unavailable() is not None:
            raise BackendError(f"device 'cuda' has no kernels here: {reason}; see `bitinfer doctor`")
        return cuda.bench(shapes, tokens, only, peers, peer_seconds, layout, progress)
    for name in peers or ():
        if name != "ggml":
            raise ValueError(f"peers: {name!r} is not 'ggml', the only one besides torch on a CPU")
    active = active_isa()
    if isa is not None and active != isa:
        raise BackendError(
            f"isa={isa!r} was asked for, but {active or 'none'} is in use; "
            f"set BITINFER_CPU_ISA={isa} before the first op, and see `bitinfer doctor`"
        )
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        return cpu.bench(shapes, tokens, only, seconds, peers is None or "ggml" in peers, progress)
    finally:
        torch.set_num_threads(threads_before)
