"""generate: the tokens are those of transformers, text is streamed whole, and options do what they say."""

import time

import pytest
import tiny_models

from bitinfer import convert, load
from bitinfer.generate import Generation, encode_prompt, generate


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed model and its tokenizer, which has a chat template."""
    root = tmp_path_factory.mktemp("generate")
    source = tiny_models.dense(root / "dense", chat=True)
    return load(convert(source, root / "packed", format="latent").path)


def test_greedy_tokens_are_those_of_transformers(packed):
    import torch

    model, tokenizer = packed
    pieces: list[str] = []
    result = generate(model, tokenizer, "The lamp", max_new_tokens=20, chat=False, on_text=pieces.append)
    ids = torch.tensor([tokenizer("The lamp")["input_ids"]])
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    assert result.token_ids == expected and result.prompt_tokens == ids.shape[1]
    assert result.text == tokenizer.decode(expected, skip_special_tokens=True) == "".join(pieces)


def test_the_chat_template_is_used_unless_told_otherwise(packed):
    _, tokenizer = packed
    plain = encode_prompt(tokenizer, "The lamp", chat=False)
    templated = encode_prompt(tokenizer, "The lamp")
    assert templated == encode_prompt(tokenizer, "The lamp", chat=True)
    assert templated == [0, *plain, 1, 0]  # <s> ... </s> <s>


def test_sampling_is_repeatable_and_has_its_limits(packed):
    model, tokenizer = packed
    options = {"max_new_tokens": 24, "temperature": 1.5}
    first, again, other = (generate(model, tokenizer, "sea", seed=seed, **options).token_ids for seed in (1, 1, 2))
    assert first == again != other
    greedy = generate(model, tokenizer, "sea", max_new_tokens=24).token_ids
    assert generate(model, tokenizer, "sea", seed=3, top_k=1, **options).token_ids == greedy
    assert generate(model, tokenizer, "sea", seed=3, top_p=1e-6, **options).token_ids == greedy


def test_token_ids_without_a_tokenizer(packed):
    model, _ = packed
    pieces: list[str] = []
    result = generate(model, None, [5, 6, 7], max_new_tokens=6, on_text=pieces.append)
    assert result.text is None and result.prompt_tokens == 3
    assert [int(piece) for piece in pieces] == result.token_ids


def test_times_are_those_of_the_run(packed):
    model, tokenizer = packed
    start = time.perf_counter()
    result = generate(model, tokenizer, "sea", max_new_tokens=5)
    assert 0 < result.time_to_first_token < result.seconds <= time.perf_counter() - start
    made = Generation("x", [1, 2, 3], 10, 0.5, 1.5)
    assert made.prefill_tokens_per_second == 20 and made.decode_tokens_per_second == 2
    assert Generation("x", [1], 10, 0.5, 0.5).decode_tokens_per_second is None
    assert made.to_dict()["decode_tokens_per_second"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p must be above 0"),
        ({"top_k": -1}, "top_k must be 0"),
    ],
)
def test_options_out_of_range(packed, options, message):
    with pytest.raises(ValueError, match=message):
        generate(*packed, "sea", **options)


def test_prompts_that_cannot_be_used(packed):
    model, tokenizer = packed
    with pytest.raises(ValueError, match=r"no tokenizer.*--token-ids"):
        generate(model, None, "sea")
    with pytest.raises(ValueError, match="it has no tokens"):
        generate(model, tokenizer, "", chat=False)
    with pytest.raises(ValueError, match="token ids must lie in 0 to"):
        generate(model, None, [1, 99_999])
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(ValueError, match="has no chat template"):
            generate(model, tokenizer, "sea", chat=True)
        assert encode_prompt(tokenizer, "sea") == tokenizer("sea")["input_ids"]
    finally:
        tokenizer.chat_template = template
