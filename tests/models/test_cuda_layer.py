"""The kernels of a decoded token, each against torch in float64 or against the ops they join, and layers made of them.

Outputs are poisoned, and so are the slots of a cache that no kernel may read.
"""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from cuda_models import KINDS, model_of, prompts
from cuda_problems import CUDA, fresh_seed, make, normal, poisoned, require_cuda
from torch import Tensor

from bitinfer.backends.reference import unpack_activations
from bitinfer.models import Decoder, cuda_layer, fuse
from bitinfer.models import generation as loop
from bitinfer.models.cache import Span
from bitinfer.models.layers import rotate, write
from bitinfer.testing.problems import FBI, GROUPS, ONEBIT, PLAIN, ROW

require_cuda()

native = torch.ops.bitinfer_native
DTYPES = (torch.float16, torch.bfloat16)
EPS = 1e-6


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------------------------------------------ attention
def rms_norm(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """Return what transformers' norms of the LLaMA family return."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def tables(capacity: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, dim, 2, device="cuda") / dim)
    angles = torch.outer(torch.arange(capacity, device="cuda"), frequencies).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def check_attention(
    dtype: torch.dtype,
    dim: int,
    heads: int,
    kv_heads: int,
    batch: int,
    capacity: int,
    slot: int,
    padding: list[int] | None,
    norms: bool,
    settled: bool = False,
) -> None:
    """Run one problem with every slot that must not be read full of NaN."""
    torch.manual_seed(fresh_seed())
    group = heads // kv_heads
    q, k, v = (normal(batch, n * dim, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    cos, sin = tables(capacity, dim, dtype)
    q_norm, k_norm = (normal(dim, dtype=dtype) if norms else None for _ in range(2))
    keys, values = (normal(batch, kv_heads, capacity, dim, dtype=dtype) for _ in range(2))
    first = torch.tensor(padding or [0] * batch, device="cuda")
    place = torch.arange(capacity, device="cuda")
    unread = (place < first[:, None]) | (place >= slot)
    for cache in (keys, values):
        cache.masked_fill_(unread[:, None, :, None], float("nan"))
    before = keys.clone(), values.clone()
    slots = torch.tensor([slot], device="cuda")
    torch.cuda.synchronize()
    out = poisoned(
        lambda: native.decode_attention(
            *(q, k, v, keys, values, cos, sin, slots, None if padding is None else first, q_norm, k_norm),
            *(EPS, EPS, dim**-0.5, settled),
        )
    )

    at = slot - first
    span = Span(slots, slot + 1, None, False, cos[at].unsqueeze(1), sin[at].unsqueeze(1), slot)
    turned = []
    for x, norm in ((q, q_norm), (k, k_norm)):
        x = x.view(batch, 1, -1, dim)
        turned.append(rotate(x if norm is None else rms_norm(x, norm), span).squeeze(1))
    new_q, new_k = turned
    eps = torch.finfo(dtype).eps
    if norms:  # whose sums have an order of their own
        torch.testing.assert_close(keys[:, :, slot], new_k, rtol=4 * eps, atol=8 * eps)
    else:
        assert torch.equal(keys[:, :, slot], new_k)
    assert torch.equal(values[:, :, slot], v.view(batch, kv_heads, dim))
    others = place != slot
    for cache, old in zip((keys, values), before, strict=True):
        assert torch.equal(cache[:, :, others].nan_to_num(7.0), old[:, :, others].nan_to_num(7.0))

    read = place <= slot
    seen = (read & (place >= first[:, None]))[:, None, None]
    wide_k, wide_v = (c.double().masked_fill(~seen[:, :, 0, :, None], 0.0) for c in (keys, values))
    scores = torch.einsum("bhgd,bhsd->bhgs", new_q.double().view(batch, kv_heads, group, dim), wide_k) * dim**-0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = torch.einsum("bhgs,bhsd->bhgd", weights, wide_v).reshape(batch, -1)
    assert out.shape == q.shape and out.dtype == dtype
    bound = 2 * eps * wide_v.abs().amax().item() * (4 if norms else 1)
    assert (out.double() - expected).abs().max().item() <= bound


PLACES = [
    pytest.param(256, 0, None, id="first slot"),
    pytest.param(256, 255, None, id="last slot"),
    pytest.param(256, 1, None, id="one before"),
    pytest.param(512, 300, [0, 300, 17, 299, 1], id="padding"),
    pytest.param(768, 511, None, id="context 512"),
    pytest.param(2304, 2100, [5, 0, 2000, 64, 2099], id="long"),
    pytest.param(40, 39, None, id="small"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("capacity", "slot", "padding"), PLACES)
def test_attention(capacity: int, slot: int, padding: list[int] | None, dim: int, dtype: torch.dtype) -> None:
    for (heads, kv_heads), batch in zip(
        ((32, 32), (4, 4), (8, 2), (8, 1), (4, 2), (6, 2), (5, 1), (14, 2)), itertools.cycle((1, 3, 2, 5)), strict=False
    ):
        norms = kv_heads == 2
        print(heads, kv_heads, batch)
        check_attention(
            dtype, dim, heads, kv_heads, batch, capacity, slot, None if padding is None else padding[:batch], norms
        )


@pytest.mark.parametrize("batch", [8, 64])
@pytest.mark.parametrize("heads", [(32, 32), (32, 4)], ids=str)
def test_attention_of_many_sequences(heads: tuple[int, int], batch: int) -> None:
    padding = torch.randint(0, 300, (batch,)).tolist()
    check_attention(torch.float16, 128, *heads, batch, 512, 301, padding, False)
    check_attention(torch.bfloat16, 64, *heads, batch, 512, 511, None, False, settled=True)


def test_attention_with_large_scores() -> None:
    """A softmax whose largest score is far above or below that of the new token."""
    dim, capacity, slot = 128, 512, 400
    cos, sin = torch.ones(capacity, dim).cuda().half(), torch.zeros(capacity, dim).cuda().half()
    q = torch.full((1, dim), 8.0, device="cuda", dtype=torch.float16)
    for mine, best in ((-8.0, 8.0), (8.0, -8.0)):
        keys = torch.full((1, 1, capacity, dim), mine, device="cuda", dtype=torch.float16)
        keys[:, :, 123] = best
        values = normal(1, 1, capacity, dim)
        new = torch.full((1, dim), mine, device="cuda", dtype=torch.float16)
        value = normal(1, dim)
        torch.cuda.synchronize()
        out = native.decode_attention(
            q, new, value, keys, values, cos, sin, torch.tensor([slot]).cuda(), *[None] * 3, 0, 0, dim**-0.5, False
        )
        chosen = keys[0, 0, : slot + 1, 0] == 8
        expected = values[0, 0, : slot + 1][chosen].double().mean(0)
        torch.testing.assert_close(out[0].double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (5, 5), (12, 4), (33, 11)])
@pytest.mark.parametrize(("batch", "tokens", "start"), [(1, 1, 0), (1, 77, 0), (3, 20, 40), (2, 1, 99)])
def test_prompts_turned_and_cached(
    batch: int, tokens: int, start: int, heads: int, kv_heads: int, dim: int, normed: bool, dtype: torch.dtype
) -> None:
    """To the bit what torch makes of them; with norms, whose sums may be of another order, to one rounding."""
    m, capacity = batch * tokens, start + tokens + 3
    q, k, v = (normal(m, n * dim, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    q, k, v = (torch.cat((x, x), 1)[:, : x.shape[1]] if heads == 5 else x for x in (q, k, v))  # rows with a stride
    q_norm, k_norm = (normal(dim, dtype=dtype) if normed else None for _ in range(2))
    of_sequence = batch if tokens == 20 else 1
    positions = torch.arange(start, start + tokens, device="cuda") - torch.arange(of_sequence, device="cuda")[:, None]
    cos, sin = (table[positions.clamp_min(0)] for table in tables(capacity, dim, dtype))
    span = Span(torch.arange(start, start + tokens, device="cuda"), start + tokens, None, True, cos, sin, start)

    def heads_of(x: Tensor, norm: Tensor | None) -> Tensor:
        x = x.unflatten(1, (-1, dim)).unflatten(0, (batch, tokens))
        return x if norm is None else rms_norm(x, norm)

    expected = rotate(heads_of(q, q_norm), span).flatten(0, 1).flatten(1)
    caches = [torch.full((batch, kv_heads, capacity, dim), float("nan"), dtype=dtype, device="cuda") for _ in range(4)]
    write(caches[0], rotate(heads_of(k, k_norm), span), span)
    write(caches[1], heads_of(v, None), span)
    native.rotate_cache(q, k, v, *caches[2:], cos, sin, start, q_norm, k_norm, EPS, EPS)
    tolerance = 2 * torch.finfo(dtype).eps if normed else 0.0
    for ours, theirs in ((q, expected), (caches[2], caches[0]), (caches[3], caches[1])):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=4 * tolerance, equal_nan=True)


def test_attention_refuses_what_it_cannot_do() -> None:
    cos = sin = normal(64, 32)
    keys = normal(1, 2, 64, 32)
    row, slot = normal(1, 64), torch.zeros(1, dtype=torch.long, device="cuda")
    with pytest.raises(RuntimeError, match="head_dim 64 or 128"):
        native.decode_attention(row, row, row, keys, keys.clone(), cos, sin, slot, *[None] * 3, 0, 0, 1.0, False)
    with pytest.raises(RuntimeError, match="k must have shape"):
        native.decode_attention(row, row[:, :32], row, keys, keys, cos, sin, slot, *[None] * 3, 0, 0, 1.0, False)


# ------------------------------------------------------------------------------------------------------- rows and packs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [64, 768, 2048, 4096, 5120, 8192, 200, 8])
@pytest.mark.parametrize("m", [1, 3, 8, 65])
def test_rows(m: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(fresh_seed())
    eps = torch.finfo(dtype).eps
    x, residual, weight = normal(m, k, dtype=dtype), normal(m, 2 * k, dtype=dtype)[:, :k], normal(k, dtype=dtype)
    torch.cuda.synchronize()
    for other in (residual, None):
        y, hidden = poisoned(lambda other=other: native.rms_norm(x, other, weight, EPS))
        total = x if other is None else x + other
        assert torch.equal(hidden, total) if other is not None else hidden.numel() == 0
        torch.testing.assert_close(y, rms_norm(total, weight), rtol=2 * eps, atol=0)
    y = poisoned(lambda: native.silu_mul(x, residual))
    torch.testing.assert_close(y, torch.nn.functional.silu(x) * residual, rtol=2 * eps, atol=1e-7)


FACTORS = {
    "fbi": [(True, True)] * 3,
    "onebit": [(True, False)] * 2,
    "none": [(False, False)],
    "mixed": [(False, True), (True, False), (True, True)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize(("bits", "block", "group"), [(8, 0, 0), (4, 0, 0), (2, 0, 0), (1, 0, 0), (8, 256, 128)])
@pytest.mark.parametrize("k", [128, 768, 2048, 4096, 8192, 200, 11008])
def test_norms_packed_for_several(k: int, bits: int, block: int, group: int, factors: str, dtype: torch.dtype) -> None:
    torch.manual_seed(fresh_seed())
    wanted = FACTORS[factors]
    in_scale = [normal(1, k, dtype=dtype) if scales else None for scales, _ in wanted]
    in_shift = [normal(1, k, dtype=dtype) if shifts else None for _, shifts in wanted]
    weight = normal(k, dtype=dtype)
    for m, with_residual in ((1, True), (1, False), (3, True), (8, True), (64, True)):
        x, residual = normal(m, k, dtype=dtype), normal(m, k, dtype=dtype) if with_residual else None
        torch.cuda.synchronize()
        planes, scale, total, shift, hidden = poisoned(
            lambda x=x, residual=residual: native.rms_norm_packs(
                x, residual, weight, EPS, in_scale, in_shift, bits, block, group
            )
        )
        summed = x if residual is None else x + residual
        assert torch.equal(hidden, summed) if with_residual else hidden.numel() == 0
        for i in range(len(wanted)):
            tail = (in_scale[i], in_shift[i], bits, block, group)
            expected = CUDA.rms_norm_pack_activations(x, residual, weight, EPS, *tail)
            # norms that sum in another order may round an activation to its neighbour
            difference = unpack_activations(planes[i], k) - unpack_activations(expected[0], k)
            apart = difference.abs() if bits > 1 else difference.abs() // 2
            assert apart.max().item() <= 1 + (dtype == torch.bfloat16), i
            assert (apart > 0).float().mean().item() < 0.02
            torch.testing.assert_close(scale[i], expected[1], rtol=torch.finfo(dtype).eps, atol=0)
            if not group and not block:  # sums belong to the integers that are there
                assert torch.equal(total[i, :, 0], unpack_activations(planes[i], k).sum(-1).int())
            if in_shift[i] is not None:
                wide = rms_norm(summed, weight).double() * in_shift[i].double()
                error = (shift[i] - wide.sum(-1, keepdim=True)).abs()
                assert (error <= torch.finfo(dtype).eps * wide.abs().sum(-1, keepdim=True)).all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_rows_that_are_not_finite_show(bad: float) -> None:
    x, weight = normal(3, 4096), normal(4096)
    x[1, 77] = bad
    torch.cuda.synchronize()
    _, scale, _, _, _ = native.rms_norm_packs(x, None, weight, EPS, [None], [None], 8, 0, 0)
    assert scale[0, 1].isnan().all() and scale[0, [0, 2]].isfinite().all()


# ------------------------------------------------------------------------------------------------------ several at once
WIDTHS = ([4096, 4096, 4096], [4096, 1024, 1024], [11008, 11008], [768, 768, 768], [40, 8], [17, 300, 1], [64])
SHARED = {"fbi": FBI, "onebit": ONEBIT, "row": ROW, "plain": PLAIN, "groups": GROUPS}


@pytest.mark.parametrize("layout", SHARED)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("k", [4096, 768, 5120, 11008, 200])
def test_several_products_are_those_of_each(k: int, widths: list[int], layout: str) -> None:
    seed = fresh_seed()
    for m in (1, 2, 4, 5, 8, 33):
        made = [make(m, n, k, SHARED[layout], bias=i % 2 == 1, seed=seed + i) for i, n in enumerate(widths)]
        weights = [w for _, w in made]
        names = ("scale", "in_scale", "in_shift", "group_shift", "bias")
        scales, in_scales, in_shifts, shifts, biases = ([getattr(w, name) for w in weights] for name in names)
        signs, first = [w.signs for w in weights], weights[0]
        torch.cuda.synchronize()
        x = made[0][0]
        tail = (shifts, biases, first.group_size, first.norm_eps)
        ys = poisoned(partial(native.sign_gemm_several, x, signs, k, scales, in_scales, in_shifts, *tail))
        for y, w in zip(ys, weights, strict=True):
            columns = (w.scale, w.in_scale, w.in_shift, w.group_shift, w.bias)
            assert torch.equal(y, CUDA.sign_gemm(x, w.signs, k, *columns, w.group_size, w.norm_eps))
        for bits in (8, 4, 1) if m < 5 else (8,):
            packs = [
                CUDA.pack_activations(made[i][0], w.in_scale, w.in_shift, bits, 0, w.group_size)
                for i, w in enumerate(weights)
            ]
            planes, scale, total, shift = (list(part) for part in zip(*packs, strict=True))
            shift = [None if w.in_shift is None else s for w, s in zip(weights, shift, strict=True)]
            torch.cuda.synchronize()
            heads = (planes, scale, total, shift, signs, k, scales)
            tail = (shifts, biases, first.group_size, 0, first.norm_eps, torch.float16)
            ys = poisoned(partial(native.popcount_gemm_several, *heads, *tail))
            for i, (y, w) in enumerate(zip(ys, weights, strict=True)):
                tail = (w.scale, w.group_shift, w.bias, w.group_size, 0, w.norm_eps, torch.float16)
                one = CUDA.popcount_gemm(planes[i], scale[i], total[i], shift[i], w.signs, k, *tail)
                assert torch.equal(y, one), (m, bits, i)


# --------------------------------------------------------------------------------------------------------------- layers
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act_bits", [8, None, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_layer_in_torch(kind: str, act_bits: int | None, dtype: torch.dtype) -> None:
    """Two layers give what they give in torch, to a few roundings, and write the same keys and values."""
    model = model_of(kind, act_bits, dtype)
    decoder = Decoder(model)
    within = []
    for batch, padding in ((1, None), (3, [0, 7, 2]), (8, None)):
        cache = decoder.reserve(batch, 256)
        first = None if padding is None else torch.tensor(padding, device="cuda")
        generator = torch.Generator("cuda").manual_seed(fresh_seed())
        ids = torch.randint(3, 80, (batch, 12), device="cuda", generator=generator)
        decoder.prefill(ids, first)
        assert cuda_layer.takes(decoder.layers, decoder.norm, cache)
        x = torch.randn(batch, 256, device="cuda", generator=generator).to(dtype)
        saved = cache.keys.clone(), cache.values.clone()
        span = decoder._span(12, 1, first)
        expected = x.unsqueeze(1)
        for layer, keys, values in zip(decoder.layers, cache.keys, cache.values, strict=True):
            expected = layer(expected, keys, values, span)
        written = cache.keys[:, :, :, 12].clone(), cache.values[:, :, :, 12].clone()
        cache.keys.copy_(saved[0])
        cache.values.copy_(saved[1])
        step = cuda_layer.Step(torch.tensor([12], device="cuda"), first, decoder.cos, decoder.sin)
        torch.cuda.synchronize()
        out, residual = x, None
        for layer, keys, values in zip(decoder.layers, cache.keys, cache.values, strict=True):
            out, residual = cuda_layer.CudaLayer(layer)(out, residual, keys, values, step)
        total = out.float() + residual.float()
        expected = expected.squeeze(1).float()
        # int8 rounds to steps of absmax / 127: a value that falls to the other side moves the sum a little
        tolerance = {None: 8, 8: 40, 4: 40}[act_bits] * torch.finfo(dtype).eps * expected.abs().max().item()
        error = (total - expected).abs().amax(-1)
        within += (error <= tolerance).tolist()
        assert act_bits == 4 or all(within)
        assert (error <= 2 * expected.abs().max()).all()
        for new, old in zip((cache.keys, cache.values), written, strict=True):
            assert (new[:, :, :, 12].float() - old.float()).abs().max() <= tolerance + 0.05 * old.float().abs().max()
    # a step of int4 is an eighth of the largest number: one that falls to the other side changes a whole sequence
    assert sum(within) >= len(within) / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act_bits", [8, None])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_those_of_torch(kind: str, act_bits: int | None, dtype: torch.dtype, monkeypatch: Any) -> None:
    """Prompts in one piece, and in chunks that see what came before, give the logits of the layers in torch."""
    decoder = Decoder(model_of(kind, act_bits, dtype))
    for padding in (None, [0, 7, 2]):
        first = None if padding is None else torch.tensor(padding, device="cuda")
        ids = torch.randint(3, 80, (3, 150), device="cuda")
        decoder.reserve(3, 256)
        with monkeypatch.context() as patch:
            patch.setattr(cuda_layer, "takes", lambda *arguments: False)
            expected = decoder.prefill(ids, first).float()
        tolerance = {None: 8, 8: 40}[act_bits] * torch.finfo(dtype).eps * expected.abs().max().item()
        for chunk in (1024, 16):
            monkeypatch.setattr("bitinfer.models.decoder.CHUNK", chunk)
            assert (decoder.prefill(ids, first).float() - expected).abs().max().item() <= tolerance


def test_layers_that_the_kernels_do_not_take() -> None:
    def taken(**sizes: Any) -> bool:
        model = model_of("fbi", 8, **sizes)
        decoder = Decoder(model)
        cache = decoder.reserve(1, 16)
        return cuda_layer.takes(decoder.layers, decoder.norm, cache)

    assert taken()
    assert not taken(head_dim=32)
    assert not taken(num_attention_heads=16, num_key_value_heads=1)
    model = model_of("fbi", 8, torch.float32)
    decoder = Decoder(model)
    assert not cuda_layer.takes(decoder.layers, decoder.norm, decoder.reserve(1, 16))
    model = model_of("fbi", 8)
    decoder = Decoder(model)
    cache = decoder.reserve(1, 16)
    model.model.layers[1].mlp.up_proj.act_bits = 4
    assert not cuda_layer.takes(decoder.layers, decoder.norm, cache)
    cpu = model_of("fbi", 8).cpu()
    decoder = Decoder(cpu)
    assert not cuda_layer.takes(decoder.layers, decoder.norm, decoder.reserve(1, 16))


# ----------------------------------------------------------------------------------------------------------- generation
@pytest.mark.parametrize("act_bits", [8, None])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "biases"])  # which fuse() does not know
@pytest.mark.parametrize("lengths", [(9,), (5, 9, 2)], ids=str)
def test_tokens_in_graphs(lengths: tuple[int, ...], kind: str, act_bits: int | None, monkeypatch: Any) -> None:
    """The same as these kernels without a graph; and as the layers in torch, up to a tie within rounding."""
    model = fuse(model_of(kind, act_bits))
    inputs = prompts(lengths)
    options = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ran = []
    run = cuda_layer.run
    monkeypatch.setattr(cuda_layer, "run", lambda *args: ran.append(1) or run(*args))
    in_graphs = model.generate(**inputs, **options)
    assert len(ran) == 2  # once as it is, once into the graph
    loop._decoders.clear()
    monkeypatch.setattr(loop, "_Captured", lambda step: step)
    assert torch.equal(model.generate(**inputs, **options), in_graphs)
    assert len(ran) == 2 + 63
    monkeypatch.setattr(loop._Call, "fits_graphs", lambda call: False)
    by_step = model.generate(**inputs, **options)
    assert len(ran) == 2 + 63
    for row, (ours, theirs) in enumerate(zip(in_graphs, by_step, strict=True)):
        if torch.equal(ours, theirs):
            continue
        at = int((ours != theirs).nonzero()[0])
        ids = ours[None, max(lengths) - lengths[row] : at]
        logits = model(ids).logits[0, -1].float()
        gap = (logits.max() - logits[torch.stack((ours[at], theirs[at]))].min()).item()
        # int8 passes a rounding to the other side on as a whole step
        assert gap <= (0.05 if act_bits is None else 0.15) * logits.std().item(), f"row {row} differs at {at} by {gap}"


def test_a_cache_that_grows_and_a_second_call() -> None:
    model = fuse(model_of("fbi", 8))
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    short = model.generate(**prompts((9,)), max_new_tokens=8, **options)
    long = model.generate(**prompts((9,)), max_new_tokens=400, **options)
    assert long.shape[1] == 409 and torch.equal(long[:, :17], short)
    assert torch.equal(model.generate(**prompts((9,)), max_new_tokens=8, **options), short)


def test_a_layer_takes_nine_kernels_at_most() -> None:
    for act_bits, most in ((8, 9), (None, 8)):
        model = model_of("fbi", act_bits)
        decoder = Decoder(model)
        cache = decoder.reserve(1, 256)
        step = cuda_layer.Step(torch.tensor([5], device="cuda"), None, decoder.cos, decoder.sin)
        x = normal(1, 256)
        layer = cuda_layer.CudaLayer(decoder.layers[0])
        layer(x, x, cache.keys[0], cache.values[0], step)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            layer(x, x, cache.keys[0], cache.values[0], step)
            torch.cuda.synchronize()
        kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        names = [kernel.name for kernel in kernels if "bitinfer" in kernel.name]
        assert 0 < len(names) <= most and len(names) == len(kernels), names


# ------------------------------------------------------------------------------------------------------ greedy decoding
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize(("batch", "vocabulary"), [(1, 5), (1, 32000), (3, 8191), (64, 1000)])
def test_the_likeliest_token(batch: int, vocabulary: int, dtype: torch.dtype, penalty: float) -> None:
    torch.manual_seed(fresh_seed())
    logits = normal(batch, vocabulary, dtype=dtype)
    seen = torch.rand(batch, vocabulary, device="cuda") < 0.3
    finished = torch.arange(batch, device="cuda") % 3 == 2
    wide = logits.float()
    scores = torch.where(seen, torch.where(wide < 0, wide * penalty, wide / penalty), wide)
    scores = scores if penalty != 1 else wide
    best = scores == scores.amax(-1, keepdim=True)
    expected = best.int().argmax(-1)  # the first
    ends = expected[:1].clone()
    expected = expected.masked_fill(finished, 4)
    tokens, slot = torch.full((batch,), -1, device="cuda"), torch.tensor([7], device="cuda")
    marked, done = seen.clone(), finished.clone()
    pad = torch.tensor(4, device="cuda")
    native.choose_greedy(logits, penalty, None if penalty == 1 else marked, done, ends, pad, tokens, slot)
    assert torch.equal(tokens, expected) and int(slot) == 8
    assert torch.equal(done, finished | (expected == ends))
    if penalty != 1:
        assert torch.equal(marked, seen.scatter(1, expected[:, None], True))
    logits[0, 3] = float("nan")
    native.choose_greedy(logits, 1.0, None, torch.zeros_like(done), None, pad, tokens, None)
    assert int(tokens[0]) == 3 and int(slot) == 8
