"""What else multiplies by such a weight on a GPU: cuBLAS in fp16 and fp8, and other libraries where they are installed.

A peer that fails, or gives another result than the signs' product, costs the run nothing but a note.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitinfer import ops
from bitinfer.bench.report import Case
from bitinfer.dispatch import use_backend
from bitinfer.errors import BackendError
from bitinfer.testing.oracle import fp_error_bound
from bitinfer.weight import BinaryWeight

Copies = Callable[[int], int]  # bytes of a weight -> how many to rotate through
SCALED_MM_MULTIPLE = 16  # what torch._scaled_mm wants of every size
LOOSE = 0.02  # relative error at which a peer computes the same, rounded


@dataclass(frozen=True)
class Peer:
    """A peer: its name on the command line and in results, its activations, and where it comes from."""

    name: str
    op: str
    activations: tuple[str, ...]
    module: str
    package: str


PEERS = {
    peer.name: peer
    for peer in (
        Peer("torch", "F.linear", ("fp16",), "torch", "torch"),
        Peer("fp8", "_scaled_mm", ("fp8",), "torch", "torch"),
        Peer("triton", "triton", ("fp16", "int8"), "triton", "triton"),  # our own backend, beside the compiled one
        Peer("gemlite", "gemlite", ("fp16",), "gemlite", "gemlite"),
        Peer("humming", "humming", ("fp16", "int8"), "humming", "humming-kernels"),
    )
}
JUST_IN_TIME = ("gemlite", "humming")  # compile and tune at run time, for minutes if they are let


def choose_peers(names: Sequence[str] | None, notes: list[str]) -> list[Peer]:
    """Return the peers asked for that are installed, all by default; note which are not."""
    chosen = []
    for name in PEERS if names is None else names:
        if name not in PEERS:
            raise ValueError(f"peers: {name!r} is none of {', '.join(PEERS)}")
        peer = PEERS[name]
        if find_spec(peer.module) is None:
            notes.append(f"{peer.name} is not installed (pip install {peer.package})")
        else:
            chosen.append(peer)
    return chosen


def peer_cases(peer: Peer, n: int, k: int, tokens: Sequence[int], copies: Copies, notes: list[str]) -> Iterator[Case]:
    """Yield the calls of a peer with weights ``[n, k]``, for each number of tokens."""
    make = {"F.linear": _linear, "_scaled_mm": _scaled_mm, "triton": _triton, "gemlite": _gemlite, "humming": _humming}[
        peer.op
    ]
    for activations in peer.activations:
        try:
            case = make(activations, n, k, copies, notes)
        except Exception as error:  # another library's
            text = (str(error).splitlines() or [""])[0][:200]
            notes.append(f"{peer.op} {activations} {n} x {k}: {type(error).__name__}: {text}")
            continue
        for m in tokens:
            yield case(m)
        del case


def _linear(activations: str, n: int, k: int, copies: Copies, notes: list[str]) -> Callable[[int], Case]:
    weights = torch.randn(copies(2 * n * k), n, k, device="cuda", dtype=torch.float16)

    def case(m: int) -> Case:
        x = torch.randn(m, k, device="cuda", dtype=torch.float16)

        def run(i: int) -> Tensor:
            return F.linear(x, weights[i])

        nbytes = weights[0].nbytes
        return Case("F.linear", "fp16", "torch", m, n, k, nbytes, len(weights), run, lambda: None, peer=True)

    return case


def _scaled_mm(activations: str, n: int, k: int, copies: Copies, notes: list[str]) -> Callable[[int], Case]:
    if n % SCALED_MM_MULTIPLE or k % SCALED_MM_MULTIPLE:
        raise ValueError(f"it takes multiples of {SCALED_MM_MULTIPLE} alone")
    one = torch.ones((), device="cuda")
    weights = [torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn) for _ in range(copies(n * k))]

    def case(m: int) -> Case:
        padded = -(-m // SCALED_MM_MULTIPLE) * SCALED_MM_MULTIPLE
        x = torch.randn(padded, k, device="cuda").to(torch.float8_e4m3fn)

        def run(i: int) -> Tensor:
            return torch._scaled_mm(x, weights[i].t(), one, one, out_dtype=torch.float16)

        return Case("_scaled_mm", "fp8", "torch", m, n, k, n * k, len(weights), run, lambda: None, peer=True)

    return case


def _triton(activations: str, n: int, k: int, copies: Copies, notes: list[str]) -> Callable[[int], Case]:
    """Our Triton backend with one scale a row; int8 quantises the activations too."""
    bits = int(activations.removeprefix("int")) if activations.startswith("int") else None
    number = copies(n * -(-k // 8))
    weights = [BinaryWeight.from_dense(torch.randn(n, k, device="cuda", dtype=torch.float16)) for _ in range(number)]

    def case(m: int) -> Case:
        x = torch.randn(m, k, device="cuda", dtype=torch.float16)

        def run(i: int) -> Tensor:
            with use_backend("triton"):
                return ops.binary_linear(x, weights[i], bits)

        def check() -> None:
            with use_backend("reference"):
                expected = ops.binary_linear(x, weights[0], bits)
            error = (run(0) - expected).abs().max().item()
            if not error <= (fp_error_bound(x, weights[0]) if bits is None else 0.0):
                raise BackendError(f"differs from the reference by {error:.3g}")

        nbytes = weights[0].signs.nbytes
        return Case("triton", activations, "triton", m, n, k, nbytes, len(weights), run, check, peer=True)

    return case


def _gemlite(activations: str, n: int, k: int, copies: Copies, notes: list[str]) -> Callable[[int], Case]:
    from gemlite.helper import A16Wn

    bits = torch.randint(0, 2, (n, k), device="cuda", dtype=torch.uint8)
    scale, zero = (torch.full((n, 1), value, device="cuda", dtype=torch.float16) for value in (2.0, 0.5))
    maker = A16Wn(device="cuda:0", dtype=torch.float16)
    layer = maker.from_weights(bits.clone(), scale, zero, 1, k)  # (bit - 0.5) * 2
    return _of_layers("gemlite", "fp16", layer, 2 * bits.float() - 1, copies, notes)


def _humming(activations: str, n: int, k: int, copies: Copies, notes: list[str]) -> Callable[[int], Case]:
    from humming.layer import HummingLayer

    options: dict[str, Any] = {"input_config": {"dtype": "int8"}} if activations == "int8" else {}
    signs = torch.randint(0, 2, (n, k), device="cuda").half() * 2 - 1
    layer = HummingLayer(
        shape_n=n, shape_k=k, weight_config={"dtype": "uint1"}, torch_dtype=torch.float16, **options
    ).cuda()
    layer.load_from_unquantized(signs.clone())
    layer.transform()
    return _of_layers("humming", activations, layer, signs.float(), copies, notes)


def _of_layers(
    op: str, activations: str, layer: Any, signs: Tensor, copies: Copies, notes: list[str]
) -> Callable[[int], Case]:
    """Rotate through copies of a library's layer; the first result says how far it is from the signs' product."""
    n, k = signs.shape
    nbytes = n * -(-k // 8)
    layers = [layer, *(copy.deepcopy(layer) for _ in range(copies(nbytes) - 1))]

    def case(m: int) -> Case:
        x = torch.randn(m, k, device="cuda", dtype=torch.float16)

        def run(i: int) -> Tensor:
            return layers[i](x)

        def check() -> None:
            expected = x.float() @ signs.t()
            error = ((run(0).float() - expected).norm() / expected.norm()).item()
            if not error <= LOOSE:
                notes.append(f"{op} {activations} {n} x {k} M={m}: relative error {error:.2g} from the signs' product")

        return Case(op, activations, op, m, n, k, nbytes, len(layers), run, check, peer=True)

    return case
