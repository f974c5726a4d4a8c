"""What a measurement needs to know about the machine: its caches, its memory bandwidth, its versions."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bitinfer.dispatch import BACKENDS

CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
ASSUMED_CACHE = 64 << 20  # where the machine does not say


def cache_bytes() -> int:
    """Return the size of the last cache before memory."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [text for path in CPU_CACHES.glob("index*/size") if (text := path.read_text().strip())]
    return max((int(text[:-1]) * units[text[-1]] for text in sizes if text[-1] in units), default=ASSUMED_CACHE)


def device_name() -> str:
    """Return the processor's own name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def read_bandwidth() -> float:
    """Measure how fast this process reads memory, in bytes per second: the fastest of a few torch reductions.

    The buffer is four times the last cache, so that nothing of it is found there.
    """
    buffer = torch.ones(max(4 * cache_bytes(), 256 << 20) // 4)
    matrix = buffer[: buffer.numel() // 4096 * 4096].view(-1, 4096)
    vector = torch.ones(4096)
    readers: list[Callable[[], object]] = [buffer.sum, buffer.amax, lambda: torch.mv(matrix, vector)]
    best = 0.0
    for reader in readers:
        reader()
        times = []
        for _ in range(7):
            start = time.perf_counter()
            reader()
            times.append(time.perf_counter() - start)
        best = max(best, buffer.nbytes / statistics.median(times))
    return best


def active_isa() -> str | None:
    """Return the instruction set that the cpu backend uses, or None without compiled kernels.

    Raises:
        RuntimeError: ``BITINFER_CPU_ISA`` names one that cannot be used. The message names those that can.
    """
    if BACKENDS["cpu"].unavailable() is not None:
        return None
    return str(torch.ops.bitinfer_native.cpu_isa())


def commit() -> str | None:
    """Return the commit of the source tree that this package runs from, or None when it was installed from a wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def describe() -> dict[str, str | int | float | None]:
    """Return what a reader needs to compare two reports, ready for JSON."""
    from bitinfer import __version__

    return {
        "device_name": device_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "isa": active_isa(),
        "cache_bytes": cache_bytes(),
        "bitinfer": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
