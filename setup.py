"""Build the compiled parts with CMake and ninja, or install without them and say why.

Metadata is in pyproject.toml. Environment variables: BITINFER_NO_NATIVE=1 leaves the compiled parts out,
BITINFER_REQUIRE_NATIVE=1 makes it an error if they cannot be built, BITINFER_CUDA=0|1 overrides the search for nvcc,
MAX_JOBS limits the compiler processes, CMAKE_ARGS is passed on.
"""

import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:  # without build isolation nobody else looks
    raise SystemExit(f'bitinfer: setuptools {setuptools.__version__} is too old: pip install "setuptools>=77"')
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent.resolve()
TORCH_MINIMUM = (2, 10)


def enabled(variable: str) -> bool:
    return os.environ.get(variable, "0").upper() not in ("", "0", "OFF", "NO", "FALSE")


def torch_version() -> str | None:
    # not imported: that takes seconds, and all we need is its folder
    return importlib.metadata.version("torch") if importlib.util.find_spec("torch") else None


def which(tool: str) -> str | None:
    # pip puts cmake and ninja beside Python, newer than a system's, and on the PATH only of an activated environment
    return shutil.which(tool, path=str(Path(sys.executable).parent)) or shutil.which(tool)


def nvcc() -> str | None:
    # where CMake looks too
    return shutil.which(os.environ.get("CUDACXX") or "nvcc")


def obstacle() -> str | None:
    """Return why the compiled parts cannot be built, None if they can."""
    if enabled("BITINFER_NO_NATIVE"):
        return "BITINFER_NO_NATIVE was set when it was built"
    compiler = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compiler)):
        return f"no C++ compiler was found (looked for {', '.join(compiler)})"
    for tool in ("cmake", "ninja"):
        if which(tool) is None:
            return f"{tool} was not found: pip install {tool}"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 was not found: pip install pybind11"
    version = torch_version()
    if version is None:
        return "torch was not found at build time: install it first, then build with --no-build-isolation"
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < TORCH_MINIMUM:
        return f"torch {version} was found at build time, but 2.10 or later is needed"
    return None


class BuildNative(build_ext):
    """Run CMake; the libraries land in the package's folder, beside a record of what was built and what was not."""

    def run(self) -> None:
        package = Path(self.get_ext_fullpath("bitinfer._native")).parent.resolve()
        package.mkdir(parents=True, exist_ok=True)
        for stale in (*package.glob("_C*.so"), Path(self.get_ext_fullpath("bitinfer._native"))):
            stale.unlink(missing_ok=True)
        reason = obstacle()
        if reason is None:
            try:
                self.cmake(package)
            except subprocess.CalledProcessError as error:
                reason = f"the build failed: {shlex.join(map(str, error.cmd[:3]))} ... exited with {error.returncode}"
        if reason is not None:
            if enabled("BITINFER_REQUIRE_NATIVE"):
                raise SystemExit(f"bitinfer: BITINFER_REQUIRE_NATIVE is set, but {reason}")
            stars = "*" * 100
            print(
                f"{stars}\nbitinfer is installed WITHOUT its compiled kernels: {reason}.\n"
                f"It works in pure torch, slowly. `bitinfer doctor` tells more.\n{stars}",
                file=sys.stderr,
                flush=True,
            )
        (package / "_build.json").write_text(json.dumps(self.record(package, reason), indent=2) + "\n")

    def cmake(self, package: Path) -> None:
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        torch = importlib.util.find_spec("torch")
        pybind11 = importlib.util.find_spec("pybind11")
        assert torch is not None and torch.origin and pybind11 is not None and pybind11.origin
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": package,
            # these may differ from the last build's: isolated builds have their tools in a new folder each time
            "CMAKE_MAKE_PROGRAM": which("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "TORCH_INCLUDE_DIR": Path(torch.origin).parent / "include",
            "pybind11_DIR": Path(pybind11.origin).parent / "share" / "cmake" / "pybind11",
            "BITINFER_CUDA": os.environ.get("BITINFER_CUDA") or "AUTO",
        }
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        cmake = which("cmake")
        assert cmake is not None  # obstacle() has looked
        subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *definitions, *extra], check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([cmake, "--build", build, "-j", jobs], check=True)

    def record(self, package: Path, reason: str | None) -> dict[str, Any]:
        if Path(self.get_ext_fullpath("bitinfer._native")).exists():
            bindings_reason = None
        else:
            bindings_reason = reason or "Python.h was not found when it was built (Debian: apt-get install python3-dev)"
        if (package / "_C_cuda.abi3.so").exists():
            cuda_reason = None
        elif reason is not None:
            cuda_reason = reason
        elif os.environ.get("BITINFER_CUDA") and not enabled("BITINFER_CUDA"):
            cuda_reason = "BITINFER_CUDA=0 was set when it was built"
        elif nvcc() is None:
            cuda_reason = "no nvcc was found when it was built"
        else:
            cuda_reason = f"CMake could not use {nvcc()} when it was built (pip install -v shows why)"
        return {
            "version": self.distribution.get_version(),
            "native": reason is None,
            "native_reason": reason,
            "bindings": bindings_reason is None,
            "bindings_reason": bindings_reason,
            "cuda": cuda_reason is None,
            "cuda_reason": cuda_reason,
            "torch": torch_version(),
            "python": sys.version.split()[0],
        }


class Wheel(bdist_wheel):
    """A wheel without compiled parts serves every platform."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = obstacle() is not None


setup(
    ext_modules=[Extension("bitinfer._native", [])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
