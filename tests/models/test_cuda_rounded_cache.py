"""The kernels over keys and values rounded to 8 and 4 bits, against torch, and models that use them."""

import itertools
from typing import Any

import pytest
import torch
from cuda_models import model_of, prompts
from cuda_problems import fresh_seed, normal, poisoned, require_cuda
from torch import Tensor

from bitinfer.models import Decoder, fuse
from bitinfer.models.cache import SCALE_COLUMNS, Span, read_cache, round_cache
from bitinfer.models.layers import rotate

require_cuda()

native = torch.ops.bitinfer_native
DTYPES = (torch.float16, torch.bfloat16)
BITS = (8, 4)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def tables(capacity: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.rand(capacity, dim // 2, device="cuda").mul(6.3).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("capacity", "slot", "padding"),
    [(256, 0, None), (256, 255, None), (512, 300, [0, 300, 17]), (2304, 2100, [5, 0, 2000]), (40, 39, None)],
    ids=str,
)
def test_attention(
    capacity: int, slot: int, padding: list[int] | None, bits: int, dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(fresh_seed())
    for (heads, kv_heads), batch in zip(
        ((32, 32), (4, 4), (8, 2), (8, 1), (6, 2), (5, 1)), itertools.cycle((1, 3, 2)), strict=False
    ):
        q, k, v = (normal(batch, n * dim, dtype=dtype) for n in (heads, kv_heads, kv_heads))
        cos, sin = tables(capacity, dim, dtype)
        exact = [normal(batch, kv_heads, capacity, dim, dtype=dtype) for _ in range(2)]
        keys, values = (round_cache(x, bits) for x in exact)
        first = torch.tensor((padding or [0] * batch)[:batch], device="cuda")
        place = torch.arange(capacity, device="cuda")
        unread = ((place < first[:, None]) | (place >= slot))[:, None, :, None]
        for cache in (keys, values):
            cache.masked_fill_(unread, 255)  # scales of NaN
        before = keys.clone(), values.clone()
        out = poisoned(
            lambda a=(q, k, v, keys, values, cos, sin), f=first: native.decode_attention(
                *a,
                torch.tensor([slot], device="cuda"),
                None if padding is None else f,
                None,
                None,
                0.0,
                0.0,
                dim**-0.5,
                False,
            )
        )
        at = slot - first
        span = Span(at, slot + 1, None, False, cos[at].unsqueeze(1), sin[at].unsqueeze(1), slot)
        new_q, new_k = (rotate(x.view(batch, 1, -1, dim), span).squeeze(1) for x in (q, k))
        new_v = v.view(batch, kv_heads, dim)
        for cache, new, old in zip((keys, values), (new_k, new_v), before, strict=True):
            codes = dim * bits // 8 + 2 * dim // SCALE_COLUMNS  # and scales; padding stays as it was
            assert torch.equal(cache[:, :, slot, :codes], round_cache(new, bits)[..., :codes])
            assert torch.equal(cache[:, :, place != slot], old[:, :, place != slot])
        wide = [read_cache(rows, dim, torch.float32).double().masked_fill(unread, 0.0) for rows in before]
        for rows, new in zip(wide, (new_k, new_v), strict=True):
            rows[:, :, slot] = new.double()  # the new token's own are not rounded for itself
        seen = ((place <= slot) & (place >= first[:, None]))[:, None, None]
        grouped = new_q.double().view(batch, kv_heads, heads // kv_heads, dim)
        scores = torch.einsum("bhgd,bhsd->bhgs", grouped, wide[0]) * dim**-0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        expected = torch.einsum("bhgs,bhsd->bhgd", weights, wide[1]).reshape(batch, -1)
        bound = 2 * torch.finfo(dtype).eps * wide[1].abs().amax().item()
        assert (out.double() - expected).abs().max().item() <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (12, 4), (33, 11)])
@pytest.mark.parametrize(("batch", "tokens", "start"), [(1, 77, 0), (3, 20, 40)])
def test_prompts(
    batch: int, tokens: int, start: int, heads: int, kv_heads: int, bits: int, dim: int, dtype: torch.dtype
) -> None:
    m, capacity = batch * tokens, start + tokens + 3
    q, k, v = (normal(m, n * dim, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    positions = torch.arange(start, start + tokens, device="cuda").unsqueeze(0)
    cos, sin = (table[positions] for table in tables(capacity, dim, dtype))
    span = Span(positions[0], start + tokens, None, True, cos, sin, start)
    wanted = [x.unflatten(1, (-1, dim)).unflatten(0, (batch, tokens)) for x in (q, k, v)]
    wanted[:2] = [rotate(x, span) for x in wanted[:2]]
    empty = round_cache(normal(batch, kv_heads, capacity, dim), bits)
    keys, values = torch.full_like(empty, 255), torch.full_like(empty, 255)
    native.rotate_cache(q, k, v, keys, values, cos, sin, start, None, None, 0.0, 0.0)
    for ours, theirs in zip((q, k), wanted[:2], strict=True):
        assert torch.equal(ours, theirs.flatten(0, 1).flatten(1))
    for cache, new in zip((keys, values), wanted[1:], strict=True):
        rows = round_cache(new.transpose(1, 2), bits)
        codes = dim * bits // 8 + 2 * dim // SCALE_COLUMNS
        assert torch.equal(cache[:, :, start : start + tokens, :codes], rows[..., :codes])
        assert (cache[:, :, :start] == 255).all() and (cache[:, :, start + tokens :] == 255).all()


@pytest.mark.parametrize("act_bits", [8, None])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["fbi", "qwen3"])
def test_logits_are_near_those_of_an_exact_cache(kind: str, bits: int, act_bits: int | None, monkeypatch: Any) -> None:
    model = model_of(kind, act_bits)
    exact, rounded = Decoder(model), Decoder(model, cache_bits=bits)
    ids = torch.randint(3, 80, (3, 60), device="cuda")
    padding = torch.tensor([0, 7, 2], device="cuda")
    for chunk in (1024, 16):
        monkeypatch.setattr("bitinfer.models.decoder.CHUNK", chunk)
        logits = []
        for decoder in (exact, rounded):
            decoder.reserve(3, 256)
            found = [decoder.prefill(ids, padding)]
            for slot in range(60, 66):
                found.append(decoder.step(ids[:, slot - 60], slot, padding))
            logits.append(torch.stack(found).float())
        error = (logits[0] - logits[1]).norm() / logits[0].norm()
        assert 0 < error <= {8: 0.05, 4: 0.5}[bits]


@pytest.mark.parametrize("bits", BITS)
def test_generation(bits: int) -> None:
    model = fuse(model_of("fbi", 8), cache_bits=bits)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for lengths in ((9,), (5, 9, 2)):
        long = model.generate(**prompts(lengths), max_new_tokens=300, **options)
        assert long.shape == (len(lengths), 309)
        short = model.generate(**prompts(lengths), max_new_tokens=8, **options)
        assert torch.equal(long[:, :17], short)
