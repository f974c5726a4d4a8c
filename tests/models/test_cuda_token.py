"""All layers of a model in one launch for one token, against the kernels of each layer."""

from typing import Any

import pytest
import torch
from cuda_models import model_of, prompts
from cuda_problems import fresh_seed, poisoned, require_cuda

from bitinfer.models import Decoder, cuda_layer, fuse
from bitinfer.models import generation as loop
from bitinfer.models.cache import round_cache

require_cuda()

DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def in_one_launch(monkeypatch: Any):
    monkeypatch.setattr(cuda_layer, "ONE_LAUNCH", True)
    with torch.no_grad():
        yield


WHOLE = {
    "small": {"hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 4},
    "one head": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 1, "head_dim": 128},
    "odd": {"hidden_size": 384, "intermediate_size": 1152, "num_attention_heads": 3, "head_dim": 128},
    "130m": {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12},
    "1.3b": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32},
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "head_dim": 128,
        "num_hidden_layers": 1,
    },
    "wide heads": {"hidden_size": 256, "intermediate_size": 8192, "num_attention_heads": 32, "head_dim": 128},
}


def whole_model(kind: str, act_bits: int | None, dtype: torch.dtype, size: str, **more: Any) -> Any:
    sizes = {**WHOLE[size], **more}
    return model_of(kind, act_bits, dtype, num_key_value_heads=sizes["num_attention_heads"], **sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act_bits", [8, 4, None])
@pytest.mark.parametrize(
    ("size", "kind"),
    [
        (size, kind)
        for size in WHOLE
        for kind in ("fbi", "row", "biases", "qwen3")
        if kind == "fbi" or size in ("small", "one head", "odd")
    ],
)
def test_all_layers_in_one_launch_are_the_layers(
    size: str, kind: str, act_bits: int | None, dtype: torch.dtype
) -> None:
    """One launch gives what the kernels of each layer give, and writes the same keys and values, to a few roundings."""
    decoder = Decoder(whole_model(kind, act_bits, dtype, size))
    within = []
    for slot, capacity in ((0, 16), (1, 256), (37, 256), (511, 768), (700, 1000)):
        cache = decoder.reserve(1, capacity)
        model = decoder.token_model
        assert model is not None
        generator = torch.Generator("cuda").manual_seed(fresh_seed())
        for tensor in (cache.keys, cache.values):
            tensor.normal_(generator=generator)
            tensor[:, :, :, slot:] = float("nan")
        x = torch.randn(1, decoder.embed.embedding_dim, device="cuda", generator=generator).to(dtype)
        step = cuda_layer.Step(torch.tensor([slot], device="cuda"), None, decoder.cos, decoder.sin)
        torch.cuda.synchronize()
        expected = cuda_layer.run(decoder.layers, decoder.norm, x, cache, step).float()
        written = [tensor[:, :, :, slot].clone().float() for tensor in (cache.keys, cache.values)]
        for tensor in (cache.keys, cache.values):
            tensor[:, :, :, slot] = float("nan")
        for _ in range(2):  # the second time counts on what the first one left in memory
            y = poisoned(lambda m=model, c=cache, s=step, x=x: m.step(x, c, s)).float()
            error = (y - expected).norm() / expected.norm()
            within.append(error <= 0.02)
            assert error <= (1.0 if act_bits == 4 else 0.1)
            for tensor, old in zip((cache.keys, cache.values), written, strict=True):
                new = tensor[:, :, :, slot].float()
                assert (new[0] - old[0]).abs().max() <= (0.2 if act_bits == 4 else 0.02) * old[0].abs().max()
                assert (new - old).norm() <= (1.0 if act_bits == 4 else 0.1) * old.norm()
                assert tensor[:, :, :, slot + 1 :].isnan().all()
    # a number that rounds to the other side changes what comes behind it, the more the coarser its steps
    assert sum(within) >= len(within) * {None: 1.0, 8: 0.7, 4: 0.3}[act_bits]


@pytest.mark.parametrize("act_bits", [8, None])
@pytest.mark.parametrize("size", ["small", "one head", "130m", "7b"])
def test_a_rounded_cache(size: str, act_bits: int | None) -> None:
    """Keys and values in 8 bits: the same bytes as the kernels of each layer write, and outputs as near as with 16."""
    decoder = Decoder(whole_model("fbi", act_bits, torch.float16, size, num_hidden_layers=1), cache_bits=8)
    same = []
    for slot, capacity in ((0, 16), (1, 256), (37, 256), (511, 768), (700, 1000)):
        cache = decoder.reserve(1, capacity)
        model = decoder.token_model
        assert model is not None
        for tensor in (cache.keys, cache.values):
            rows = torch.randn(*tensor.shape[:-1], cache.head_dim, device="cuda")
            tensor.copy_(round_cache(rows, 8))
            tensor[:, :, :, slot:] = 255  # scales of NaN
        x = torch.randn(1, decoder.embed.embedding_dim, device="cuda").half()
        step = cuda_layer.Step(torch.tensor([slot], device="cuda"), None, decoder.cos, decoder.sin)
        torch.cuda.synchronize()
        expected = cuda_layer.run(decoder.layers, decoder.norm, x, cache, step).float()
        written = [tensor[:, :, :, slot].clone() for tensor in (cache.keys, cache.values)]
        for tensor in (cache.keys, cache.values):
            tensor[:, :, :, slot] = 255
        for _ in range(2):
            y = poisoned(lambda m=model, c=cache, s=step, x=x: m.step(x, c, s)).float()
            assert (y - expected).norm() <= 0.1 * expected.norm()
            for tensor, old in zip((cache.keys, cache.values), written, strict=True):
                same.append((tensor[:, :, :, slot] == old).float().mean().item())
                assert (tensor[:, :, :, slot + 1 :] == 255).all()
    # a number that rounds to the other side changes the codes behind it
    assert sum(same) >= 0.9 * len(same)


@pytest.mark.parametrize("act_bits", [8, 2, None])
def test_tokens_of_one_launch_a_step(act_bits: int | None, monkeypatch: Any) -> None:
    """In graphs and without, and across a cache that grows."""
    model = fuse(whole_model("fbi", act_bits, torch.float16, "130m"))
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    steps = []
    step = cuda_layer.TokenModel.step
    monkeypatch.setattr(cuda_layer.TokenModel, "step", lambda *args: steps.append(1) or step(*args))
    short = model.generate(**prompts((9,)), max_new_tokens=40, **options)
    assert len(steps) == 2
    long = model.generate(**prompts((9,)), max_new_tokens=400, **options)
    assert torch.equal(long[:, : short.shape[1]], short)
    monkeypatch.setattr(loop, "_Captured", lambda step: step)
    loop._decoders.clear()
    assert torch.equal(model.generate(**prompts((9,)), max_new_tokens=40, **options), short)
    assert len(steps) == 4 + 39
    batch = model.generate(**prompts((9, 9)), max_new_tokens=40, **options)
    assert batch.shape == (2, 49) and len(steps) == 4 + 39
