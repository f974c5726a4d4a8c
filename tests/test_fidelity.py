"""From a published layout to logits: converted models against a float64 forward pass of the original formula."""

import json

import pytest
import torch
from llama64 import llama_logits
from torch import Tensor, nn

import bitinfer
from bitinfer.testing.checkpoints import write_fbi_llm, write_onebit

TOKENS = 40
# name, writer, arguments: the published sizes; vocabulary and depth cut where only they cost time
CASES = {
    "fbi-130m": (write_fbi_llm, {"shape": "130m", "shards": 2}),
    "fbi-1.3b-shaped": (write_fbi_llm, {"shape": "1.3b", "layers": 2, "vocab": 1000, "shards": 3}),
    "fbi-row": (write_fbi_llm, {"shape": "130m", "layers": 2, "vocab": 1000, "pattern": "row"}),
    "fbi-single": (write_fbi_llm, {"shape": "130m", "layers": 2, "vocab": 1000, "pattern": "single"}),
    "onebit": (write_onebit, {"shape": "130m", "layers": 4, "vocab": 1000, "shards": 2}),
    "onebit-latent": (write_onebit, {"shape": "130m", "layers": 2, "vocab": 1000, "packed": False}),
    "onebit-bias": (write_onebit, {"shape": "1.3b", "layers": 1, "vocab": 1000, "bias": True}),
}


def fbi_weight(tensors: dict[str, Tensor], name: str) -> Tensor:
    """FBI-LLM: ``alpha * sign(W) + beta``. Random latents hold a zero now and then; converted, that is +1."""
    alpha, beta = tensors[f"{name}.wscale"].double(), tensors[f"{name}.wbias"].double()
    return alpha * torch.where(tensors[f"{name}.weight"] < 0, -1.0, 1.0).double() + beta


def onebit_signs(tensors: dict[str, Tensor], name: str) -> Tensor:
    """OneBit: bit j of byte m is set where ``W[n, 8m+j]`` is -1; latent checkpoints hold the weight itself."""
    weight = tensors[f"{name}.weight"]
    if weight.is_floating_point():
        return weight.double().sign()
    bits = torch.stack([(weight.to(torch.int32) & 255) >> j & 1 for j in range(8)], -1)
    return (1 - 2 * bits).flatten(1).double()


class OneBitDense(nn.Module):
    """``LayerNorm(h * (S (g * x))) + b``, every step in the dtype of the model, as the authors compute it."""

    def __init__(self, tensors: dict[str, Tensor], name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.g, self.h = (tensors[f"{name}.{part}"].to(dtype) for part in ("input_factor", "weight_scale"))
        self.signs = onebit_signs(tensors, name).to(dtype)
        self.b = tensors[f"{name}.bias"].to(dtype) if f"{name}.bias" in tensors else None

    def forward(self, x: Tensor) -> Tensor:
        a = nn.functional.linear(x * self.g, self.signs) * self.h
        y = nn.functional.layer_norm(a, a.shape[-1:])
        return y if self.b is None else y + self.b


def exact_logits(folder, tensors: dict[str, Tensor], tokens: Tensor) -> Tensor:
    def linear(name: str, x: Tensor) -> Tensor:
        if f"{name}.wscale" in tensors:
            return x @ fbi_weight(tensors, name).t()
        return OneBitDense(tensors, name, torch.float64)(x)

    return llama_logits(json.loads((folder / "config.json").read_text()), tensors, linear, tokens)


def dense_model(packed: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """The same transformers model with dense layers in ``dtype``."""
    model = type(packed)._from_config(packed.config.__class__(**_plain(packed.config)), dtype=dtype).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            if f"{name}.wscale" in tensors:
                module.weight.data = fbi_weight(tensors, name).to(dtype)
            else:
                model.set_submodule(name, OneBitDense(tensors, name, dtype))
        elif f"{name}.weight" in tensors:
            module.weight.data = tensors[f"{name}.weight"].to(dtype)
    return model


def _plain(config) -> dict:
    return {k: v for k, v in config.to_dict().items() if k != "quantization_config"}


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens.unsqueeze(0)).logits[0].double()


def error(got: Tensor, exact: Tensor) -> float:
    assert got.isfinite().all()
    return ((got - exact).norm() / exact.norm()).item()


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    write, arguments = CASES[request.param]
    folder = tmp_path_factory.mktemp("fidelity")
    tensors = write(folder / "source", **arguments)
    report = bitinfer.convert(folder / "source", folder / "packed")
    vocabulary = tensors["lm_head.weight"].shape[0]
    tokens = torch.randint(0, vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(1))
    return folder, tensors, tokens, exact_logits(folder / "source", tensors, tokens), report


def test_float32_logits_are_those_of_the_formula(case):
    folder, _, tokens, exact, _ = case
    model, _ = bitinfer.load(folder / "packed")
    assert model.dtype == torch.float32
    got = logits(model, tokens)
    assert error(got, exact) < 1e-5  # the contract is 1e-3
    assert (got - exact).abs().max() < 1e-3 * exact.abs().max()
    assert torch.equal(got.argmax(-1), exact.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_no_worse_than_the_dense_model(case, dtype):
    folder, tensors, tokens, exact, _ = case
    model, _ = bitinfer.load(folder / "packed", dtype=dtype)
    own = error(logits(dense_model(model, tensors, dtype), tokens), exact)
    # both are made of the roundings of the same activations, which fall differently: 2% is the noise of that
    assert error(logits(model, tokens), exact) <= 1.02 * own


def test_size_is_that_of_the_bits(case):
    """One bit a weight and the scales, in the source's float32."""
    _, tensors, _, _, report = case
    bits = 0
    for name, tensor in tensors.items():
        if "_proj." in name and name.endswith(".weight"):
            bits += tensor.numel() * (1 if tensor.is_floating_point() else 8)
        elif "_proj." in name:
            bits += 32 * tensor.numel() * (tensor.shape != (1,))
    if not any(t.shape == (1,) for t in tensors.values()):
        assert abs(8 * report.packed_bytes / bits - 1) < 0.01
    assert len(report.layers) == 7 * len({n.split(".")[2] for n in tensors if ".layers." in n})


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_activations_stay_near(case, bits):
    folder, _, tokens, exact, _ = case
    model, _ = bitinfer.load(folder / "packed", act_bits=bits)
    assert error(logits(model, tokens), exact) < {8: 0.1, 4: 1.0}[bits]
