"""Memory in pages of 2 MB, for what decoding on a CPU reads anew for every token.

With pages of 4 KB a processor spends a fifth of that time on looking up where they are. Linux gives large pages to
private memory that asks for them (``MADV_HUGEPAGE``); where it does not, this is plain memory.
"""

import mmap
from collections.abc import Iterable, Sequence
from math import prod

import torch
from torch import Tensor

PAGE = 2 << 20
LINE = 64  # bytes to which tensors are aligned


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return zeros on the CPU, in large pages if they fill one."""
    nbytes = prod(shape) * dtype.itemsize
    memory = _map(nbytes) if nbytes >= PAGE else None
    if memory is None:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=prod(shape), offset=_start(memory)).view(*shape)


@torch.inference_mode(False)
@torch.no_grad()
def move(tensors: Iterable[Tensor]) -> None:
    """Copy tensors on the CPU, together, into large pages, where they stay the same objects with the same values.

    Those that are there already stay, and so does everything if it would not fill a page.
    """
    small = [t for t in tensors if t.device.type == "cpu" and getattr(t, "_huge_pages_at", None) != t.data_ptr()]
    memory = _map(sum(map(_room, small))) if sum(map(_room, small)) >= PAGE else None
    if memory is None:
        return
    offset = _start(memory)
    for tensor in small:
        # a storage for each, as those who save tensors expect of different ones
        place = torch.frombuffer(memory, dtype=torch.uint8, count=tensor.nbytes, offset=offset)
        place = place.view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor)
        tensor.data = place
        tensor._huge_pages_at = place.data_ptr()  # type: ignore[attr-defined]
        offset += _room(tensor)


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // LINE) * LINE


def _map(nbytes: int) -> mmap.mmap | None:
    """Return private memory for so many bytes and the way to the next page, None where it would be ordinary."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    memory = mmap.mmap(-1, nbytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel that was built without
        return None
    return memory


def _start(memory: mmap.mmap) -> int:
    return -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % PAGE
