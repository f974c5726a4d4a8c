"""The compiled ops and the Python ops are the same ops: csrc/registration.cpp and bitinfer/registration.py state one
schema."""

import pytest
import torch

from bitinfer import registration
from bitinfer.dispatch import BACKENDS

REASON = BACKENDS["cpu"].unavailable()


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("name", registration.SCHEMAS)
def test_compiled_schema_is_the_python_one(name: str) -> None:
    native = getattr(torch.ops.bitinfer_native, name).default._schema
    python = getattr(torch.ops.bitinfer, name).default._schema
    assert str(native).replace("bitinfer_native::", "bitinfer::") == str(python)
    assert str(python) == f"bitinfer::{name}{registration.SCHEMAS[name]}"
