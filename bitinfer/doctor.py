"""Say what was built, what runs on this machine and why not, and what to do about each thing that is missing."""

import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from typing import Any

import torch

from bitinfer import ops
from bitinfer.backends.base import Problem
from bitinfer.backends.cuda import LIBRARY, CUDABackend
from bitinfer.backends.triton import interpreted
from bitinfer.bench.machine import active_isa, device_name
from bitinfer.build_record import REBUILD, REBUILD_CUDA, read_build_record, reason_left_out
from bitinfer.dispatch import BACKENDS, explain, use_backend
from bitinfer.testing.oracle import exact_linear, fp_error_bound
from bitinfer.testing.problems import EVERYTHING, FBI, ONEBIT, GemmProblem

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "triton", "scikit-learn")
VARIABLES = {
    "BITINFER_BACKEND": "forces a backend",
    "BITINFER_CPU_ISA": "forces an instruction set of the cpu backend",
    "BITINFER_CUDA_KERNEL": "forces a kernel variant of the cuda backend",
    "BITINFER_DEBUG": "shows tracebacks",
    "BITINFER_TUNE_CACHE": "names the file of tuned Triton configurations",
    "OMP_NUM_THREADS": "sets the threads of torch and of the kernels",
    "TRITON_INTERPRET": "runs Triton kernels in its slow interpreter",
}
# where a backend is tested; others are a GPU's
DEVICES = {"cpu": ("cpu",), "reference": ("cpu", "cuda"), "triton": ("cpu",) if interpreted() else ("cuda",)}
SHOWN_KERNELS = (("sign_gemm", 0), ("popcount_gemm", 8), ("popcount_gemm", 1))  # op, bits of the activations
SHOWN_TOKENS = (1, 16, 64, 256, 2048)
SHOWN_SHAPE = (4096, 4096)  # outputs, inputs
SELF_TEST = (
    GemmProblem("fbi", 3, 37, 300, FBI),
    GemmProblem("onebit", 2, 65, 128, ONEBIT, bias=True),
    GemmProblem("everything", 2, 33, 200, EVERYTHING, bias=True),
)


@dataclass
class BackendState:
    """One backend: whether it runs here (``reason`` says why not), and what its self-test gave on each device."""

    name: str
    available: bool
    reason: str | None
    self_test: dict[str, str] = field(default_factory=dict)


@dataclass
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        install: ``full``, ``cpu only`` or ``pure python``.
        build: the record that the build wrote, or ``{}`` where there is none.
        libraries: name of a compiled part -> whether it is there and loads, in words that start with yes or no.
        versions: package -> version, None where it is not installed.
        machine: processor, cores, threads, GPUs.
        backends: in order of preference.
        choices: for each kind of device that is there, why each backend does not run its tensors, None where it can, in
            order of preference: the first that can is the one that runs.
        instruction_sets: those of the cpu backend in order of preference, ``{name, supported, reason}`` each.
        active_instruction_set: the one that runs, or None without compiled code.
        cuda_kernels: which variant serves 4096 x 4096 weights on the current GPU, by op and tokens:
            ``{op, activations, kernels: {tokens: name}}``; empty where no CUDA kernel runs.
        variables: environment variables that are set and change what runs.
        problems: what is wrong or missing, each with the next step: ``{problem, next_step, serious}``.
    """

    install: str
    build: dict[str, Any]
    libraries: dict[str, str]
    versions: dict[str, str | None]
    machine: dict[str, Any]
    backends: list[BackendState]
    choices: dict[str, dict[str, str | None]]
    instruction_sets: list[dict[str, Any]]
    active_instruction_set: str | None
    cuda_kernels: list[dict[str, Any]]
    variables: dict[str, str]
    problems: list[dict[str, Any]]

    @property
    def healthy(self) -> bool:
        """Whether nothing is broken; a missing optional part is no harm."""
        return not any(p["serious"] for p in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return {**asdict(self), "healthy": self.healthy}


def diagnose() -> Diagnosis:
    """Look at the installation and the machine, and run a tiny problem on every backend that is available."""
    build = read_build_record()
    problems: list[dict[str, Any]] = []

    def report(problem: str, next_step: str, serious: bool = False) -> None:
        problems.append({"problem": problem, "next_step": next_step, "serious": serious})

    native, sets, active = _instruction_sets(build, report)
    libraries = {
        "CPU kernels": _yes_or_no(_cpu_reason(build)),
        "numpy bindings": native,
        "CUDA kernels": _yes_or_no(_cuda_reason(build)),
    }
    cpu, cuda = (libraries[part].startswith("yes") for part in ("CPU kernels", "CUDA kernels"))
    _report_build(build, cpu, cuda, report)
    backends = [_check_backend(name, report) for name in BACKENDS]
    _report_versions(report)
    variables = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    _report_variables(variables, sets, report)
    return Diagnosis(
        install="pure python" if not cpu else "full" if cuda else "cpu only",
        build=build,
        libraries=libraries,
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        machine=_machine(),
        backends=backends,
        choices={device: explain(Problem("sign_gemm", device, torch.float16)) for device in _devices()},
        instruction_sets=sets,
        active_instruction_set=active,
        cuda_kernels=_cuda_kernels(report),
        variables=variables,
        problems=problems,
    )


def self_test(backend: str, device: str = "cpu") -> str | None:
    """Run tiny problems on a backend: float ones against the float64 oracle, integer ones against the reference.

    Returns:
        None when all is right, else what was wrong.
    """
    for problem in SELF_TEST:
        x, weight = problem.make(device=device)
        try:
            with use_backend(backend):
                error = (ops.binary_linear(x, weight).double() - exact_linear(x, weight)).abs().max().item()
                integers = ops.binary_linear(x, weight, act_bits=4)
            with use_backend("reference"):
                expected = ops.binary_linear(x, weight, act_bits=4)
        except Exception as failure:  # a broken library may raise anything
            return f"{problem.name}: {type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
        if not error <= fp_error_bound(x, weight):
            return f"{problem.name}: sign_gemm is off by {error:.3g} from the float64 product"
        # the norm sums in an order of its own; all else is fixed to the rounding
        tolerance = 0.0 if weight.norm_eps is None else 1e-5
        if not torch.allclose(integers, expected, rtol=tolerance, atol=tolerance):
            return f"{problem.name}: popcount_gemm differs from the reference"
    return None


def _check_backend(name: str, report: Callable[..., None]) -> BackendState:
    reason = BACKENDS[name].unavailable()
    state = BackendState(name, reason is None, reason)
    if reason is not None:
        return state
    for device in DEVICES.get(name, ("cuda",)):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the slow path is meant here
            failure = self_test(name, device)
        state.self_test[device] = "passed" if failure is None else f"failed: {failure}"
        if failure is not None:
            report(
                f"backend {name} on {device} fails its self-test ({failure})",
                f"rebuild it ({REBUILD}); until then BITINFER_BACKEND=reference runs without it",
                serious=True,
            )
    return state


def _devices() -> list[str]:
    return ["cpu", *(kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available())]


def _instruction_sets(
    build: dict[str, Any], report: Callable[..., None]
) -> tuple[str, list[dict[str, Any]], str | None]:
    try:
        native = import_module("bitinfer._native")
    except ImportError as error:
        if error.name == "bitinfer._native":
            active = active_isa()  # from the torch library, which there may be
            alone = [{"name": active, "supported": True, "reason": ""}] if active else []
            return f"no: {build.get('bindings_reason') or 'not built'}", alone, active
        report(f"bitinfer._native does not load: {error}", f"rebuild it: {REBUILD}", serious=True)
        return f"no: it does not load: {error}", [], None
    try:
        return "yes", list(native.isas()), native.active_isa()
    except (ValueError, RuntimeError) as error:  # an instruction set that is forced and not there
        report(str(error), "unset BITINFER_CPU_ISA, or set it to one that runs here", serious=True)
        return "yes", list(native.isas()), None


def _cpu_reason(build: dict[str, Any]) -> str | None:
    """Return why there are no CPU kernels, None if there are; the build knows better than the backend."""
    unavailable = BACKENDS["cpu"].unavailable()
    return unavailable and str(build.get("native_reason") or unavailable)


def _cuda_reason(build: dict[str, Any]) -> str | None:
    """Return why the CUDA library cannot be used under this torch, None if it can; there need be no GPU."""
    failure = _cuda().library_failure
    return failure if failure is None or LIBRARY.exists() else reason_left_out("cuda", build)


def _cuda() -> CUDABackend:
    backend = BACKENDS["cuda"]
    assert isinstance(backend, CUDABackend)
    return backend


def _cuda_kernels(report: Callable[..., None]) -> list[dict[str, Any]]:
    """Ask the CUDA library which of its kernels it would choose."""
    n, k = SHOWN_SHAPE
    rows: list[dict[str, Any]] = []
    for op, bits in SHOWN_KERNELS:
        try:
            kernels = {m: _cuda().kernel(op, m, n, k, bits) for m in SHOWN_TOKENS}
        except RuntimeError as error:  # a variant that is forced and cannot run it
            step = "unset BITINFER_CUDA_KERNEL, or set it to one that runs the problem"
            report(str(error).splitlines()[0], step, serious=True)
            continue
        if None not in kernels.values():
            rows.append({"op": op, "activations": f"int{bits}" if bits else "fp16", "kernels": kernels})
    return rows


def _report_build(build: dict[str, Any], cpu: bool, cuda: bool, report: Callable[..., None]) -> None:
    reason: str | None = build.get("native_reason")
    if not cpu and build.get("native"):
        report(
            f"the CPU kernels were built but do not load: {BACKENDS['cpu'].unavailable()}",
            f"rebuild against this torch: {REBUILD}",
            serious=True,
        )
    elif not cpu:
        if reason is None:  # no record: run from a source tree that was never built
            next_step = f"build them: {REBUILD}"
        elif "BITINFER_NO_NATIVE" in reason:
            next_step = f"build without that variable: BITINFER_NO_NATIVE=0 {REBUILD}"
        elif "compiler" in reason:
            next_step = f"install a C++ compiler (Debian: apt-get install g++), then run: {REBUILD}"
        else:
            next_step = f"mend that, then run: {REBUILD}"
        report(f"no CPU kernels: {reason or 'not built'}; the pure torch reference runs instead, slowly", next_step)
    _report_cuda(build, cuda, report)
    built_for = build.get("version")
    from bitinfer import __version__

    if built_for not in (None, __version__):
        report(
            f"the compiled libraries are of bitinfer {built_for}, the Python files of {__version__}",
            f"rebuild: {REBUILD}",
            serious=True,
        )


def _report_cuda(build: dict[str, Any], loads: bool, report: Callable[..., None]) -> None:
    gpu = torch.cuda.is_available()
    missing = _cuda_reason(build)
    if loads and gpu and _cuda().gpu_failure:
        report(f"the CUDA kernels cannot run: {_cuda().gpu_failure}", "keep models on the CPU, or hide that GPU")
    elif missing is None:
        return
    elif LIBRARY.exists() and torch.version.cuda is None:
        report(f"the CUDA kernels are {missing}", "to use a GPU install a torch with CUDA: https://pytorch.org")
    elif LIBRARY.exists():
        report(f"the CUDA kernels are {missing}", f"rebuild against this torch: {REBUILD}", serious=True)
    elif gpu:
        triton = BACKENDS["triton"].unavailable()
        instead = "until then Triton's kernels run" if triton is None else f"nor do Triton's kernels run: {triton}"
        report(f"torch sees a GPU but there are no CUDA kernels: {missing}", f"{REBUILD_CUDA}; {instead}")


def _report_versions(report: Callable[..., None]) -> None:
    for name, least, below in (("torch", (2, 10), None), ("transformers", (5, 17), (6,))):
        version = _version(name)
        if version is None:
            report(f"{name} is not installed", f"pip install {name}", serious=name == "torch")
            continue
        numbers = tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in version.split(".")[:2])
        if numbers < least or (below is not None and numbers >= below):
            wanted = f">={'.'.join(map(str, least))}" + (f",<{below[0]}" if below else "")
            report(f"{name} {version} is outside {wanted}", f'pip install "{name}{wanted}"', serious=True)
    if _version("scikit-learn") is None:
        report("scikit-learn is not installed: convert --method nmf needs it", "pip install scikit-learn")


def _report_variables(variables: dict[str, str], sets: list[dict[str, Any]], report: Callable[..., None]) -> None:
    backend = variables.get("BITINFER_BACKEND")
    if backend is not None:
        known = BACKENDS.get(backend)
        unknown = f"there is none of that name; known are {', '.join(BACKENDS)}"
        reason = unknown if known is None else known.unavailable()
        if reason:
            report(f"BITINFER_BACKEND={backend}, but {reason}", "unset BITINFER_BACKEND", serious=True)
        elif backend == "reference":
            report("BITINFER_BACKEND=reference forces the slow path", "unset BITINFER_BACKEND")
    isa = variables.get("BITINFER_CPU_ISA")
    if isa is not None and not sets:
        report(f"BITINFER_CPU_ISA={isa} has no effect without compiled kernels", "unset BITINFER_CPU_ISA")


def _machine() -> dict[str, Any]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "processor": device_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(count)],
    }


def _version(package: str) -> str | None:
    if package == "torch":
        return str(torch.__version__)  # with the kind of build, which its metadata may leave out
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _yes_or_no(reason: str | None) -> str:
    return "yes" if reason is None else f"no: {reason}"
