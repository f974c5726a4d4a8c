"""A corpus that the teacher writes: prompts fed in, the first tokens greedy, the rest sampled, in large batches.

This is how OneBit makes its data (arXiv 2402.11295, section 4.1, after LLM-QAT): the first tokens of a text are the
likeliest, so that it starts sensibly, and the others are drawn from the teacher's distribution. A row goes on with the
next prompt where a document ends, so that none of its tokens is padding.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitinfer.distill.corpus import HELD_OUT, TRAIN, Corpus, read_vocabulary, write_vocabulary
from bitinfer.distill.decoder import LlamaDecoder
from bitinfer.distill.models import restrict_vocabulary
from bitinfer.distill.prompts import Prompts, vocabulary_words
from bitinfer.distill.vocabulary import reduce_tokenizer
from bitinfer.errors import FormatError

LONGEST_PROMPT = 64  # tokens
QUEUE = 8  # prompts that wait for each row; a row that needs more starts over with them
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Writing:
    """How a teacher writes.

    Attributes:
        row_length: tokens to a row.
        shard_rows: rows that are written at once, which make a shard.
        greedy_tokens: the first tokens of a document, taken greedily.
        temperature: the lowest and the highest; each row has its own, evenly spread between them.
        max_document: written tokens after which a row goes on with the next prompt, whether the document ended or not.
        seed: of prompts and sampling, together with the number of the shard.
    """

    row_length: int = 512
    shard_rows: int = 4096
    greedy_tokens: int = 3
    temperature: tuple[float, float] = (1.0, 1.0)
    max_document: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.row_length < 2 or self.shard_rows < 1 or self.greedy_tokens < 0 or self.max_document < 1:
            raise ValueError(f"Writing: row_length, shard_rows, greedy_tokens or max_document is out of range: {self}")
        if not 0 < self.temperature[0] <= self.temperature[1]:
            raise ValueError(f"Writing: temperature must be (lowest, highest), above 0, got {self.temperature}")


class Writer:
    """Lets a model write a shard of rows at a time; on a GPU what it captured for the first serves the others.

    Args:
        decoder: with ``how.shard_rows`` rows.
        stops: tokens that end a document.
        how: lengths, temperatures and the like.
    """

    def __init__(self, decoder: LlamaDecoder, stops: list[int], how: Writing) -> None:
        self.decoder, self.how, device = decoder, how, decoder.embedding.device
        rows = decoder.rows
        self.longest = longest_prompt(how)
        self.every = torch.arange(rows, device=device)
        self.ends = torch.tensor(stops, device=device)
        self.temperature = torch.linspace(*how.temperature, rows, device=device).unsqueeze(1)
        self.prompts = torch.zeros(rows, QUEUE, self.longest, dtype=torch.int64, device=device)
        self.lengths = torch.ones(rows, QUEUE, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(rows, how.row_length, dtype=torch.int64, device=device)
        self.scored = torch.zeros(rows, how.row_length, dtype=torch.bool, device=device)
        self.current = torch.zeros_like(self.every)
        self.prompt_at, self.token_at = torch.zeros_like(self.every), torch.zeros_like(self.every)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)

    def write(self, prompts: list[list[list[int]]], seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Write one row for each queue of prompts.

        Args:
            prompts: for each row its prompts, in turn, as token ids, none longer than ``longest_prompt(how)``.
            seed: of the sampling; torch's generator for the device is set.

        Returns:
            ``(tokens int64, scored bool)``, ``[rows, row_length]``; a token is scored where the model chose it.
        """
        flat = [queue[place % len(queue)] for queue in prompts for place in range(QUEUE)]
        table = np.zeros((len(flat), self.longest), np.int64)
        for row, prompt in enumerate(flat):
            table[row, : len(prompt)] = prompt
        self.prompts.copy_(torch.from_numpy(table).view(self.prompts.shape))
        self.lengths.copy_(torch.tensor([len(prompt) for prompt in flat]).view(self.lengths.shape))
        self.current.copy_(self.prompts[:, 0, 0])
        self.tokens.zero_()[:, 0] = self.current
        self.scored.zero_()
        self.prompt_at.zero_()
        self.token_at.fill_(1)
        self.position.zero_()
        torch.manual_seed(seed)
        self.decoder.run(self._advance, self.position, self.how.row_length - 1)
        return self.tokens.cpu().numpy(), self.scored.cpu().numpy()

    def _advance(self, span: int) -> None:
        """Choose the token behind the current ones; all state is in tensors, so that this can be replayed."""
        logits = self.decoder.step(self.current, self.position, span).float()
        # the largest of p / exponential noise is a draw from p
        noise = torch.empty_like(logits).exponential_()
        drawn = (torch.softmax(logits / self.temperature, -1) / noise).argmax(-1)
        written = self.token_at - self.lengths[self.every, self.prompt_at]
        chosen = torch.where(written < self.how.greedy_tokens, logits.argmax(-1), drawn)
        free = written >= 0
        forced = self.prompts[self.every, self.prompt_at, self.token_at.clamp_max(self.longest - 1)]
        self.current.copy_(torch.where(free, chosen, forced))
        self.position.add_(1)
        self.tokens.index_copy_(1, self.position, self.current.unsqueeze(1))
        self.scored.index_copy_(1, self.position, free.unsqueeze(1))
        ended = (self.current.unsqueeze(1) == self.ends).any(1)
        over = free & (ended | (written + 1 >= self.how.max_document))
        self.prompt_at.copy_((self.prompt_at + over) % QUEUE)
        self.token_at.copy_(torch.where(over, 0, self.token_at + 1))


def longest_prompt(how: Writing) -> int:
    """Return the tokens that a prompt may have: what is longer is cut off."""
    return max(1, min(LONGEST_PROMPT, how.row_length // 2))


def draw_prompts(
    prompts: Prompts, tokenizer: Any, rows: int, seed: tuple[int, ...], longest: int
) -> list[list[list[int]]]:
    """Return a queue of prompts for each row, as token ids, none longer than ``longest``."""
    rng = np.random.default_rng(seed)
    words = vocabulary_words(tokenizer, prompts.words) if prompts.word_share or not prompts.topics else []
    texts = [prompts.draw(rng, words, place == 0) for _ in range(rows) for place in range(QUEUE)]
    ids = [i[:longest] for i in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
    return [ids[row * QUEUE : (row + 1) * QUEUE] for row in range(rows)]


def generate_corpus(
    teacher: Any,
    tokenizer: Any,
    path: str | Path,
    *,
    prompts: Prompts | None = None,
    how: Writing | None = None,
    shards: int = 8,
    held_out_shards: int = 1,
    minutes: float | None = None,
    about: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Let the teacher write a corpus, or the rest of one that was begun; its first shards are held out.

    A shard depends on the seed and its number alone (and on the device's arithmetic), not on what came before.

    Args:
        teacher: a dense LLaMA, on the device to use.
        tokenizer: its tokenizer, over the same ids.
        path: the folder.
        prompts: where documents start from; by default random words of the vocabulary.
        how: lengths, temperatures and the like.
        shards: number of shards in all, the held-out ones among them.
        held_out_shards: how many of them are never trained on.
        minutes: start no new shard after this long, once there are one to train on and all that are held out.
        about: further settings to note in the manifest.
        progress: called with (shards done, shards in all, speed).

    Raises:
        ValueError: a number is out of range.
    """
    prompts, how = prompts or Prompts(), how or Writing()
    if not 1 <= held_out_shards < shards:
        raise ValueError(f"generate_corpus: held_out_shards must be from 1 to {shards - 1}, got {held_out_shards}")
    size = int(teacher.config.vocab_size)
    # not among the settings: the number of shards, which a corpus may be gone on with
    settings = {"writing": asdict(how), "prompts": asdict(prompts), "held_out_shards": held_out_shards, **(about or {})}
    corpus = Corpus.create(path, vocab_size=size, row_length=how.row_length, about=settings, tokenizer=tokenizer)
    stops = stop_tokens(teacher, tokenizer)
    missing = [i for i in range(shards) if not corpus.has(_name(i))]
    writer: Writer | None = None
    start = time.monotonic()
    for index in missing:
        if minutes is not None and index > held_out_shards and time.monotonic() - start > 60 * minutes:
            break
        begun = time.monotonic()
        writer = writer or Writer(LlamaDecoder(teacher, how.shard_rows, how.row_length), stops, how)
        queues = draw_prompts(prompts, tokenizer, how.shard_rows, (how.seed, index), writer.longest)
        tokens, scored = writer.write(queues, how.seed * 1_000_003 + index)
        corpus.add(_name(index), tokens, scored, HELD_OUT if index < held_out_shards else TRAIN)
        if progress is not None:
            progress(index + 1, shards, f"{tokens.size / (time.monotonic() - begun):,.0f} tokens/s")
    return corpus


def reduce_vocabulary(
    teacher: Any,
    tokenizer: Any,
    path: str | Path,
    size: int,
    *,
    prompts: Prompts | None = None,
    how: Writing | None = None,
    shards: int = 1,
) -> tuple[Any, Any]:
    """Restrict the teacher, in place, to the tokens it uses most; return it with a tokenizer over them.

    It writes ``shards`` shards with its whole vocabulary into ``path/pilot``, whose tokens are counted. The choice is
    stored in ``path`` and used again if it is there.

    Raises:
        FormatError: a choice of another size is stored.
        ValueError: the vocabulary cannot be reduced to ``size``.
    """
    import transformers

    path = Path(path)
    kept = read_vocabulary(path)
    if kept is not None:
        if len(kept) != size:
            raise FormatError(f"{path}: a vocabulary of {len(kept)} tokens is there, not of {size}; remove the folder")
        reduced = transformers.AutoTokenizer.from_pretrained(path)
    else:
        corpus = generate_corpus(teacher, tokenizer, path / "pilot", prompts=prompts, how=how, shards=shards + 1)
        kept, reduced = reduce_tokenizer(tokenizer, corpus.token_counts(), size)
        reduced.save_pretrained(path)
        write_vocabulary(path, kept, int(teacher.config.vocab_size))
    return restrict_vocabulary(teacher, kept), reduced


def stop_tokens(teacher: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end a document: the end tokens, and the unknown one, which GPT-2's kind ends a text with."""
    found = {tokenizer.eos_token_id, tokenizer.unk_token_id}
    ends = teacher.generation_config.eos_token_id
    found |= set(ends) if isinstance(ends, list) else {ends}
    return sorted(i for i in found if i is not None and i < teacher.config.vocab_size)


def _name(index: int) -> str:
    return f"shard-{index:05d}"
