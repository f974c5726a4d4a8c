"""The model that comes with the package is there and small, writes English, and its card says what is true."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

import bitinfer
from bitinfer.cli import app
from bitinfer.evaluate import perplexity
from bitinfer.generate import generate
from bitinfer.verify import verify

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "examples" / "embedded_model"
STORY = (
    "Once upon a time, there was a little girl who lived in a small village near the forest. Every morning she walked "
    "to the river with her grandmother to fetch water. One day, they found an old wooden box under a tree."
)


@pytest.fixture(scope="module")
def loaded():
    return bitinfer.load(dtype=torch.float32)


def test_it_is_complete_and_small():
    folder = bitinfer.embedded_model()
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 16_000_000
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "generation_config.json"} <= names
    with safe_open(folder / "model.safetensors", "pt") as file:
        words = [file.get_tensor(name) for name in file.keys() if name.endswith("proj.weight")]  # noqa: SIM118
    assert all(t.dtype == torch.uint32 for t in words)
    assert sum(t.numel() * 32 for t in words) >= 70e6


def test_it_prefers_english_to_the_same_words_in_disorder(loaded):
    model, tokenizer = loaded
    disorder = " ".join(reversed(STORY.split()))
    told, shuffled = (perplexity(model, tokenizer, text).perplexity for text in (STORY, disorder))
    assert told < 60 and shuffled > 5 * told  # a model of uniform guesses has 8192


def test_it_answers_on_the_subject(loaded):
    model, tokenizer = loaded
    answer = generate(model, tokenizer, "Tell me about the moon.", max_new_tokens=48).text
    fused = generate(bitinfer.fuse(model), tokenizer, "Tell me about the moon.", max_new_tokens=48).text
    assert (
        fused
        == answer
        == generate(bitinfer.unfuse(model), tokenizer, "Tell me about the moon.", max_new_tokens=48).text
    )
    assert "moon" in answer.lower() and len(set(answer.split())) > 15
    story = generate(model, tokenizer, "Once upon a time", max_new_tokens=32, chat=False, temperature=0.6, seed=1).text
    assert len(story.split()) > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fused_loop_writes_the_same_to_the_limit_of_the_context(loaded, dtype):
    reference, tokenizer = loaded
    model = reference if dtype == torch.float32 else bitinfer.load(dtype=dtype)[0]
    limit = model.config.max_position_embeddings
    for text in ("The sea", "Photosynthesis is"):
        inputs = tokenizer(text, return_tensors="pt")
        options = {"max_length": limit, "min_length": limit, "do_sample": False, "pad_token_id": 0}
        expected = model.generate(**inputs, **options)
        fused = bitinfer.fuse(model).generate(**inputs, **options)
        bitinfer.unfuse(model)
        assert fused.shape == expected.shape == (1, limit)
        if not torch.equal(fused, expected):  # then in bfloat16, between words that its rounding does not tell apart
            first = int((fused != expected).nonzero()[0, 1])
            with torch.no_grad():
                logits = reference(expected[:, :first]).logits[0, -1]
            gap = float(logits[expected[0, first]] - logits[fused[0, first]])
            assert dtype == torch.bfloat16 and abs(gap) <= 2**-5 * float(logits.abs().max()), (text, first, gap)


def test_stop_strings_stop_the_fused_loop(loaded):
    model, tokenizer = loaded
    inputs = tokenizer("The sea is", return_tensors="pt")
    options = {"max_new_tokens": 60, "do_sample": False, "stop_strings": ["."], "tokenizer": tokenizer}
    expected = model.generate(**inputs, **options)
    fused = bitinfer.fuse(model).generate(**inputs, **options)
    bitinfer.unfuse(model)
    assert torch.equal(fused, expected) and tokenizer.decode(fused[0]).rstrip().endswith(".")


def test_what_runs_is_what_is_stored():
    folder = bitinfer.embedded_model()
    result = verify(folder, folder, tokens=64)
    assert result.passed and result.top1_agreement > 0.98


def test_the_command_line_uses_it_by_default():
    answer = CliRunner().invoke(app, ["generate", "Tell me about the sea.", "--max-new-tokens", "12"])
    assert answer.exit_code == 0, answer.output
    assert len(answer.stdout.split()) >= 5
    named = [str(bitinfer.embedded_model()), "Tell me about the sea.", "--max-new-tokens", "12"]
    assert CliRunner().invoke(app, ["generate", *named]).stdout == answer.stdout


def test_a_conversation():
    options = ["--max-new-tokens", "12", "--temperature", "0"]
    turns = "What is a river?\n\nAnd a lake?\n/new\nAnd a lake?\n/exit\nnever\n"
    chat = CliRunner().invoke(app, ["chat", *options], input=turns)
    assert chat.exit_code == 0, chat.output
    first, second, third = chat.stdout.splitlines()
    assert first and second != third  # the second remembers the first question, the third was told to forget
    alone = CliRunner().invoke(app, ["chat", *options], input="And a lake?\n")
    assert alone.stdout.splitlines() == [third]
    told = CliRunner().invoke(app, ["chat", *options, "--system", "You are a pirate."], input="And a lake?\n")
    assert told.stdout != alone.stdout
    many = "\n".join(["Tell me a long story about a king and his many horses."] * 12)
    assert CliRunner().invoke(app, ["chat", *options], input=many).exit_code == 0  # the oldest turns are dropped


def test_the_card_is_made_of_the_committed_figures():
    spec = importlib.util.spec_from_file_location("card", RECIPE / "card.py")
    card = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(card)
    results = json.loads((RECIPE / "results.json").read_text())
    assert (bitinfer.embedded_model() / "README.md").read_text() == card.model_card(results)
    assert results["activations"]["none"]["ratio"] <= 2.0
    assert len(results["samples"]) == 10
