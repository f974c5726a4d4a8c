"""All layers in one native call give what the steps in torch give, for every layout, format, dtype and batch."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from packed_models import llama, pack
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from bitinfer import BinaryLinear, WeightLayout
from bitinfer.dispatch import BACKENDS, use_backend
from bitinfer.models import Decoder, cpu_layer, fuse
from bitinfer.models.cpu_layer import CpuLayers

REASON = BACKENDS["cpu"].unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

LAYOUTS = {
    "fbi": WeightLayout(tensors=("in_scale", "in_shift")),
    "onebit": WeightLayout(tensors=("weight_scale", "in_scale"), norm_eps=1e-5),
    "plain": WeightLayout(),
    "groups": WeightLayout(tensors=("weight_scale", "group_shift"), group_size=128),
    "ternary": WeightLayout(planes=2, tensors=("weight_scale",)),
}
SIZES = {
    "vocab_size": 80,
    "hidden_size": 180,
    "intermediate_size": 420,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 30,
    "max_position_embeddings": 2048,
}
LENGTHS = (9, 4, 7)


def model_of(layout: str = "fbi", dtype: torch.dtype = torch.float32, kind: str = "llama", **fields: Any) -> Any:
    """Return a packed model of awkward sizes: heads that are no whole registers, columns that are no whole words."""
    torch.manual_seed(0)
    if kind == "qwen3":
        model: Any = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    else:
        biased = kind == "biased"
        model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=biased, mlp_bias=biased))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.2)
    return pack(model.eval(), LAYOUTS[layout], dtype, **fields)


def steps(model: Any, native: bool, lengths: tuple[int, ...] = LENGTHS, count: int = 6, slots: int = 0) -> torch.Tensor:
    """Return the logits of some steps behind prompts of these lengths, ``[count, B, V]``."""
    generator = torch.Generator().manual_seed(4)
    longest = slots or max(lengths)
    ids = torch.randint(80, (len(lengths), longest), generator=generator)
    padding = longest - torch.tensor(lengths)
    given = padding if bool(padding.any()) else None
    decoder = Decoder(model)
    decoder.reserve(len(lengths), longest + count)
    assert decoder.native is not None
    if not native:
        decoder.native = None
    decoder.prefill(ids, given)
    tokens = torch.randint(80, (count, len(lengths)), generator=generator)
    return torch.stack([decoder.step(tokens[i], longest + i, given) for i in range(count)])


def same_as_torch(model: Any, *args: Any, **kwargs: Any) -> None:
    """Check steps of a float32 model: they differ by roundings, of sums whose order differs.

    Where activations are integers, one that lies at a tie may round the other way, after which its sequence differs by
    a step of the quantiser; the others still agree.
    """
    expected = steps(model, False, *args, **kwargs)
    difference = (steps(model, True, *args, **kwargs) - expected).abs().amax(-1) / expected.std()
    assert expected.std() > 0.1
    if model.config.quantization_config["act_bits"] is None:
        assert difference.max() < 1e-4, difference
    else:
        assert (difference < 1e-4).float().mean() > 0.6 and difference.max() < 0.5, difference


@pytest.mark.parametrize("act_bits", [None, 8, 4, 2, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_formats(layout, act_bits):
    same_as_torch(model_of(layout, act_bits=act_bits))


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("kind", ["qwen3", "biased"])
@pytest.mark.parametrize("layout", ["fbi", "onebit"])
def test_kinds_of_models(layout, kind, act_bits):
    same_as_torch(model_of(layout, kind=kind, act_bits=act_bits))


def test_blocks_of_activations():
    same_as_torch(model_of("groups", act_bits=8, act_block=256))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_the_head(count, dtype, monkeypatch):
    """Its product with few tokens is torch's, but for roundings."""
    model = model_of(dtype=dtype)
    actual = steps(model, True, LENGTHS[:count])
    monkeypatch.setattr(cpu_layer, "FEW_TOKENS", 0)
    expected = steps(model, True, LENGTHS[:count])
    assert actual.dtype == expected.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=2 * eps, atol=1e-5 * float(expected.abs().max()))


def test_a_head_of_another_kind_is_called(monkeypatch):
    model = model_of()
    expected = steps(model, True, (5,))
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *args: calls.append(args))
    torch.testing.assert_close(steps(model, True, (5,)), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 1 + 6  # the prompt, and every step
    handle.remove()
    model.lm_head.bias = torch.nn.Parameter(torch.full((80,), 3.0))
    torch.testing.assert_close(steps(model, True, (5,)), expected + 3, rtol=1e-5, atol=1e-5)


def test_one_sequence_without_padding():
    same_as_torch(model_of(), (7,))


def test_batches_of_several_passes():
    same_as_torch(model_of(), (5,) * 70, count=2)
    same_as_torch(model_of(act_bits=4), tuple(1 + i % 7 for i in range(70)), count=2)


def test_long_contexts_in_parts():
    """Attention works through parts of 512 slots; the second sequence has none in the first two."""
    same_as_torch(model_of(), (1200, 100, 700), count=3)


def test_every_slot_at_the_edge_of_a_part():
    same_as_torch(model_of(), (510, 3), count=5)


def exact_logits(model: Any, lengths: tuple[int, ...], count: int) -> torch.Tensor:
    """Return what :func:`steps` computes, in float64 on dense weights."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(80, (len(lengths), max(lengths)), generator=generator)
    tokens = torch.randint(80, (count, len(lengths)), generator=generator)
    ids = torch.cat([ids, tokens.T], 1)
    padding = (max(lengths) - torch.tensor(lengths)).unsqueeze(1)
    places = torch.arange(ids.shape[1])
    with torch.no_grad():
        return (
            model(ids, attention_mask=(places >= padding).long(), position_ids=(places - padding).clamp_min(0))
            .logits[:, -count:]
            .transpose(0, 1)
        )


def dense(model: Any, dtype: torch.dtype) -> Any:
    for name, module in list(model.named_modules()):
        if isinstance(module, BinaryLinear):
            model.set_submodule(name, module.dequantize(torch.float64))
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("layout", "kind"), [("fbi", "llama"), ("onebit", "llama"), ("groups", "qwen3")])
def test_errors_are_those_of_a_dense_model(layout, kind, dtype):
    """Against float64, 16-bit activations lose no more than transformers' dense model in the same dtype."""
    actual = steps(model_of(layout, dtype, kind), True).double()
    exact = exact_logits(dense(model_of(layout, dtype, kind), torch.float64), LENGTHS, 6)
    rounded = exact_logits(dense(model_of(layout, dtype, kind), dtype), LENGTHS, 6).double()
    error, allowed = (actual - exact).square().mean().sqrt(), (rounded - exact).square().mean().sqrt()
    assert error <= 1.1 * allowed, (error, allowed)
    assert allowed < 0.2 * exact.std()


def test_threads_change_nothing():
    model, threads = model_of(act_bits=8), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(steps(model, True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_other_instruction_sets(isa):
    code = (
        "import sys, torch; from test_cpu_layer import *\n"
        "try: torch.ops.bitinfer_native.cpu_isa()\n"
        "except RuntimeError as error: print(error); sys.exit(3)\n"
        "same_as_torch(model_of()); same_as_torch(model_of('onebit', kind='qwen3', act_bits=8))\n"
        "test_errors_are_those_of_a_dense_model('fbi', 'llama', torch.float16)\n"
        "test_errors_are_those_of_a_dense_model('fbi', 'llama', torch.bfloat16)\n"
    )
    folder = os.path.dirname(__file__)
    paths = os.pathsep.join([folder, os.path.dirname(folder), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "BITINFER_CPU_ISA": isa, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode == 3:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("act_bits", [None, 8])
def test_generate_takes_it_and_writes_the_same(act_bits, monkeypatch):
    model = pack(llama(max_position_embeddings=256), LAYOUTS["fbi"], act_bits=act_bits)
    ids = torch.arange(3, 15).reshape(2, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=mask, **options)
    calls = []
    step = CpuLayers.step
    monkeypatch.setattr(CpuLayers, "step", lambda self, *args: calls.append(self) or step(self, *args))
    assert torch.equal(fuse(model).generate(ids, attention_mask=mask, **options), expected)
    assert len(calls) == 39 and len(set(calls)) == 1


def test_it_follows_the_model():
    model = model_of()
    decoder = Decoder(model)
    decoder.reserve(1, 8)
    first = decoder.native
    decoder.reserve(1, 8)
    assert decoder.native is first is not None
    model.model.layers[1].mlp.up_proj.act_bits = 8
    decoder.reserve(1, 8)
    assert decoder.native is not first
    second = decoder.native
    model.to(torch.bfloat16)
    decoder.reserve(1, 8)
    assert decoder.native is not second
    with use_backend("reference"):
        decoder.reserve(1, 8)
        assert decoder.native is None
    hook = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *args: None)
    decoder.reserve(1, 8)
    assert decoder.native is None
    hook.remove()
    decoder.reserve(1, 8)
    assert decoder.native is not None
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(180, 420, bias=False, dtype=torch.bfloat16)
    decoder = Decoder(model)
    decoder.reserve(1, 8)
    assert decoder.native is None


def test_a_layer_of_another_kind_still_decodes():
    model = model_of()
    model.model.layers[1].mlp.up_proj = model.model.layers[1].mlp.up_proj.dequantize()
    expected = exact_logits(model, (6,), 1)
    decoder = Decoder(model)
    decoder.reserve(1, 8)
    generator = torch.Generator().manual_seed(4)
    decoder.prefill(torch.randint(80, (1, 6), generator=generator), None)
    actual = decoder.step(torch.randint(80, (1,), generator=generator), 6, None)
    torch.testing.assert_close(actual, expected[0], rtol=1e-4, atol=1e-4)


def test_memory_is_given_back_with_the_decoder():
    decoder = Decoder(model_of())
    decoder.reserve(1, 8)
    handle = decoder.native.handle
    del decoder
    with pytest.raises(RuntimeError, match="no decoder"):
        torch.ops.bitinfer_native.decoder_linear(handle, **_linear())


def _linear() -> dict[str, Any]:
    names = ("weight_scale", "in_scale", "in_shift", "group_shift", "bias", "norm_eps")
    return {
        "weight": torch.zeros(4, 1, dtype=torch.uint32),
        "in_features": 32,
        "group_size": 0,
        "bits": 0,
        "block_size": 0,
        **dict.fromkeys(names),
    }


def test_wrong_arguments_are_refused():
    decoder = Decoder(model_of())
    cache = decoder.reserve(2, 8)
    native, handle = torch.ops.bitinfer_native, decoder.native.handle
    good = [
        torch.zeros(2, 180),
        cache.keys,
        cache.values,
        decoder.cos,
        decoder.sin,
        3,
        torch.tensor([0, 3]),
        torch.zeros(2, 80),
    ]
    native.decoder_step(handle, *good)
    for place, value, message in (
        (0, torch.zeros(3, 180), "keys must have shape"),
        (0, torch.zeros(2, 181), "hidden must have shape"),
        (0, torch.zeros(2, 180, dtype=torch.bfloat16), "dtype"),
        (1, cache.keys[:2], "keys must have shape"),
        (3, decoder.cos[:5], "cos must have shape"),
        (5, cache.capacity, "outside of a cache"),
        (5, -1, "outside of a cache"),
        (6, torch.tensor([0, 4]), "padding of sequence 1"),
        (6, torch.tensor([-1, 0]), "padding of sequence 0"),
        (6, torch.tensor([0.0, 1.0]), "int64"),
        (7, torch.zeros(2, 81), "logits must have shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            native.decoder_step(handle, *good[:place], value, *good[place + 1 :])
    with pytest.raises(RuntimeError, match="expected 7 linear layers"):
        native.decoder_layer(handle, torch.ones(180), 1e-5, torch.ones(180), 1e-5, None, 0.0, None, 0.0)
    norm = torch.ones(180)
    for given, message in (
        ((6, 4, 32, 1.0, norm, 1e-5, None), "multiple of kv_heads"),
        ((4, 4, 31, 1.0, norm, 1e-5, None), "head_dim"),
        ((4, 4, 32, 1.0, norm[None], 1e-5, None), "one dimension"),
        ((4, 4, 32, 1.0, norm.int(), 1e-5, None), "float32, float16 or bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            native.decoder_new(*given)
