"""The commands that write text: ``generate`` and ``chat``."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from bitinfer.cli_options import Bits, Block, CacheBits, Dtype, HeadBits, Threads, load_model

AnyModel = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="A folder that bitinfer packed. By default the model it comes with."),
]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")]
TopP = Annotated[float, typer.Option(help="Sample among the likeliest tokens with this probability.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample among this many of the likeliest; 0: all.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]


def register(command: Callable[..., Any]) -> None:
    """Add the commands to the command line."""
    command(
        'bitinfer generate "Tell me about the moon."',
        'bitinfer generate fbi-7b-packed "The capital of France is"',
        'bitinfer generate smol-packed "Tell me a joke" --temperature 0.7 --top-p 0.9 --seed 1',
        'bitinfer generate no-tokenizer --token-ids "1,450,7483"',
    )(generate)
    command(
        "bitinfer chat",
        'bitinfer chat smol-packed --system "Answer in one sentence." --temperature 0',
        "bitinfer chat < questions.txt",
    )(chat)


def generate(
    model: AnyModel = None,
    prompt: Annotated[str | None, typer.Argument(help="The text to continue.")] = None,
    token_ids: Annotated[str | None, typer.Option(help='The prompt as token ids: "1,2,3". Prints ids.')] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many.")] = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template. By default if there is one.")
    ] = None,
    act_bits: Bits = None,
    act_block: Block = None,
    dtype: Dtype = None,
    head_bits: HeadBits = None,
    cache_bits: CacheBits = None,
    threads: Threads = None,
) -> None:
    """Write text, token by token; the speed goes to stderr."""
    from bitinfer import tables
    from bitinfer.embedded import embedded_model
    from bitinfer.generate import generate as run

    if model is not None and prompt is None and token_ids is None and not Path(model).is_dir():
        model, prompt = None, model  # a single argument is the prompt
    if (prompt is None) == (token_ids is None):
        raise typer.BadParameter("give either PROMPT or --token-ids")
    start: str | list[int] = prompt if prompt is not None else parse_ids(str(token_ids))
    folder = Path(model) if model is not None else embedded_model()
    network, tokenizer = load_model(folder, dtype, act_bits, act_block, threads, head_bits, cache_bits)
    result = run(
        network,
        tokenizer if token_ids is None else None,
        start,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        chat=chat,
        on_text=lambda text: typer.echo(text, nl=False),
    )
    typer.echo()
    typer.echo(tables.speed(result), err=True)


def chat(
    model: AnyModel = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before anything else.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop an answer after this many.")] = 256,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    seed: Seed = None,
    act_bits: Bits = None,
    act_block: Block = None,
    dtype: Dtype = None,
    head_bits: HeadBits = None,
    cache_bits: CacheBits = None,
    threads: Threads = None,
) -> None:
    """Talk with a model: a line is a turn. /new forgets what was said, /exit or Ctrl-D ends.

    The oldest turns are forgotten when the model could not read any more.
    """
    from bitinfer.embedded import embedded_model
    from bitinfer.generate import generate as run

    network, tokenizer = load_model(
        embedded_model() if model is None else Path(model),
        dtype,
        act_bits,
        act_block,
        threads,
        head_bits,
        cache_bits,
    )
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{model}: its tokenizer has no chat template; use: bitinfer generate {model} PROMPT --no-chat"
        )
    asking = sys.stdin.isatty()
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    while True:
        try:
            line = input("> " if asking else "").strip()
        except EOFError:
            break
        if line == "/exit":
            break
        if line == "/new":
            messages = list(opening)
        if not line or line == "/new":
            continue
        messages.append({"role": "user", "content": line})
        ids = _what_fits(network, tokenizer, messages, len(opening), max_new_tokens)
        answer = run(
            network,
            tokenizer,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            on_text=lambda text: typer.echo(text, nl=False),
        )
        typer.echo("\n" if asking else "")
        messages.append({"role": "assistant", "content": str(answer.text).strip()})


def _what_fits(
    network: Any, tokenizer: Any, messages: list[dict[str, str]], opening: int, max_new_tokens: int
) -> list[int]:
    """Return the conversation as token ids, after dropping its oldest turns until an answer fits behind it."""
    limit = getattr(network.config, "max_position_embeddings", None)
    while True:
        ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
        if limit is None or len(ids) + max_new_tokens <= limit or len(messages) <= opening + 1:
            return ids
        del messages[opening : opening + 2]  # a question and its answer


def parse_ids(text: str) -> list[int]:
    """Return the token ids of a text like "1,2,3"."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f'expected numbers with commas like "1,2,3", got {text!r}')
    return [int(part) for part in parts]
