"""A smaller vocabulary for a byte-level BPE tokenizer: the tokens a corpus uses most, and what they are made from."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np


def reduce_tokenizer(tokenizer: Any, counts: np.ndarray, size: int) -> tuple[list[int], Any]:
    """Return the ids that are kept, ascending, and a tokenizer over them: its id ``i`` is the old id ``kept[i]``.

    Kept are the tokens with the highest counts, the single bytes, the special tokens with a count above zero and those
    that begin or end a text, and for every token the two that merge into it. Text that used to give a token left out
    gives shorter ones, so every text can still be written.

    Args:
        tokenizer: a fast transformers tokenizer, byte-level BPE.
        counts: int64 ``[V]``, how often each token occurs.
        size: number of tokens to keep.

    Raises:
        ValueError: the tokenizer is of another kind, or ``size`` is too small or not below the present size.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise ValueError(f"reduce_tokenizer: expected a BPE tokenizer, got {model['type']}")
    vocabulary: dict[str, int] = model["vocab"]
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    made_from: dict[str, tuple[str, str]] = {}
    for left, right in merges:
        made_from.setdefault(left + right, (left, right))
    special = {entry["content"]: entry["id"] for entry in data["added_tokens"]}
    total = len({*vocabulary.values(), *special.values()})
    if not 0 < size < total:
        raise ValueError(f"reduce_tokenizer: size must be from 1 to {total - 1}, got {size}")
    ends = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    kept = {token for token, index in special.items() if token in ends or counts[index] > 0}
    kept |= {token for token in vocabulary if token not in made_from and token not in special}
    if len(kept) > size:
        raise ValueError(f"reduce_tokenizer: size={size} is below the {len(kept)} single bytes and special tokens")
    by_count = sorted(
        (t for t in vocabulary if t not in special), key=lambda t: (-counts[vocabulary[t]], vocabulary[t])
    )
    for token in by_count:
        parts = _closure(token, made_from, kept)
        if len(kept) + len(parts) <= size:
            kept |= parts
        if len(kept) == size:
            break
    ids = {token: vocabulary.get(token, special.get(token, -1)) for token in kept}
    order = sorted(kept, key=lambda token: ids[token])
    places = {token: index for index, token in enumerate(order)}
    model["vocab"] = {token: places[token] for token in order if token in vocabulary}
    model["merges"] = [[a, b] for a, b in merges if a in kept and b in kept and a + b in kept]
    data["added_tokens"] = [{**e, "id": places[e["content"]]} for e in data["added_tokens"] if e["content"] in kept]
    return [ids[token] for token in order], _rebuild(tokenizer, json.dumps(data))


def _closure(token: str, made_from: dict[str, tuple[str, str]], kept: Iterable[str]) -> set[str]:
    """Return a token and all that it is merged from, as far as they are not kept already."""
    found: set[str] = set()
    waiting = [token]
    while waiting:
        part = waiting.pop()
        if part not in kept and part not in found:
            found.add(part)
            waiting.extend(made_from.get(part, ()))
    return found


def _rebuild(tokenizer: Any, text: str) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    new = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text),
        **{name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None},
    )
    new.chat_template = getattr(tokenizer, "chat_template", None)
    return new
