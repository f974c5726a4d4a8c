"""bitinfer: binary language models at the cost of one bit per weight.

``import bitinfer`` registers the packed format with transformers, whichever of the two is imported first, so that
``AutoModelForCausalLM.from_pretrained(packed_folder)`` works. It needs no GPU, no compiler and no network.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bitinfer import ops
from bitinfer.convert import convert
from bitinfer.dispatch import use_backend
from bitinfer.embedded import embedded_model
from bitinfer.errors import BackendError, BitinferError, FormatError
from bitinfer.integrations import install as _install
from bitinfer.load import load
from bitinfer.models import fuse, unfuse
from bitinfer.nn import BinaryLinear, ReplaceReport, replace_linear
from bitinfer.weight import BinaryWeight, WeightLayout

if TYPE_CHECKING:
    from bitinfer.integrations.transformers import BitinferConfig

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "BinaryLinear",
    "BinaryWeight",
    "BitinferConfig",
    "BitinferError",
    "FormatError",
    "ReplaceReport",
    "WeightLayout",
    "convert",
    "embedded_model",
    "fuse",
    "load",
    "ops",
    "replace_linear",
    "unfuse",
    "use_backend",
]

_install()


def __getattr__(name: str) -> Any:
    if name != "BitinferConfig":
        raise AttributeError(f"module 'bitinfer' has no attribute {name!r}")
    # on first use: it imports transformers, which `import bitinfer` should not wait for
    return import_module("bitinfer.integrations.transformers").BitinferConfig
