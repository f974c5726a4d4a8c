"""Problems that find bit errors: odd sizes, every term of the algebra, and inputs that single out one bit."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitinfer.packing import pack_signs
from bitinfer.weight import BinaryWeight, WeightLayout

ROW = WeightLayout()
PLAIN = WeightLayout(tensors=())
FBI = WeightLayout(tensors=("in_scale", "in_shift"))
ONEBIT = WeightLayout(tensors=("weight_scale", "in_scale"), norm_eps=1e-5)
GROUPS = WeightLayout(group_size=128)
TERNARY = WeightLayout(planes=2)
EVERYTHING = WeightLayout(
    planes=2,
    group_size=64,
    tensors=("weight_scale", "in_scale", "in_shift", "group_shift"),
    norm_eps=1e-5,
)
LAYOUTS = {
    "plain": PLAIN,
    "row": ROW,
    "fbi": FBI,
    "onebit": ONEBIT,
    "groups": GROUPS,
    "ternary": TERNARY,
    "everything": EVERYTHING,
}


@dataclass(frozen=True)
class GemmProblem:
    """One matrix product: M tokens, N outputs, K inputs, which terms the weight has, and how ``x`` looks.

    ``x`` is one of ``normal``, ``one_hot``, ``ones``, ``alternating`` and ``strided``.
    """

    name: str
    m: int
    n: int
    k: int
    layout: WeightLayout = ROW
    bias: bool = False
    x: str = "normal"

    def make(
        self, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
    ) -> tuple[Tensor, BinaryWeight]:
        """Return fresh ``x [M, K]`` in ``dtype`` and a weight whose scales are in ``dtype``."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        shapes = self.layout.shapes(self.k, self.n)
        signs = pack_signs(normal(*shapes["weight"][:-1], self.k))
        if self.x == "alternating":
            signs = torch.full(signs.shape, 0x55555555, dtype=torch.int64).to(torch.uint32)
            signs[..., -1] = pack_signs(torch.tensor([1.0 - 2 * (i % 2 == 0) for i in range(self.k)]))[-1]
        tensors: dict[str, Tensor] = {"weight": signs}
        for name, shape in shapes.items():
            if name != "weight":
                tensors[name] = (normal(*shape) * 0.5 + (0.0 if name.endswith("shift") else 1.0)).to(dtype)
        if self.bias:
            tensors["bias"] = normal(self.n).to(dtype)
        if self.x == "one_hot":
            x = torch.zeros(self.m, self.k)
            x[torch.arange(self.m), (torch.arange(self.m) * 31 + 5) % self.k] = 1.0
        elif self.x == "ones":
            x = torch.ones(self.m, self.k)
        elif self.x == "strided":
            x = normal(self.m, 2 * self.k + 3)[:, 1 : 1 + 2 * self.k : 2]
        else:
            x = normal(self.m, self.k)
        x = x.to(dtype)  # keeps the strides
        weight = BinaryWeight.from_tensors(tensors, self.k, self.layout)
        return x.to(device), weight.to(device)


PROBLEMS: list[GemmProblem] = [
    *(
        GemmProblem(f"{name}-m{m}-n{n}-k{k}", m, n, k, layout, bias=name in ("row", "everything"))
        for name, layout in LAYOUTS.items()
        for m, n, k in ((1, 33, 576), (7, 65, 300), (17, 31, 1111))
    ),
    *(GemmProblem(f"k{k}", 3, 5, k) for k in (1, 31, 32, 33, 63, 64, 65, 255, 256, 257, 4095)),
    *(GemmProblem(f"n{n}", 2, n, 96) for n in (1, 2, 3, 7, 8, 9, 15, 16, 17)),
    *(GemmProblem(f"m{m}", m, 24, 160, FBI) for m in (0, 1, 2, 4, 8, 15, 16, 33, 64)),
    *(GemmProblem(f"{x}-k{k}", 40, 19, k, PLAIN, x=x) for x in ("one_hot", "ones", "alternating") for k in (64, 321)),
    GemmProblem("strided", 5, 12, 200, FBI, x="strided"),
    GemmProblem("no-rows", 3, 0, 64),
    GemmProblem("wide", 1, 700, 2048, FBI),
    GemmProblem("tall", 130, 96, 768, ONEBIT, bias=True),
]
