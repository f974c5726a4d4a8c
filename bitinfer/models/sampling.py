"""Choosing tokens on the device, with shapes that do not change from step to step, so that a graph can hold it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """What transformers' usual logits processors do, in their order.

    Attributes:
        repetition_penalty: logits of tokens that were seen are divided by it if positive, else multiplied; 1 for none.
        sample: whether to draw at random; else the likeliest token.
        temperature, top_k, top_p: of the distribution drawn from; 1, 0 and 1 for none.
    """

    repetition_penalty: float = 1.0
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @classmethod
    def of(cls, processors: Any, sample: bool) -> "Sampling | None":
        """Return the same as a list of transformers' processors does, None if one of them is not known here."""
        from transformers import (
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        found: dict[str, Any] = {"sample": sample}
        order = []
        for processor in processors:
            if type(processor) is RepetitionPenaltyLogitsProcessor:
                found["repetition_penalty"] = float(processor.penalty)
                order.append(0)
            elif type(processor) is TemperatureLogitsWarper:
                found["temperature"] = float(processor.temperature)
                order.append(1)
            elif type(processor) is TopKLogitsWarper and processor.min_tokens_to_keep == 1:
                found["top_k"] = int(processor.top_k)
                order.append(2)
            elif type(processor) is TopPLogitsWarper and processor.min_tokens_to_keep == 1:
                found["top_p"] = float(processor.top_p)
                order.append(3)
            else:
                return None
        return cls(**found) if order == sorted(set(order)) else None

    def choose(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Return the next tokens, int64 ``[B]``.

        Args:
            logits: ``[B, V]``.
            seen: bool ``[B, V]``, the tokens of each sequence; None where there is no penalty.
        """
        scores = logits.float()
        if seen is not None:
            penalty = self.repetition_penalty
            scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        if not self.sample:
            return scores.argmax(-1)
        scores = scores / self.temperature
        if self.top_k:
            least = scores.topk(min(self.top_k, scores.shape[-1])).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p < 1:
            ordered, places = scores.sort(descending=False)
            drop = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
            drop[:, -1] = False
            scores = scores.masked_fill(drop.scatter(1, places, drop), -torch.inf)
        probabilities = scores.softmax(-1)
        # a race of exponential clocks: the same draw as torch.multinomial's, without its checks on the host
        return (probabilities / torch.empty_like(probabilities).exponential_(1)).argmax(-1)


def tokens_seen(ids: Tensor, vocabulary: int, processors: Any) -> Tensor:
    """Return which tokens of the prompts count for the repetition penalty, bool ``[B, vocabulary]``.

    Args:
        ids: int64 ``[B, T]``.
        vocabulary: V.
        processors: transformers' own, which say how many tokens of each prompt to leave out, such as its padding.
    """
    ignored: Any = None
    for processor in processors:
        ignored = getattr(processor, "prompt_ignore_length", ignored)
    count = torch.ones_like(ids, dtype=torch.bool)
    if ignored is not None:
        first = torch.as_tensor(ignored, device=ids.device).reshape(-1, 1)
        count = torch.arange(ids.shape[1], device=ids.device) >= first.expand(len(ids), 1)
    seen = torch.zeros(len(ids), vocabulary + 1, dtype=torch.bool, device=ids.device)
    return seen.scatter_(1, ids.where(count, vocabulary), True)[:, :vocabulary]
