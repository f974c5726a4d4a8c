"""The cache of tuned configurations: one small JSON file, of one layout version, replaced as a whole.

It lies in ``$BITINFER_TUNE_CACHE``, else in ``bitinfer/triton-tuned.json`` under ``$XDG_CACHE_HOME`` (``~/.cache``). A
file of another version, or measured with another Triton, is ignored: the table of :mod:`configs` serves instead.
"""

import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton

if TYPE_CHECKING:
    from bitinfer.backends.triton.configs import Config

VERSION = 1  # of the file and of what a Config means


def cache_path() -> Path:
    """Return where tuned configurations are kept."""
    named = os.environ.get("BITINFER_TUNE_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitinfer" / "triton-tuned.json"


@cache
def read_tuned(device: str) -> dict[str, "Config"]:
    """Return the tuned configurations of a device by :attr:`configs.Product.key`; read once in a process."""
    from bitinfer.backends.triton.configs import Config

    try:
        return {key: Config(**fields) for key, fields in _read(cache_path()).get(device, {}).items()}
    except (TypeError, AttributeError):  # written by hand
        return {}


def write_tuned(device: str, configs: "dict[str, Config]") -> Path:
    """Add configurations of a device to the cache, in place of those of the same keys; return where it is.

    Raises:
        OSError: the file cannot be written.
    """
    path = cache_path()
    devices = _read(path)
    devices[device] = {**devices.get(device, {}), **{key: vars(config) for key, config in configs.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"version": VERSION, "triton": triton.__version__, "devices": devices}, file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    read_tuned.cache_clear()
    return path


def _read(path: Path) -> dict[str, Any]:
    """Return the devices of a file, ``{}`` where there is none that this version can use."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    known = isinstance(content, dict) and content.get("version") == VERSION
    return dict(content["devices"]) if known and content.get("triton") == triton.__version__ else {}
