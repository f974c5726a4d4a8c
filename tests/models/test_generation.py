"""Fused generation gives what transformers' own loop gives on the same packed model, in both of its loops."""

from typing import Any

import pytest
import torch
from packed_models import SIZES, llama, pack
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.generation.streamers import BaseStreamer

import bitinfer
from bitinfer import WeightLayout
from bitinfer.models import Decoder, fuse, unfuse
from bitinfer.models import generation as loop
from bitinfer.models.decoder import CHUNK
from bitinfer.models.sampling import Sampling

FBI = WeightLayout(tensors=("in_scale", "in_shift"))
ONEBIT = WeightLayout(tensors=("weight_scale", "in_scale"), norm_eps=1e-5)
KINDS = ("llama", "qwen3", "onebit")


def build(kind: str, act_bits: int | None = None, **sizes: Any) -> Any:
    """Return a tiny packed model whose logits differ enough for greedy decoding to be the same in any order of sums."""
    if kind == "qwen3":
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "head_dim": 32, **sizes})).eval()
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                torch.nn.init.normal_(parameter, std=0.2)
    else:
        model = llama(**sizes)
    return pack(model, ONEBIT if kind == "onebit" else FBI, act_bits=act_bits)


def batch(model: Any, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Return random prompts of these lengths, padded on the left."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, model.config.vocab_size, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths).unsqueeze(1)
    return {"input_ids": ids.where(mask, 0), "attention_mask": mask.long()}


@pytest.fixture(params=["by step", "static"])
def either_loop(request, monkeypatch):
    """Run a test in the loop that looks at each token, and in the one that graphs are made of, without the graph."""
    calls = []
    if request.param == "static":
        monkeypatch.setattr(loop._Call, "fits_graphs", lambda call: calls.append(call) or True)
    yield request.param
    assert calls or request.param != "static"


OPTIONS = [
    {"do_sample": False},
    {"do_sample": False, "repetition_penalty": 1.3},
    {"do_sample": True, "temperature": 0.8},
    {"do_sample": True, "top_k": 5, "repetition_penalty": 1.2},
    {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", [(7,), (5, 9, 2)], ids=str)
def test_the_same_tokens_as_transformers(lengths, options, either_loop):
    model = build("llama")
    inputs = batch(model, lengths)
    options = {"max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": None, **options}
    torch.manual_seed(3)
    expected = model.generate(**inputs, **options)
    fuse(model)
    torch.manual_seed(3)
    assert torch.equal(model.generate(**inputs, **options), expected)


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_models(kind, act_bits, either_loop):
    model = build(kind, act_bits)
    inputs = batch(model, (6, 3))
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    assert torch.equal(fuse(model).generate(**inputs, **options), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_logits(kind):
    model = build(kind)
    inputs = batch(model, (9, 4))
    decoder = Decoder(model)
    decoder.reserve(2, 12)
    padding = torch.tensor([0, 5])
    logits = [decoder.prefill(inputs["input_ids"], padding)]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for slot in range(9, 12):
        tokens = logits[-1].argmax(-1)
        ids = torch.cat([ids, tokens[:, None]], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        if slot < 11:
            logits.append(decoder.step(tokens, slot, padding))
        else:
            logits.append(decoder.step_anywhere(tokens, torch.tensor([slot]), padding))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits[:, 8:]
    torch.testing.assert_close(torch.stack(logits, 1), expected, rtol=1e-4, atol=1e-4)


def test_long_prompts_go_in_chunks(monkeypatch):
    model = build("llama", max_position_embeddings=128)
    inputs = batch(model, (50, 33))
    padding = torch.tensor([0, 17])
    decoder = Decoder(model)
    decoder.reserve(2, 64)
    whole = decoder.prefill(inputs["input_ids"], padding)
    monkeypatch.setattr("bitinfer.models.decoder.CHUNK", 16)
    torch.testing.assert_close(decoder.prefill(inputs["input_ids"], padding), whole)
    assert CHUNK > 50


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.clone())

    def end(self) -> None:
        self.ended = True


def test_sequences_that_end_are_padded_and_stop_the_loop(either_loop):
    model = build("llama")
    inputs = batch(model, (4, 6))
    free = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None)
    ends = [int(free[0, 6 + 3]), int(free[1, 6 + 8])]  # a token that each of them comes to
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 1, "eos_token_id": ends}
    expected = model.generate(**inputs, **options)
    assert expected.shape[1] < free.shape[1]
    assert torch.equal(fuse(model).generate(**inputs, **options), expected)


def test_streamers_hear_of_every_token(either_loop):
    model = fuse(build("llama"))
    inputs = batch(model, (5,))
    streamer = Recorder()
    ids = model.generate(
        **inputs, max_new_tokens=9, do_sample=False, streamer=streamer, pad_token_id=0, eos_token_id=None
    )
    assert torch.equal(torch.cat([value.flatten() for value in streamer.seen]), ids[0]) and streamer.ended


def test_what_is_not_known_goes_to_transformers(monkeypatch):
    model = build("llama")
    inputs = batch(model, (5,))
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**inputs, **options, num_beams=2, do_sample=False)
    scores = model.generate(**inputs, **options, do_sample=False, return_dict_in_generate=True, output_scores=True)
    fuse(model)
    monkeypatch.setattr(loop, "_Call", None)  # nothing may come to it
    assert torch.equal(model.generate(**inputs, **options, num_beams=2, do_sample=False), expected)
    again = model.generate(**inputs, **options, do_sample=False, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(again.sequences, scores.sequences) and len(again.scores) == 6
    holes = {**inputs, "attention_mask": torch.tensor([[1, 0, 1, 1, 1]])}
    model.generate(**holes, **options, do_sample=False)


def test_criteria_of_transformers_stop_it():
    model = fuse(build("llama"))
    inputs = batch(model, (5,))

    def enough(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(ids),), ids.shape[1] >= 8)

    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert model.generate(**inputs, **options, stopping_criteria=[enough]).shape[1] == 8


def test_the_distribution_that_is_sampled():
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, -3.0]])
    choice = Sampling(sample=True, temperature=1.3, top_k=4, top_p=0.9)
    torch.manual_seed(0)
    drawn = torch.cat([choice.choose(logits.expand(4000, 5), None) for _ in range(5)])
    kept = (logits[0] / 1.3).softmax(-1)[:3]  # the fourth is the tail beyond 0.9 of what top-k left
    expected = torch.cat([kept / kept.sum(), torch.zeros(2)])
    observed = torch.bincount(drawn, minlength=5) / len(drawn)
    assert torch.allclose(observed, expected, atol=0.015), (observed, expected)
    assert int(Sampling().choose(logits, None)) == 0
    seen = torch.tensor([[True, False, False, False, False]])
    assert int(Sampling(repetition_penalty=4.0).choose(logits, seen)) == 1


def test_fuse_and_unfuse(tmp_path):
    model = build("llama")
    kind, state = type(model), {name: t.clone() for name, t in model.state_dict().items() if t.dtype != torch.uint32}
    assert fuse(model) is model and fuse(model) is model
    assert type(model).__name__ == kind.__name__ and isinstance(model, kind)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in state.items())
    inputs = batch(model, (5,))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    model.save_pretrained(tmp_path / "saved")
    again, _ = bitinfer.load(tmp_path / "saved")
    assert type(again) is kind and torch.equal(again.generate(**inputs, **options), expected)
    assert type(unfuse(model)) is kind and model not in loop._decoders
    assert torch.equal(model.generate(**inputs, **options), expected)


def test_caches_are_kept_and_follow_the_model():
    model = fuse(build("llama", max_position_embeddings=1024))
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model.generate(**batch(model, (5,)), max_new_tokens=4, **options)
    cache = loop._decoders[model].cache
    model.generate(**batch(model, (9,)), max_new_tokens=8, **options)
    assert loop._decoders[model].cache is cache
    model.generate(**batch(model, (9, 9)), max_new_tokens=8, **options)
    assert loop._decoders[model].cache is not cache
    model.to(torch.bfloat16)
    model.generate(**batch(model, (9, 9)), max_new_tokens=8, **options)
    assert loop._decoders[model].cache.keys.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: setattr(m.config, "model_type", "gpt2"), "'gpt2'"),
        (lambda m: setattr(m.config, "hidden_act", "gelu"), "gelu"),
        (lambda m: m.config.rope_parameters.update(rope_type="dynamic"), "dynamic"),
        (lambda m: delattr(m.model.layers[1].mlp, "up_proj"), "layer 1 has no mlp.up_proj"),
    ],
)
def test_models_that_cannot_be_fused_say_why(change, says):
    model = build("llama")
    change(model)
    with pytest.raises(ValueError, match=says):
        fuse(model)


def test_a_dense_model_says_what_to_do():
    with pytest.raises(ValueError, match="convert it"):
        fuse(llama())
