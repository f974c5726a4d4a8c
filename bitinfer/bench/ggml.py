"""ggml as a peer of single products on CPUs: ``ggml_mul_mat`` in the library that llama-cpp-python brings.

Its narrowest types: Q1_0 is a bit per weight and a scale per 128, TQ2_0 two bits and a scale per 256. It quantises
activations to 8 bits inside the product. Weights stay in the order of a GGUF file, as they do in memory-mapped models.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitinfer.bench.report import Case
from bitinfer.errors import BackendError

TYPES = {"Q1_0": (128, 18), "TQ2_0": (256, 66)}  # weights and bytes of a block
SCALE = np.frombuffer(np.float16(1.0).tobytes(), np.uint8)
LOOSE = 0.02  # relative error that 8-bit activations explain
NODES = 8  # of a graph, which has one
F32 = 0  # of ggml_type


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def missing() -> str | None:
    """Return why ggml is not measured, None if it can be."""
    if find_spec("llama_cpp") is None:
        return "ggml's Q1_0 and TQ2_0 are not measured: llama-cpp-python is not installed"
    return None


def cases(n: int, k: int, tokens: Sequence[int], copies: Callable[[int], int]) -> Iterator[Case]:
    """Yield products with weights ``[n, k]`` of each of :data:`TYPES` whose blocks fit K, for each number of tokens."""
    for kind, (block, size) in TYPES.items():
        if k % block == 0:
            nbytes = n * (k // block) * size
            ggml = _Ggml(kind, n, k, tokens, copies(nbytes))
            for m in tokens:
                yield ggml.case(m, nbytes)


class _Ggml:
    """Weights of one type, and a graph of one product for each number of tokens."""

    def __init__(self, kind: str, n: int, k: int, tokens: Sequence[int], copies: int) -> None:
        self.kind, self.n, self.k = kind, n, k
        self.base, self.cpu = _libraries()
        self.blocks = _blocks(kind, n, k)
        one = torch.from_numpy(self.blocks.reshape(-1))
        self.copies = one.repeat(copies, 1)
        room = one.nbytes + sum(4 * m * (k + n) for m in tokens)
        room += len(tokens) * self.base.ggml_graph_overhead_custom(NODES, False)
        room += (1 + 2 * len(tokens)) * (self.base.ggml_tensor_overhead() + 64)
        self.context = ctypes.c_void_p(self.base.ggml_init(_InitParams(room, None, False)))
        if not self.context:
            raise BackendError(f"ggml: no room for {room} bytes")
        self.backend = ctypes.c_void_p(self.cpu.ggml_backend_cpu_init())
        number = next(i for i in range(64) if self.base.ggml_type_name(i) == kind.lower().encode())
        weight = ctypes.c_void_p(self.base.ggml_new_tensor_2d(self.context, number, k, n))
        self.data = self._data_field(weight)
        self.inputs: dict[int, Tensor] = {}
        self.graphs: dict[int, tuple[Any, int]] = {}
        for m in tokens:
            self.inputs[m] = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
            x = ctypes.c_void_p(self.base.ggml_new_tensor_2d(self.context, F32, k, m))
            ctypes.memmove(self.base.ggml_get_data(x), self.inputs[m].data_ptr(), 4 * m * k)
            y = ctypes.c_void_p(self.base.ggml_mul_mat(self.context, weight, x))
            graph = ctypes.c_void_p(self.base.ggml_new_graph_custom(self.context, NODES, False))
            self.base.ggml_build_forward_expand(graph, y)
            self.graphs[m] = graph, int(self.base.ggml_get_data(y))

    def __del__(self) -> None:
        if getattr(self, "backend", None):
            self.base.ggml_backend_free(self.backend)
            self.base.ggml_free(self.context)

    def case(self, m: int, nbytes: int) -> Case:
        graph, result = self.graphs[m]

        def run(i: int) -> None:
            self.data.value = self.copies[i].data_ptr()
            self.cpu.ggml_backend_cpu_set_n_threads(self.backend, torch.get_num_threads())
            if self.base.ggml_backend_graph_compute(self.backend, graph) != 0:
                raise BackendError(f"ggml: {self.kind} at M={m} N={self.n} K={self.k} failed")

        def check() -> None:
            run(0)
            got = torch.from_numpy(np.ctypeslib.as_array((ctypes.c_float * (m * self.n)).from_address(result)).copy())
            expected = self.inputs[m] @ _signs(self.kind, self.blocks).t()
            error = ((got.view(m, self.n) - expected).norm() / expected.norm()).item()
            if not error <= LOOSE:
                raise BackendError(
                    f"ggml: {self.kind} is {error:.2g} from the signs' product at M={m} N={self.n} K={self.k}"
                )

        return Case("ggml", self.kind, "ggml", m, self.n, self.k, nbytes, len(self.copies), run, check, peer=True)

    def _data_field(self, tensor: ctypes.c_void_p) -> ctypes.c_void_p:
        """Return the field of a tensor that points to its data: setting it needs no graph for each weight."""
        assert tensor.value is not None
        data = self.base.ggml_get_data(tensor)
        for offset in range(0, self.base.ggml_tensor_overhead(), ctypes.sizeof(ctypes.c_void_p)):
            field = ctypes.c_void_p.from_address(tensor.value + offset)
            if field.value == data:
                return field
        raise BackendError("ggml: a tensor of this version holds no pointer to its data")


def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    spec = find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None  # missing() was asked
    folder = Path(spec.origin).parent / "lib"
    base, cpu = (ctypes.CDLL(str(folder / f"libggml-{part}.so")) for part in ("base", "cpu"))
    pointers = ("ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph_custom", "ggml_get_data")
    for name in pointers:
        getattr(base, name).restype = ctypes.c_void_p
    base.ggml_init.argtypes = [_InitParams]
    base.ggml_new_tensor_2d.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    base.ggml_new_graph_custom.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_bool]
    for name in ("ggml_tensor_overhead", "ggml_graph_overhead_custom"):
        getattr(base, name).restype = ctypes.c_size_t
    base.ggml_graph_overhead_custom.argtypes = [ctypes.c_size_t, ctypes.c_bool]
    base.ggml_type_name.restype = ctypes.c_char_p
    cpu.ggml_backend_cpu_init.restype = ctypes.c_void_p
    cpu.ggml_backend_cpu_set_n_threads.argtypes = [ctypes.c_void_p, ctypes.c_int]
    return base, cpu


def _blocks(kind: str, n: int, k: int) -> np.ndarray:
    """Return random weights -1 and +1, ``[n, blocks, bytes]``."""
    block, size = TYPES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (n, k // block, size), np.uint8)
    if kind == "TQ2_0":  # two bits hold 0, 1 or 2 for -1, 0 and +1; scales come last
        blocks &= 0xAA
        blocks[..., -2:] = SCALE
    else:
        blocks[..., :2] = SCALE
    return blocks


def _signs(kind: str, blocks: np.ndarray) -> Tensor:
    """Return the weights of :func:`_blocks` as float32 ``[n, k]``."""
    n = len(blocks)
    if kind == "Q1_0":  # a set bit is +1
        bits = np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little")
        return torch.from_numpy(bits.reshape(n, -1).astype(np.float32) * 2 - 1)
    # byte j of 32 holds the columns j, 32 + j, 64 + j and 96 + j of its half of the block
    codes = blocks[..., :64].reshape(n, -1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(4, 1) & 3
    return torch.from_numpy(codes.reshape(n, -1).astype(np.float32) - 1)
