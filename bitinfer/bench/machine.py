"""What a measurement needs to know about the machine: its caches, its memory bandwidth, its versions."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bitinfer.dispatch import BACKENDS

CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
TORCH_ISA = {"oneDNN": "ONEDNN_MAX_CPU_ISA", "MKL": "MKL_ENABLE_INSTRUCTIONS"}  # variables that hold them back
ASSUMED_CACHE = 64 << 20  # where the machine does not say
READ_BYTES = 4 << 30  # of a GPU's memory, to measure how fast it is read
# 1e12 operations per second of the matrix units, measured by loops of one instruction: wgmma b1 AND.POPC over the bits
# of the activation for integers; wgmma fp16 and fp8
PEAK_TOPS = {
    "NVIDIA H200": {
        "int1": 15_525.0,
        "int2": 7_760.0,
        "int4": 3_880.0,
        "int8": 1_940.0,
        "fp8": 1_880.0,
        "fp16": 970.0,
        "bf16": 970.0,
    },
}


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
    """Return the commit of the source tree that this package runs from, or None when it was installed from a wheel.

    ``BITINFER_COMMIT`` says it for a copy of the tree that came without its history.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return os.environ.get("BITINFER_COMMIT") or None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def describe() -> dict[str, Any]:
    """Return what a reader needs to compare two reports, ready for JSON."""
    from bitinfer import __version__

    return {
        "device_name": device_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "isa": active_isa(),
        "torch_isa": {name: os.environ[key] for name, key in TORCH_ISA.items() if os.environ.get(key)},
        "cache_bytes": cache_bytes(),
        "bitinfer": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def l2_bytes() -> int:
    """Return the size of the current GPU's last cache."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def gpu_read_bandwidth() -> float:
    """Measure how fast the current GPU reads its memory, in bytes per second: the fastest of a few torch reductions."""
    free, _ = torch.cuda.mem_get_info()
    buffer = torch.ones(min(READ_BYTES, free // 2) // 4, device="cuda")
    half = buffer.view(torch.float16)
    readers: list[Callable[[], object]] = [buffer.sum, buffer.amax, half.amax]
    best = 0.0
    for reader in readers:
        times = []
        for _ in range(8):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            reader()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        best = max(best, buffer.nbytes / statistics.median(times[1:]))
    return best


def describe_gpu() -> dict[str, Any]:
    """Return what a reader needs to compare two reports of a GPU, ready for JSON."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    name = properties.name
    return {
        **describe(),
        "device_name": name,
        "processor": device_name(),
        "isa": None,
        "cache_bytes": l2_bytes(),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "forced_kernel": os.environ.get("BITINFER_CUDA_KERNEL") or None,
        "peak_tops": PEAK_TOPS.get(name, {}),
        **{name: installed(name) for name in ("triton", "gemlite", "humming-kernels")},
    }


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, or None where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(result.stdout.split()), None)


def installed(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
