"""Text that a tiny model can learn in seconds: sentences from a small grammar."""

import random

NOUNS = ("lamp", "wind", "sea", "dusk", "west", "calm", "light", "wave")
VERBS = ("comes from", "is lit at", "is", "sees", "lights", "is as calm as")


def sentences(count: int, seed: int) -> str:
    draw = random.Random(seed)
    parts = (f"The {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)}." for _ in range(count))
    return " ".join(parts)
