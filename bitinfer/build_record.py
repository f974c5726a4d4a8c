"""What the build wrote about itself: which compiled parts there are, and why others were left out.

``setup.py`` writes ``_build.json`` beside the package's files. It has the keys ``version``, ``torch``, ``python`` and,
for each of ``native`` (the torch library and its CPU kernels), ``bindings`` (numpy) and ``cuda``, whether it was built,
with ``<part>_reason`` where it was not.
"""

import json
from pathlib import Path
from typing import Any

BUILD_RECORD = Path(__file__).with_name("_build.json")
REBUILD = "pip install --no-build-isolation ."
REBUILD_CUDA = f"with nvcc on the PATH run: BITINFER_CUDA=1 {REBUILD}"


def read_build_record(path: Path = BUILD_RECORD) -> dict[str, Any]:
    """Return what the build wrote about itself, ``{}`` if it wrote nothing that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def reason_left_out(part: str, record: dict[str, Any]) -> str:
    """Return why ``part`` was not built, as far as the record knows."""
    return str(record.get(f"{part}_reason") or "not built")
