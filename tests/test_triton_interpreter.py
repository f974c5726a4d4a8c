"""The Triton kernels without a GPU: test_triton_backend.py in Triton's interpreter, in a process of its own.

The interpreter is chosen as kernels are defined, so it cannot be had beside the compiler in one process.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bitinfer.backends.triton import interpreted

MISSING = find_spec("triton") is None
if MISSING:
    print("the Triton kernels are not tested here: Triton is not installed (pip install triton)")

# two processes, since one would need most of a test's time limit
HALVES = {"floating point": "floating_point or table or groups or strides", "integers": ""}


@pytest.mark.skipif(MISSING, reason="Triton is not installed (pip install triton)")
@pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET is set: test_triton_backend.py runs by itself")
@pytest.mark.parametrize("half", HALVES)
def test_every_kernel_in_the_interpreter(half: str) -> None:
    first = HALVES["floating point"]
    options = [
        "-q",
        "-x",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "-k",
        first if HALVES[half] else f"not ({first})",
    ]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(Path(__file__).with_name("test_triton_backend.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=540,
    )
    print("\n".join(result.stdout.splitlines()[-1:]))
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 200 and "skipped" not in result.stdout
