"""The command line: each command calls one function of the library and prints what it returns."""

import json
import os
import time
import traceback
import warnings
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.markup import escape
from typer.core import TyperGroup

from bitinfer.cli_bench import register as register_bench
from bitinfer.cli_generate import register as register_generate
from bitinfer.cli_options import (
    ActBits,
    ActBlock,
    Bits,
    Block,
    CacheBits,
    DType,
    Dtype,
    HeadBits,
    Model,
    Threads,
    bits_of,
    load_model,
    number_of,
)
from bitinfer.distill.cli import register as register_distill
from bitinfer.terminal import DEBUG, console, debugging, progress_bar, status
from bitinfer.tune import register as register_tune


class Commands(TyperGroup):
    """Turns what a command raises into one line on stderr and an exit code: 1 for errors, 130 for Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if hasattr(error, "exit_code"):  # typer's own: usage errors and the like
                raise
            if debugging():
                traceback.print_exc()
            typer.echo(f"error: {_one_line(error)}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench_app = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")
app.add_typer(bench_app, name="bench")


class SourceFormat(str, Enum):
    auto = "auto"
    fbi_llm = "fbi_llm"
    onebit = "onebit"
    binary_dense = "binary_dense"
    latent = "latent"


class Method(str, Enum):
    absmean = "absmean"
    nmf = "nmf"
    svd = "svd"


Function = TypeVar("Function", bound=Callable[..., None])


def command(*examples: str, name: str | None = None, group: typer.Typer = app) -> Callable[[Function], Function]:
    """Register a command whose help is its docstring, each paragraph on one line, and then the examples."""

    def register(function: Function) -> Function:
        paragraphs = (" ".join(part.split()) for part in (function.__doc__ or "").split("\n\n"))
        epilog = "\n".join(["[bold]Examples[/]", *(f"$ {escape(line)}" for line in examples)])
        return group.command(name, help="\n\n".join(paragraphs), epilog=epilog)(function)

    return register


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A model folder: config.json and weights.")]
TextFile = Annotated[Path, typer.Option("--text", exists=True, dir_okay=False, help="A UTF-8 text file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from bitinfer import __version__

        typer.echo(f"bitinfer {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help=f"Show tracebacks and more; so does {DEBUG}=1.")] = False,
) -> None:
    """Run pretrained binary language models at the cost of one bit per weight."""
    if debug:
        os.environ[DEBUG] = "1"


@command(
    "bitinfer convert FBI-LLM_7B fbi-7b-packed",
    "bitinfer convert OneBit-7B onebit-7b-packed --dtype float16",
    "bitinfer convert SmolLM2-135M smol-packed --format latent --method nmf",
)
def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="The checkpoint to read.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make.")],
    source_format: Annotated[SourceFormat, typer.Option("--format", help="How SRC stores its weights.")] = (
        SourceFormat.auto
    ),
    method: Annotated[Method, typer.Option(help="How --format latent fits its scales.")] = Method.absmean,
    dtype: Annotated[DType | None, typer.Option(help="Of scales and dense tensors. By default as in SRC.")] = None,
    act_bits: Annotated[ActBits, typer.Option(help="Quantise activations to this many bits.")] = ActBits.none,
    act_block: Annotated[ActBlock, typer.Option(help="One activation scale per token (0) or 256 columns.")] = (
        ActBlock.token
    ),
    embedding_bits: Annotated[
        int | None, typer.Option(metavar="8", help="Round embedding and head to int8 rows. By default they stay.")
    ] = None,
    skip: Annotated[list[str], typer.Option(help="Layers to leave dense: a name or a pattern with *. Repeatable.")] = [  # noqa: B006
        "lm_head"
    ],
    group_size: Annotated[int, typer.Option(help="Columns that share a scale (latent, binary_dense); 0: a row.")] = 0,
    zero_limit: Annotated[
        float, typer.Option(help="Share of a tensor that may be exactly zero and becomes +1.")
    ] = 1e-4,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if bitinfer packed it.")] = False,
) -> None:
    """Pack a checkpoint into one bit per weight.

    FBI-LLM, OneBit and dense checkpoints that hold two values per row are recognised and packed without loss. Any other
    model can be approximated by sign and scale, which has to be asked for: --format latent.
    """
    from bitinfer import tables
    from bitinfer.convert import convert as run

    start = time.perf_counter()
    with progress_bar("packing", in_bytes=True) as progress:
        report = run(
            src,
            dst,
            format=source_format.value,
            method=method.value,
            dtype=dtype and dtype.value,
            act_bits=bits_of(act_bits),
            act_block=int(act_block.value),
            embedding_bits=embedding_bits,
            skip=skip,
            group_size=group_size,
            zero_limit=zero_limit,
            overwrite=overwrite,
            progress=progress,
        )
    out = console()
    out.print(tables.conversion(report, time.perf_counter() - start))
    out.print(tables.next_step(f"bitinfer verify {src} {dst}"), soft_wrap=True)


@command("bitinfer info fbi-7b-packed", "bitinfer info FBI-LLM_7B --json")
def info(folder: Folder, as_json: Json = False) -> None:
    """Show what a model folder holds: layers, sizes, average bits.

    A folder that is not packed yet is described as well: its format, and what converting it would give. No weights are
    loaded.
    """
    from bitinfer import tables
    from bitinfer.info import describe

    result = describe(folder)
    _show(result.to_dict(), as_json, lambda: tables.model(result))


@command(
    "bitinfer verify FBI-LLM_7B fbi-7b-packed",
    "bitinfer verify FBI-LLM_7B fbi-7b-packed --text wiki.test.raw --tokens 2048 --dtype bfloat16",
    "bitinfer verify FBI-LLM_7B fbi-7b-packed --act-bits 8",
    "bitinfer verify smol-packed smol-packed",
)
def verify(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="The source that was converted.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The packed folder.")],
    text: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A UTF-8 text file to compare on.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to compare on.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Compare at most this many positions.")] = 256,
    dtype: Annotated[DType, typer.Option(help="What the packed model computes in.")] = DType.float32,
    act_bits: Bits = None,
    head_bits: HeadBits = None,
    cache_bits: CacheBits = None,
    as_json: Json = False,
) -> None:
    """Compare a packed model with its original, logit by logit.

    The original is computed in float32 by its own formula, apart from the packed code. Conversions without loss pass or
    fail (exit code 1); approximations are only reported. With the packed folder as SRC as well, what it stores is the
    original: that checks the kernels.
    """
    import torch

    from bitinfer import tables
    from bitinfer.verify import verify as run

    if text is not None and prompt is not None:
        raise typer.BadParameter("give --text or --prompt, not both")
    with status() as stage:
        result = run(
            src,
            dst,
            text=prompt if text is None else _read(text),
            tokens=tokens,
            dtype=getattr(torch, dtype.value),
            act_bits="config" if act_bits is None else bits_of(act_bits),
            head_bits=head_bits,
            cache_bits=number_of(cache_bits),
            on_stage=stage,
        )
    _show(result.to_dict(), as_json, lambda: tables.verification(result))
    if result.passed is False:
        typer.echo(
            f"error: {dst} does not compute what {src} does; was it made from it? If so, convert again, and "
            "let `bitinfer doctor` check the kernels",
            err=True,
        )
        raise typer.Exit(1)


register_generate(command)


@command(
    "bitinfer eval fbi-7b-packed --text wiki.test.raw",
    "bitinfer eval fbi-7b-packed --text wiki.test.raw --dtype bfloat16 --max-windows 20 --json",
    name="eval",
)
def evaluate(
    model: Model,
    text: TextFile,
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens to a window. By default 2048, or what the model can read.")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Read no more windows than this.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 1,
    dtype: Dtype = None,
    act_bits: Bits = None,
    act_block: Block = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text: non-overlapping windows, as FBI-LLM reports it."""
    from bitinfer import tables
    from bitinfer.evaluate import perplexity

    content = _read(text)
    network, tokenizer = load_model(model, dtype, act_bits, act_block, threads)
    with progress_bar("windows") as progress:
        result = perplexity(
            network,
            tokenizer,
            content,
            window=window,
            max_windows=max_windows,
            batch=batch,
            progress=lambda done, total, so_far: progress(done, total, f"perplexity {so_far:.3f}"),
        )
    _show(result.to_dict(), as_json, lambda: tables.evaluation(result, f"{model} on {text}"))


@command("bitinfer doctor", "bitinfer doctor --json")
def doctor(as_json: Json = False) -> None:
    """Say what was built, what runs on this machine and why not, and what to do about it."""
    from bitinfer import tables
    from bitinfer.doctor import diagnose

    result = diagnose()
    _show(result.to_dict(), as_json, lambda: tables.diagnosis(result))
    if not result.healthy:
        raise typer.Exit(1)


register_bench(command, bench_app)
register_distill(command)
register_tune(command)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); convert it, or pass another file") from None


def _show(values: dict[str, Any], as_json: bool, table: Callable[[], Any]) -> None:
    if as_json:
        typer.echo(json.dumps(values, indent=2))
    else:
        console().print(table())


def _one_line(error: Exception) -> str:
    """Write an exception in one line; one that bitinfer did not word says how to see more."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (ValueError, TypeError, OSError, RuntimeError, ImportError)) and text:
        return text
    return f"{type(error).__name__}: {text} (run again with {DEBUG}=1 for the traceback)"


def main() -> None:
    """Run the command line."""
    warnings.showwarning = lambda message, *rest, **options: typer.echo(f"warning: {message}", err=True)
    app(prog_name="bitinfer")


if __name__ == "__main__":
    main()
