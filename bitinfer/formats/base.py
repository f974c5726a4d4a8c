"""What a checkpoint format is: how to recognise it, which layers it holds, and how to read one of them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bitinfer.checkpoint import Checkpoint
from bitinfer.errors import FormatError
from bitinfer.packing import pack_signs, words_per_row
from bitinfer.weight import FLOAT_DTYPES, BinaryWeight

# The share of exact zeros in a tensor that become +1. Casting latent weights to fp16 flushes 1e-6 to 2e-5 of them to
# zero (Gaussian, standard deviation 0.02 to 0.001), so this lets such files through, and no pruned or ternary ones.
ZERO_LIMIT = 1e-4
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Format(ABC):
    """One way to store a binary model. An instance holds the options under which it reads.

    ``prefix`` below is the dotted name of a layer, such as ``model.layers.0.self_attn.q_proj``, and ``tensors`` any
    mapping of names to tensors, a :class:`bitinfer.checkpoint.Checkpoint` among them.

    Attributes:
        name: the key in ``FORMATS`` and on the command line.
        description: one line for people.
        approximates: whether reading loses something beyond the rounding of scales. Never detected, only asked for.
        zero_limit: share of exact zeros per tensor that become +1; more is an error.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    approximates: ClassVar[bool] = False

    zero_limit: float = ZERO_LIMIT

    @abstractmethod
    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether the folder looks like this format; cheap, and True for a damaged one."""

    @abstractmethod
    def layer_names(self, checkpoint: Checkpoint) -> list[str]:
        """Return the names of the binary layers, in the order of the checkpoint.

        Raises:
            FormatError: tensors of a layer are missing, or layers of one kind are stored in different ways.
        """

    @abstractmethod
    def read_counted(self, tensors: Mapping[str, Tensor], prefix: str) -> tuple[BinaryWeight, int]:
        """Return the packed layer, and how many exact zeros became +1 in it.

        Scales keep the dtype of the source; signs are those of the tensor as stored.

        Raises:
            FormatError: wrong shapes or dtypes, NaN or infinity, too many zeros. The message names the tensor.
        """

    def read(self, tensors: Mapping[str, Tensor], prefix: str) -> BinaryWeight:
        """Return the packed layer; see :meth:`read_counted`."""
        return self.read_counted(tensors, prefix)[0]

    def consumed(self, prefix: str) -> tuple[str, ...]:
        """Return the names of the source tensors that make up a layer, whether a given layer has them or not."""
        return (f"{prefix}.weight", f"{prefix}.bias")

    def config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return ``config.json`` for the packed folder, still without a ``quantization_config``."""
        return {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}

    @abstractmethod
    def reference_linear(self, tensors: Mapping[str, Tensor], prefix: str) -> nn.Module:
        """Return the layer by the format's own formula, dense and in float32, without going through BinaryWeight."""


def get_tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a tensor that a layer cannot do without."""
    if name not in tensors:
        raise FormatError(f"{name} is missing: the checkpoint is incomplete, or not of this format")
    return tensors[name].detach()


def get_bias(tensors: Mapping[str, Tensor], prefix: str, out_features: int) -> Tensor | None:
    """Return the checked bias ``[N]`` of a layer, or None."""
    name = f"{prefix}.bias"
    return get_vector(tensors, name, (out_features,), ((out_features,),)) if name in tensors else None


def get_vector(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], allowed: tuple[tuple[int, ...], ...]
) -> Tensor:
    """Return a finite floating point tensor of one of the ``allowed`` shapes, as a contiguous ``shape``."""
    tensor = get_tensor(tensors, name)
    if tuple(tensor.shape) not in allowed:
        raise FormatError(
            f"{name} has shape {tuple(tensor.shape)}, expected {' or '.join(map(str, allowed))} from the "
            "shape of the weight"
        )
    check_float(tensor, name)
    check_finite(tensor, name)
    return tensor.reshape(shape).contiguous()


def check_float(tensor: Tensor, name: str) -> None:
    """Raise FormatError unless ``tensor`` is float32, float16 or bfloat16."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise FormatError(f"{name} is {tensor.dtype}, expected float32, float16 or bfloat16")


def check_matrix(tensor: Tensor, name: str) -> None:
    """Raise FormatError unless ``tensor`` is a floating point matrix with at least one element."""
    check_float(tensor, name)
    if tensor.dim() != 2 or not tensor.numel():
        raise FormatError(f"{name} has shape {tuple(tensor.shape)}, expected a matrix [out_features, in_features]")


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise FormatError if ``tensor`` holds NaN or infinity."""
    if tensor.numel():
        low, high = torch.aminmax(tensor)  # NaN comes through, and this is much faster than isfinite
        if not (torch.isfinite(low) and torch.isfinite(high)):
            bad = tensor.numel() - int(torch.isfinite(tensor).sum())
            raise FormatError(f"{name} holds {bad} values that are NaN or infinite: the checkpoint is damaged")


def check_zeros(zeros: int, weight: Tensor, name: str, zero_limit: float) -> None:
    """Raise FormatError if more than the share ``zero_limit`` of ``weight`` is zero."""
    if zeros > allowed_zeros(weight, zero_limit):
        raise FormatError(
            f"{name} holds {zeros} exact zeros among {weight.numel()} weights; a bit cannot hold 0, and at most "
            f"{allowed_zeros(weight, zero_limit)} may become +1 (zero_limit={zero_limit:g}): it is no binary weight, "
            "or was rounded to a dtype too narrow for it; take the original float32 file, or pass a higher zero_limit"
        )


def allowed_zeros(weight: Tensor, zero_limit: float) -> int:
    """Return how many zeros may become +1: the share rounded up, so that a small tensor may have one."""
    return math.ceil(zero_limit * weight.numel())


def row_chunks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield ``(first row, rows)`` over a matrix: what is computed from them stays small, and in the cache."""
    step = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield start, weight[start : start + step]


def pack_latent(weight: Tensor, name: str, zero_limit: float) -> tuple[Tensor, int]:
    """Pack the signs of a latent matrix ``[N, K]``; return ``(words [N, ceil(K/32)], zeros that became +1)``.

    Raises:
        FormatError: it is no float matrix, holds NaN or infinity, or more than the share ``zero_limit`` of zeros.
    """
    check_matrix(weight, name)
    words = torch.empty(weight.shape[0], words_per_row(weight.shape[1]), dtype=torch.uint32)
    zeros = 0
    for start, rows in row_chunks(weight):
        check_finite(rows, name)
        zeros += rows.numel() - int(torch.count_nonzero(rows))
        words[start : start + len(rows)] = pack_signs(rows)
    check_zeros(zeros, weight, name, zero_limit)
    return words, zeros


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Wrap a dense weight and bias as a float32 ``nn.Linear``."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.float(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.float(), requires_grad=False)
    return linear
