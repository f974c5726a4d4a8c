"""Settings that every test shares."""

import os
import sysconfig
from pathlib import Path

import pytest
import torch

# the width of the terminal that the tests are started from, which GNU readline exports to the workers
os.environ.pop("COLUMNS", None)

if os.environ.get("PYTEST_XDIST_WORKER"):  # the workers share the cores
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def compiler() -> str:
    """The backend for torch.compile: the default one needs Python.h, to compile what it generates for the CPU."""
    if (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "inductor"
    print("no Python.h here: torch.compile is tested with its aot_eager backend")
    return "aot_eager"
