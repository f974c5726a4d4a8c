"""Let the binary language model that comes with bitinfer write, beside the same model dense. ``make demo`` runs this.

Nothing is downloaded. ``examples/binarize_smollm2.py`` shows the way from an ordinary model to a packed one.
"""

import os
import time
from typing import Any, NamedTuple

import torch
from rich.table import Table

import bitinfer
from bitinfer import tables
from bitinfer.formats import FORMATS
from bitinfer.generate import generate
from bitinfer.info import describe
from bitinfer.terminal import console, quiet_transformers
from bitinfer.verify import load_reference, verify

PROMPTS = ("Tell me about the moon.", "Write a short story about a dragon.", "Explain why the sky is blue.")
NEW_TOKENS = 64
RUNS = 3  # of each timing; the fastest is shown

out = console()


class Speed(NamedTuple):
    """Tokens per second, of the prompt and of the answer."""

    prompt: float
    decode: float


def measure(models: dict[str, Any], tokenizer: Any) -> dict[str, Speed]:
    """Return the best speed of each model in RUNS rounds.

    The models take turns, so that whatever else this machine does meets them alike; each writes equally many tokens.
    """
    best = dict.fromkeys(models, Speed(0.0, 0.0))
    for model in models.values():
        model.generation_config.min_new_tokens = NEW_TOKENS
    for _ in range(RUNS):
        for name, model in models.items():
            run = generate(model, tokenizer, PROMPTS[0], max_new_tokens=NEW_TOKENS)
            now = Speed(run.prefill_tokens_per_second, run.decode_tokens_per_second or 0.0)
            best[name] = Speed(*map(max, best[name], now))
    return best


def say(text: str) -> None:
    print(text, end="", flush=True)


def main() -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401  (its import is no part of a model's loading)

    quiet_transformers()
    folder = bitinfer.embedded_model()
    out.rule("1. the model that comes with bitinfer")
    info = describe(folder)
    out.print(tables.storage(info))

    out.rule("2. it writes")
    begun = time.perf_counter()
    model, tokenizer = bitinfer.load()
    bitinfer.fuse(model)
    loaded = time.perf_counter() - begun
    waited = 0.0
    for number, prompt in enumerate(PROMPTS):
        out.print(f"[bold]{prompt}[/]")
        run = generate(
            model, tokenizer, prompt, max_new_tokens=NEW_TOKENS, temperature=0.6, top_p=0.9, seed=number, on_text=say
        )
        print("\n")
        waited = waited or loaded + run.time_to_first_token
    out.print(f"{waited:.2f} s from loading to the first token")

    out.rule("3. does it compute what it stores? (packed kernels against the same weights, dense, in float32)")
    kernels = verify(folder, folder)
    out.print(tables.verification(kernels))

    out.rule("4. timing, beside the same weights dense")
    dense = load_reference(folder, FORMATS["packed"])
    speeds = measure(
        {
            "one bit": model,
            "dense float32": dense,
            "dense bfloat16": load_reference(folder, FORMATS["packed"]).to(torch.bfloat16),
        },
        tokenizer,
    )
    s = info.storage
    threads = torch.get_num_threads()
    table = Table(title=f"{threads} threads, fastest of {RUNS} runs", title_justify="left")
    for column in ("", *speeds):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("whole model", *map(tables.size, (s.packed_bytes, 2 * s.fp16_bytes, s.fp16_bytes)))
    table.add_row("linear layers", *map(tables.size, (s.linear_bytes, 4 * s.linear_weights, 2 * s.linear_weights)))
    for label, field in (("prompt, tokens/s", "prompt"), ("decode, tokens/s", "decode")):
        table.add_row(label, *(f"{getattr(speed, field):.1f}" for speed in speeds.values()))
    out.print(table)
    if os.getloadavg()[0] > 1 + (os.cpu_count() or 1):
        out.print("[yellow]note:[/] other programs kept this machine busy; the speeds above suffer from it")
    out.print(tables.next_step('bitinfer generate "Your prompt"'), soft_wrap=True)
    if not kernels.passed:
        raise SystemExit("error: the packed kernels do not compute what is stored; `bitinfer doctor` tells more")


if __name__ == "__main__":
    main()
