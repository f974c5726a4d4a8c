"""What several commands share: the options of a model that is run, and loading it."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from bitinfer.terminal import status


class DType(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class ActBits(str, Enum):
    none = "none"
    eight = "8"
    four = "4"
    two = "2"
    one = "1"


class ActBlock(str, Enum):
    token = "0"
    block = "256"


Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A folder that bitinfer packed.")]
Bits = Annotated[
    ActBits | None,
    typer.Option(help="Quantise activations to this many bits; none: leave them. By default as the folder says."),
]
Block = Annotated[
    ActBlock | None,
    typer.Option(help="Activation scale per token (0) or per 256 columns. By default as the folder says."),
]
Dtype = Annotated[DType | None, typer.Option("--dtype", help="What to compute in. By default as the folder says.")]
HeadBits = Annotated[
    int | None,
    typer.Option(
        min=8, max=8, help="Round the rows of the head to 8 bits: half as much to read, on CPUs and NVIDIA GPUs."
    ),
]


class Rounded(str, Enum):
    eight = "8"
    four = "4"


CacheBits = Annotated[
    Rounded | None,
    typer.Option(help="Round keys and values to 8 or 4 bits: memory for longer contexts, on NVIDIA GPUs."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch and of the kernels.")]


def load_model(
    model: Path,
    dtype: DType | None,
    act_bits: ActBits | None,
    act_block: ActBlock | None,
    threads: int | None,
    head_bits: int | None = None,
    cache_bits: Rounded | None = None,
) -> tuple[Any, Any]:
    """Load what a command is to run, with its tokenizer; generation is fused where the model allows it."""
    import torch

    from bitinfer.load import load
    from bitinfer.models import fuse, fuse_if_possible

    if not model.is_dir() and str(model).count("/") != 1:  # what has one slash may be on the Hub
        raise ValueError(f"{model}: no such folder; make one with: bitinfer convert SRC {model}")
    if threads is not None:
        torch.set_num_threads(threads)
    options: dict[str, Any] = {} if act_bits is None else {"act_bits": bits_of(act_bits)}
    if act_block is not None:
        options["act_block"] = int(act_block.value)
    with status() as stage:
        stage(f"loading {model}")
        network, tokenizer = load(model, dtype="auto" if dtype is None else getattr(torch, dtype.value), **options)
        if head_bits is None and cache_bits is None:
            return fuse_if_possible(network), tokenizer
        return fuse(network, head_bits=head_bits, cache_bits=number_of(cache_bits)), tokenizer


def bits_of(act_bits: ActBits) -> int | None:
    """Return what the library calls it."""
    return None if act_bits is ActBits.none else int(act_bits.value)


def number_of(rounded: Rounded | None) -> int | None:
    """Return what the library calls it."""
    return None if rounded is None else int(rounded.value)
