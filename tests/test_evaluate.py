"""evaluate: perplexity is the mean over windows of each window's mean loss, as FBI-LLM's script computes it."""

import math
from types import SimpleNamespace

import pytest
import tiny_models
import torch
import torch.nn.functional as F

from bitinfer import convert, load
from bitinfer.evaluate import perplexity


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    return load(convert(tiny_models.fbi(root / "fbi"), root / "packed").path)


def published(model, ids: list[int], window: int) -> float:
    """Perplexity written as in FBI-LLM's eval.py: shifted logits, cross entropy of a window times its length."""
    losses = []
    count = len(ids) // window
    for i in range(count):
        part = torch.tensor([ids[i * window : (i + 1) * window]])
        logits = model(part).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), part[:, 1:].flatten())
        losses.append(loss * window)
    return torch.exp(torch.stack(losses).sum() / (count * window)).item()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_against_the_published_protocol(packed, batch):
    model, tokenizer = packed
    seen = []
    result = perplexity(
        model, tokenizer, tiny_models.TEXT, window=48, batch=batch, progress=lambda *args: seen.append(args)
    )
    ids = tokenizer(tiny_models.TEXT)["input_ids"]
    assert result.perplexity == pytest.approx(published(model, ids, 48), rel=1e-5)
    assert result.windows == len(ids) // 48 and result.predicted_tokens == 47 * result.windows
    assert result.bits_per_byte == pytest.approx(result.nll * len(ids) / len(tiny_models.TEXT) / math.log(2))
    assert seen[-1] == (result.windows, result.windows, pytest.approx(result.perplexity))


class Uniform(torch.nn.Module):
    """Says that every one of 64 tokens is as likely."""

    device = torch.device("cpu")
    config = SimpleNamespace(max_position_embeddings=100)

    def forward(self, ids, use_cache=False):
        return SimpleNamespace(logits=torch.zeros(*ids.shape, 64, dtype=torch.bfloat16))


def test_a_uniform_model_is_as_perplexed_as_it_has_tokens():
    result = perplexity(Uniform(), None, list(range(64)) * 5)
    assert result.perplexity == pytest.approx(64) and result.bits_per_byte is None
    assert (result.windows, result.window) == (3, 100)  # what the model can read; 20 tokens are left over


def test_windows_are_limited_and_short_texts_are_one_window():
    assert perplexity(Uniform(), None, list(range(60)), window=10, max_windows=2).windows == 2
    short = perplexity(Uniform(), None, [1, 2, 3], window=50)
    assert (short.windows, short.window, short.predicted_tokens) == (1, 3, 2)


def test_an_impossible_text_does_not_overflow():
    class Wrong(Uniform):
        def forward(self, ids, use_cache=False):
            logits = torch.zeros(*ids.shape, 64)
            logits[..., 0] = 1e4
            return SimpleNamespace(logits=logits)

    assert perplexity(Wrong(), None, [1, 2, 3, 4]).perplexity == math.inf


def test_arguments_and_texts_that_cannot_be(packed):
    with pytest.raises(ValueError, match="window must be at least 2"):
        perplexity(Uniform(), None, [1, 2], window=1)
    with pytest.raises(ValueError, match="batch and max_windows"):
        perplexity(Uniform(), None, [1, 2], batch=0)
    with pytest.raises(ValueError, match="reads 100 tokens at most, got window=101"):
        perplexity(Uniform(), None, [1, 2], window=101)
    with pytest.raises(ValueError, match="has 1 tokens"):
        perplexity(Uniform(), None, [1])
    with pytest.raises(ValueError, match="no tokenizer"):
        perplexity(packed[0], None, "text")
