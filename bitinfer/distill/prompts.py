"""Prompts that a teacher continues when it writes a corpus."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

WORD_MARK = "Ġ"  # how byte-level vocabularies write the space before a word


@dataclass(frozen=True)
class Prompts:
    """Where prompts come from; without any templates a prompt is a random token, as OneBit's generated corpus starts.

    ``{}`` in a template stands for a topic. A topic is one of ``topics`` or, with the share ``word_share``, a word of
    the tokenizer's vocabulary, and with ``{}`` twice there are two of them.

    Attributes:
        chat: templates of what a user says; they are put into ``turn``.
        plain: templates of how a text opens.
        topics: words and phrases.
        turn: text around what a user says, with ``{}`` for it.
        between: text between the end of one document and a chat prompt behind it.
        chat_share: share of chat prompts where there are both kinds.
        word_share: share of topics that come from the vocabulary.
        words: how many of the vocabulary's first words to draw from; the first are the most frequent.
    """

    chat: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    topics: list[str] = field(default_factory=list)
    turn: str = "{}"
    between: str = ""
    chat_share: float = 0.5
    word_share: float = 0.0
    words: int = 8000

    def __post_init__(self) -> None:
        for name in ("chat_share", "word_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"prompts: {name} must be from 0 to 1, got {getattr(self, name)}")
        needs = any("{}" in template for template in (*self.chat, *self.plain))
        if needs and not self.topics and not self.word_share:
            raise ValueError("prompts: templates with {} need topics, or word_share above 0")

    @classmethod
    def read(cls, path: str | Path) -> "Prompts":
        """Read a JSON object whose keys are the attributes above; an unknown key is a ValueError."""
        values: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"{path}: unknown keys {sorted(unknown)}; known are {[f.name for f in fields(cls)]}")
        return cls(**values)

    def draw(self, rng: np.random.Generator, vocabulary: list[str], first: bool) -> str:
        """Return one prompt.

        Args:
            rng: drawn from.
            vocabulary: words for topics, see :func:`vocabulary_words`.
            first: whether it opens a row; otherwise a document has just ended.
        """
        if not self.chat and not self.plain:
            return vocabulary[rng.integers(len(vocabulary))]
        is_chat = bool(self.chat) and (not self.plain or rng.random() < self.chat_share)
        template = str(rng.choice(self.chat if is_chat else self.plain))
        while "{}" in template:
            if self.word_share and (not self.topics or rng.random() < self.word_share):
                topic = vocabulary[rng.integers(len(vocabulary))]
            else:
                topic = str(rng.choice(self.topics))
            template = template.replace("{}", topic, 1)
        if not is_chat:
            return template[:1].upper() + template[1:]
        return ("" if first else self.between) + self.turn.replace("{}", template)


def vocabulary_words(tokenizer: Any, count: int, shortest: int = 4) -> list[str]:
    """Return the first ``count`` lower-case words of a byte-level vocabulary, without the space before them.

    Raises:
        ValueError: the vocabulary has no such words: it is no byte-level one.
    """
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = [token[1:] for token, _ in tokens if token.startswith(WORD_MARK)]
    words = [w for w in words if len(w) >= shortest and w.isascii() and w.isalpha() and w.islower()][:count]
    if not words:
        raise ValueError("prompts: the tokenizer's vocabulary has no words that start with a space mark; give prompts")
    return words
