"""Perplexity by the protocol of FBI-LLM's ``eval.py``: non-overlapping windows, mean negative log likelihood."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 2048


@dataclass
class Perplexity:
    """What :func:`perplexity` measured.

    Attributes:
        perplexity: ``exp(nll)``.
        nll: negative log likelihood of a token in nats: the mean over windows of each window's mean.
        bits_per_byte: ``nll * tokens / (bytes * ln 2)`` with the tokens and bytes of the whole text; None for ids.
        windows, window: how many windows were read, and their length in tokens.
        predicted_tokens: tokens that were predicted: the first of a window is not.
        seconds: time that the model took.
    """

    perplexity: float
    nll: float
    bits_per_byte: float | None
    windows: int
    window: int
    predicted_tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return asdict(self)


def perplexity(
    model: Any,
    tokenizer: Any | None,
    text: str | Sequence[int],
    *,
    window: int | None = None,
    max_windows: int | None = None,
    batch: int = 1,
    progress: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """Measure how well a causal model predicts a text.

    The token ids are cut into windows of ``window``, the rest dropped (a shorter text is one window), and each is
    predicted on its own: ``nll = mean over windows of mean over t of -log p(id[t+1] | id[..t])``. Logits are turned to
    float32 before the softmax, sums are float64.

    Args:
        model: a transformers causal model, packed or dense.
        tokenizer: its tokenizer; None needs token ids.
        text: text, or token ids.
        window: tokens to a window; None for 2048, at which the models were trained and are reported, or what a shorter
            context allows.
        max_windows: read no more than this many.
        batch: windows at a time.
        progress: called with (windows done, windows in all, perplexity so far).

    Raises:
        ValueError: an argument is out of range, or the text has fewer than two tokens.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if window is None:
        window = min(WINDOW, longest or WINDOW)
    if window < 2 or batch < 1 or (max_windows is not None and max_windows < 1):
        raise ValueError(
            f"perplexity: window must be at least 2, batch and max_windows at least 1, "
            f"got window={window}, batch={batch}, max_windows={max_windows}"
        )
    if longest is not None and window > longest:
        raise ValueError(f"perplexity: the model reads {longest} tokens at most, got window={window}")
    ids = _encode(tokenizer, text)
    if len(ids) < 2:
        raise ValueError(f"perplexity: the text has {len(ids)} tokens; at least 2 are needed")
    window = min(window, len(ids))
    count = min(len(ids) // window, max_windows or len(ids))
    rows = torch.tensor(ids[: count * window]).view(count, window)
    total, start = 0.0, time.perf_counter()
    with torch.inference_mode():
        for first in range(0, count, batch):
            part = rows[first : first + batch].to(model.device)
            total += window_nll(model(part, use_cache=False).logits, part).sum().item()
            if progress is not None:
                done = first + len(part)
                progress(done, count, math.exp(min(total / done, 700.0)))
    nll = total / count
    return Perplexity(
        perplexity=math.exp(nll) if nll < 700 else math.inf,
        nll=nll,
        bits_per_byte=nll * len(ids) / (len(text.encode()) * math.log(2)) if isinstance(text, str) else None,
        windows=count,
        window=window,
        predicted_tokens=count * (window - 1),
        seconds=time.perf_counter() - start,
    )


def window_nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean negative log likelihood of each window, float64 ``[B]``.

    ``logits [B, T, V]`` at position t predict ``ids [B, T]`` at t + 1. One window at a time is turned to float32.
    """
    pairs = zip(logits, ids, strict=True)
    losses = [F.cross_entropy(row[:-1].float(), target[1:], reduction="none") for row, target in pairs]
    return torch.stack([loss.double().mean() for loss in losses])


def _encode(tokenizer: Any | None, text: str | Sequence[int]) -> list[int]:
    if not isinstance(text, str):
        return [int(i) for i in text]
    if tokenizer is None:
        raise ValueError("perplexity: the model folder has no tokenizer; copy its tokenizer's files into the folder")
    # a whole corpus is longer than any context, which tokenizers warn about
    return list(tokenizer(text, verbose=False)["input_ids"])
