"""Generate text with a packed model, streamed, and time the prompt and the new tokens apart."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Generation:
    """What :func:`generate` wrote, and how fast.

    Attributes:
        text: the decoded new tokens; None without a tokenizer.
        token_ids: the new tokens.
        prompt_tokens: length of the prompt, template included.
        time_to_first_token: seconds from the call to the first new token; the whole prompt runs in it.
        seconds: from the call to the last token.
    """

    text: str | None
    token_ids: list[int]
    prompt_tokens: int
    time_to_first_token: float
    seconds: float

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens over the time to the first new token."""
        return self.prompt_tokens / self.time_to_first_token

    @property
    def decode_tokens_per_second(self) -> float | None:
        """New tokens after the first over the time that they took; None when there was but one."""
        if len(self.token_ids) < 2:
            return None
        return (len(self.token_ids) - 1) / (self.seconds - self.time_to_first_token)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary, the rates included."""
        return {
            **asdict(self),
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }


def generate(
    model: Any,
    tokenizer: Any | None,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    chat: bool | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue ``prompt`` with ``model.generate``.

    Args:
        model: a transformers model, packed or dense.
        tokenizer: its tokenizer; None needs ``prompt`` as token ids.
        prompt: text, or token ids.
        max_new_tokens: at most this many; fewer when the model ends its answer.
        temperature: 0 takes the likeliest token each time; above it, sampling.
        top_p: sample among the likeliest tokens that together have this probability; 1 for all.
        top_k: sample among this many of the likeliest; 0 for all.
        seed: makes sampling repeatable; the global generator of torch is set.
        chat: whether to put text into the tokenizer's chat template; None does so if it has one.
        on_text: called with each new piece of text (or, without a tokenizer, each token id and a space).

    Raises:
        ValueError: an option is out of range, there is nothing to start from, or text was given and no tokenizer.
    """
    _check(max_new_tokens, temperature, top_p, top_k)
    ids = encode_prompt(tokenizer, prompt, chat)
    vocabulary = getattr(model.config, "vocab_size", None)
    if vocabulary is not None and not all(0 <= i < vocabulary for i in ids):
        raise ValueError(f"prompt: token ids must lie in 0 to {vocabulary - 1}, got {min(ids)} to {max(ids)}")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    # what a generation_config.json sets for sampling is no business of a greedy call, and warns there
    options |= {"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature > 0 else _GREEDY
    if getattr(model.generation_config, "pad_token_id", None) is None:
        options["pad_token_id"] = _pad_token(model, tokenizer)
    if seed is not None:
        torch.manual_seed(seed)
    inputs = torch.tensor([ids], device=model.device)
    stream = _Stream(tokenizer, on_text)
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), streamer=stream, **options)
    new = output[0, len(ids) :].tolist()
    text = None if tokenizer is None else tokenizer.decode(new, skip_special_tokens=True)
    return Generation(text, new, len(ids), stream.first - stream.start, stream.last - stream.start)


def encode_prompt(tokenizer: Any | None, prompt: str | Sequence[int], chat: bool | None = None) -> list[int]:
    """Return the token ids of a prompt; see :func:`generate`."""
    if not isinstance(prompt, str):
        ids = [int(i) for i in prompt]
    elif tokenizer is None:
        raise ValueError(
            "the model folder has no tokenizer, so text cannot be read: copy the tokenizer's files into it, "
            'or pass token ids: --token-ids "1,2,3"'
        )
    else:
        template = getattr(tokenizer, "chat_template", None)
        if chat and not template:
            raise ValueError("chat: this tokenizer has no chat template; leave out --chat")
        if template and chat is not False:
            messages = [{"role": "user", "content": prompt}]
            encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            ids = list(encoded["input_ids"])
        else:
            ids = list(tokenizer(prompt)["input_ids"])
    if not ids:
        raise ValueError("prompt: it has no tokens; give at least one word")
    return ids


_GREEDY = {"temperature": None, "top_p": None, "top_k": None}


class _Stream:
    """A transformers streamer: notes when tokens come, and hands on the text that is complete."""

    def __init__(self, tokenizer: Any | None, on_text: Callable[[str], None] | None) -> None:
        self.start = self.first = self.last = time.perf_counter()
        self._seen_prompt = self._seen_token = False
        self._on_text = on_text
        self._inner = None
        if on_text is not None and tokenizer is not None:
            from transformers import TextStreamer

            inner = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            inner.on_finalized_text = lambda text, stream_end=False: on_text(text)
            self._inner = inner

    def put(self, value: Tensor) -> None:
        if self._seen_prompt:
            self.last = time.perf_counter()
            if not self._seen_token:
                self.first, self._seen_token = self.last, True
            if self._inner is None and self._on_text is not None:
                self._on_text(f"{value.item()} ")
        self._seen_prompt = True
        if self._inner is not None:
            self._inner.put(value)

    def end(self) -> None:
        if self._inner is not None:
            self._inner.end()


def _check(max_new_tokens: int, temperature: float, top_p: float, top_k: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (all tokens) or more, got {top_k}")


def _pad_token(model: Any, tokenizer: Any | None) -> int:
    """Return some valid padding token: a single prompt is never padded, but transformers warns where it has none."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if isinstance(ends, list):
        ends = ends[0] if ends else None
    if ends is None and tokenizer is not None:
        ends = tokenizer.eos_token_id
    return 0 if ends is None else int(ends)
