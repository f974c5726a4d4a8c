"""The learning rate over a run: warm-up, then a cosine, of which a run may cover any part."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """``lr(step) = peak * warm-up * (floor + (1 - floor) * (1 + cos(pi * progress)) / 2)``.

    ``progress`` goes from ``span[0]`` to ``span[1]`` over the run, so that a training that is split over several runs,
    each with a fresh optimizer and a short warm-up of its own, follows one cosine.

    Attributes:
        peak: the highest learning rate.
        warmup: steps over which the rate rises linearly from 0.
        floor: share of the peak at the end of the cosine.
        span: which part of the cosine the run covers.
    """

    peak: float
    warmup: int
    floor: float = 0.1
    span: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not self.peak > 0 or self.warmup < 0 or not 0 <= self.floor <= 1:
            raise ValueError(f"Schedule: peak, warmup or floor is out of range: {self}")
        if not 0 <= self.span[0] < self.span[1] <= 1:
            raise ValueError(f"Schedule: span must be two ascending numbers from 0 to 1, got {self.span}")

    def rate(self, step: int, total: int) -> float:
        """Return the learning rate of update ``step``, counted from 0, of ``total``."""
        if step < self.warmup:
            return self._cosine(0.0) * (step + 1) / self.warmup
        return self._cosine(min(1.0, (step - self.warmup) / max(total - self.warmup, 1)))

    def _cosine(self, share: float) -> float:
        progress = self.span[0] + (self.span[1] - self.span[0]) * share
        return self.peak * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2)
