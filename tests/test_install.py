"""Installing from source: with a compiler, without one, and with CUDA switched off; ``bitinfer doctor`` tells which."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "csrc", "bitinfer")
BUILT = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
pytestmark = pytest.mark.slow


def install(folder: Path, **environment: str) -> tuple[Path, subprocess.CompletedProcess]:
    """Install a clean copy of the sources into ``folder/site``; return that folder and pip's run."""
    source, site = folder / "source", folder / "site"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=BUILT)
        else:
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-v"]
    run = subprocess.run(
        [*pip, "--target", str(site), str(source)],
        env={k: v for k, v in os.environ.items() if not k.startswith("BITINFER_")} | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    return site, run


# an editable install of this checkout would lend its compiled parts to the copy under test
ALONE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
"""


def python(site: Path, code: str) -> subprocess.CompletedProcess:
    """Run code with the installed copy and nothing else of bitinfer on the path."""
    return subprocess.run(
        [sys.executable, "-c", ALONE + code],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=site,
        capture_output=True,
        text=True,
        timeout=300,
    )


def doctor(site: Path) -> dict:
    code = "sys.argv = ['bitinfer', 'doctor', '--json']\nfrom bitinfer.cli import main\nmain()"
    run = python(site, code)
    assert run.stdout, run.stderr
    return json.loads(run.stdout)


COMPUTE = """
import torch, bitinfer
layer = bitinfer.BinaryLinear.from_linear(torch.nn.Linear(100, 7))
for layer.act_bits in (None, 8):
    print(layer(torch.ones(2, 100)).shape)
"""


def runs(site: Path) -> str:
    run = python(site, COMPUTE)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("torch.Size([2, 7])") == 2
    return run.stderr


def test_with_a_compiler_and_cuda_off(tmp_path):
    site, run = install(tmp_path, BITINFER_CUDA="0", BITINFER_REQUIRE_NATIVE="1")
    assert run.returncode == 0, run.stdout + run.stderr
    state = doctor(site)
    assert state["install"] == "cpu only" and state["build"]["native"] and not state["build"]["cuda"]
    assert "BITINFER_CUDA=0" in state["build"]["cuda_reason"]
    assert (site / "bitinfer" / "embedded" / "model" / "model.safetensors").stat().st_size > 10e6
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    assert state["build"]["bindings"] == headers.exists()
    assert all(b["available"] for b in state["backends"] if b["name"] in ("cpu", "reference"))
    assert "slow" not in runs(site)


def test_without_python_headers(tmp_path):
    """A machine with g++ and no Python.h: the torch library needs none, and only the numpy bindings are left out."""
    hidden = "-DCMAKE_DISABLE_FIND_PACKAGE_Python=ON"
    site, run = install(tmp_path, BITINFER_CUDA="0", BITINFER_REQUIRE_NATIVE="1", CMAKE_ARGS=hidden)
    assert run.returncode == 0, run.stdout + run.stderr
    state = doctor(site)
    assert state["install"] == "cpu only" and state["healthy"] and not state["build"]["bindings"]
    assert state["libraries"]["numpy bindings"].startswith("no: Python.h was not found")
    assert state["active_instruction_set"] == state["instruction_sets"][0]["name"]
    assert "slow" not in runs(site)


def test_without_a_compiler(tmp_path):
    site, run = install(tmp_path, CXX="/nonexistent/c++", CC="/nonexistent/cc")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "WITHOUT its compiled kernels: no C++ compiler was found" in run.stdout + run.stderr
    assert not list(site.glob("bitinfer/*.so"))
    state = doctor(site)
    assert state["install"] == "pure python" and "no C++ compiler" in state["build"]["native_reason"]
    assert {b["name"]: b["available"] for b in state["backends"]}["cpu"] is False
    assert any("compiler" in p["next_step"] for p in state["problems"])
    assert "pure torch reference backend, which is slow" in runs(site)


def test_compiled_parts_switched_off(tmp_path):
    site, run = install(tmp_path, BITINFER_NO_NATIVE="1")
    assert run.returncode == 0, run.stdout + run.stderr
    state = doctor(site)
    assert state["install"] == "pure python" and "BITINFER_NO_NATIVE" in state["build"]["native_reason"]


def test_required_but_impossible_is_an_error(tmp_path):
    _, run = install(tmp_path, CXX="/nonexistent/c++", BITINFER_REQUIRE_NATIVE="1")
    assert run.returncode != 0
    assert "BITINFER_REQUIRE_NATIVE is set, but no C++ compiler was found" in run.stdout + run.stderr
