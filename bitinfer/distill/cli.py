"""The commands ``corpus``, ``distill`` and ``average``: each is a thin call into this package."""

import json
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from bitinfer.terminal import console, progress_bar, quiet_transformers

TeacherPath = Annotated[Path, typer.Option("--teacher", help="A LLaMA-shaped model folder, or a .gguf file.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]


class MethodName(str, Enum):
    fbi = "fbi"
    onebit = "onebit"


class Init(str, Enum):
    teacher = "teacher"
    scratch = "scratch"


class Start(str, Enum):
    nmf = "nmf"
    svd = "svd"


class Precision(str, Enum):
    auto = "auto"
    bf16 = "bf16"
    no = "no"


class Average(str, Enum):
    swa = "swa"
    ema = "ema"
    lawa = "lawa"
    warm = "warm"


def register(command: Callable[..., Any]) -> None:
    """Add the commands to the command line."""
    command(
        "bitinfer corpus out --teacher SmolLM2.gguf --vocabulary 8192 --shards 30 --prompts prompts.json",
        "bitinfer corpus out --teacher TinyLlama --text book.txt --text essays.txt --length 1024",
    )(corpus)
    command(
        "bitinfer distill --teacher TinyLlama --corpus corpus --out run --method fbi --steps 20000",
        "bitinfer distill --teacher SmolLM2.gguf --student 12-layers.json --corpus corpus --out run --minutes 20",
        "accelerate launch -m bitinfer.cli distill --teacher TinyLlama --corpus corpus --out run --method onebit",
    )(distill)
    command(
        "bitinfer average run/snapshots/step-* --out averaged --method lawa --last 5",
        "bitinfer average run-a/student run-b/student --out warm --method warm",
    )(average)


def corpus(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make, or to go on with.")],
    teacher: TeacherPath,
    text: Annotated[
        list[Path] | None, typer.Option(exists=True, dir_okay=False, help="Make it of UTF-8 text files. Repeatable.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="JSON with templates and topics to start from.")
    ] = None,
    vocabulary: Annotated[int, typer.Option(min=0, help="Keep this many tokens, the most used; 0: all.")] = 0,
    shards: Annotated[int, typer.Option(min=2, help="Shards in all; the first is held out.")] = 8,
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows that are written at once.")] = 1024,
    length: Annotated[int, typer.Option(min=2, help="Tokens to a row.")] = 512,
    temperature: Annotated[float, typer.Option(help="Of the sampling.")] = 1.0,
    greedy: Annotated[int, typer.Option(min=0, help="The first tokens of a text, taken greedily.")] = 3,
    held_out: Annotated[float, typer.Option(help="Share of a text file that is held out.")] = 0.02,
    seed: int = 0,
    minutes: Annotated[float | None, typer.Option(help="Start no new shard after this long.")] = None,
    device: Device = "auto",
) -> None:
    """Make a corpus of token rows: written by a teacher, or from text files.

    The teacher continues prompts, the first tokens greedily, the rest sampled. With --vocabulary it is restricted to
    the tokens that it uses most, and writes with those alone.
    """
    from bitinfer.distill.corpus import corpus_from_text
    from bitinfer.distill.generation import Writing, generate_corpus, reduce_vocabulary
    from bitinfer.distill.models import load_teacher
    from bitinfer.distill.prompts import Prompts

    quiet_transformers()
    model, tokenizer = load_teacher(teacher, _dtype(device))
    start = None if prompts is None else Prompts.read(prompts)
    how = Writing(
        row_length=length,
        shard_rows=shard_rows,
        greedy_tokens=greedy,
        temperature=(temperature, temperature),
        max_document=length,
        seed=seed,
    )
    if text is None or vocabulary:
        model.to(_device(device))
    if vocabulary:
        model, tokenizer = reduce_vocabulary(model, tokenizer, out, vocabulary, prompts=start, how=how)
    size = int(model.config.vocab_size)
    with progress_bar("writing") as progress:
        if text is not None:
            made = corpus_from_text(text, tokenizer, out, row_length=length, held_out=held_out, vocab_size=size)
        else:
            made = generate_corpus(
                model, tokenizer, out, prompts=start, how=how, shards=shards, minutes=minutes, progress=progress
            )
    rows = {split: made.count(split) for split in ("train", "held_out")}
    console().print(f"{out}: {rows['train']} rows to train on, {rows['held_out']} held out, {length} tokens each")


def distill(
    teacher: TeacherPath,
    corpus: Annotated[Path, typer.Option(help="What `bitinfer corpus` made.")],
    out: Annotated[Path, typer.Option(help="The folder of the run; the student goes to OUT/student.")],
    student: Annotated[
        Path | None,
        typer.Option(help="JSON (or a folder with config.json) with the student's shape; or the teacher's."),
    ] = None,
    method: MethodName = MethodName.fbi,
    init: Annotated[Init, typer.Option(help="Start from the teacher's weights, or from scratch.")] = Init.teacher,
    start: Annotated[Start, typer.Option(help="How OneBit decomposes the teacher's weights.")] = Start.nmf,
    latent_std: Annotated[
        float | None, typer.Option(help="Scale FBI's latent weights to this deviation; by default they stay.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates. By default as many as fit into --minutes.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Wall clock; with --steps the run is interrupted then.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to an update.")] = 64,
    micro_rows: Annotated[int | None, typer.Option(min=1, help="Rows at once; by default all of an update's.")] = None,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 1e-3,
    warmup: Annotated[int, typer.Option(min=0, help="Updates of warm-up.")] = 50,
    label_mix: Annotated[float, typer.Option(help="Share of the text itself in the target.")] = 0.0,
    hidden_weight: Annotated[float | None, typer.Option(help="Of the hidden states; by default the method's.")] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Updates between checkpoints.")] = 200,
    snapshot_every: Annotated[int, typer.Option(min=0, help="Updates between students for averaging; 0: none.")] = 0,
    seed: int = 0,
    precision: Precision = Precision.auto,
    compile_layers: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile the layers. By default on a GPU.")
    ] = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train a binary student to predict what its teacher predicts.

    The same command goes on with a run that was interrupted. Ctrl-C and SIGTERM end it with a checkpoint.
    """
    from bitinfer.distill.config import TrainConfig
    from bitinfer.distill.corpus import Corpus
    from bitinfer.distill.models import build_student, load_teacher, read_student_config, restrict_vocabulary
    from bitinfer.distill.trainer import train

    quiet_transformers()
    if steps is None and minutes is None:
        raise typer.BadParameter("give --steps, --minutes or both")
    rows_of = Corpus(corpus)
    on_gpu = _device(device) != "cpu"
    model, tokenizer = load_teacher(teacher, _dtype(device))
    if rows_of.kept is not None:
        from transformers import AutoTokenizer

        model, tokenizer = restrict_vocabulary(model, rows_of.kept), AutoTokenizer.from_pretrained(corpus)
    shape = None if student is None else read_student_config(student)
    network = build_student(
        model, method.value, shape, init=init.value, start=start.value, latent_std=latent_std, seed=seed
    )
    config = TrainConfig(
        steps=steps,
        minutes=minutes,
        rows=rows,
        micro_rows=micro_rows or rows,
        lr=lr,
        warmup=warmup,
        label_mix=label_mix,
        hidden_weight=hidden_weight,
        precision=("bf16" if on_gpu else "no") if precision is Precision.auto else precision.value,
        compile=on_gpu if compile_layers is None else compile_layers,
        save_every=save_every,
        eval_every=save_every,
        snapshot_every=snapshot_every,
        seed=seed,
    )
    about = {"init": init.value, "start": start.value, "latent_std": latent_std, "student": shape}
    with progress_bar("distilling") as progress:
        report = train(
            network,
            model,
            rows_of,
            out,
            config,
            method=method.value,
            tokenizer=tokenizer,
            about=about,
            progress=progress,
            accelerator=_accelerator(config.precision, on_gpu),
        )
    fidelity = None if report.fidelity is None else report.fidelity.to_dict()
    if as_json:
        values = {**report.__dict__, "fidelity": fidelity, "student": report.student and str(report.student)}
        typer.echo(json.dumps(values, indent=2))
        return
    if fidelity is None:
        typer.echo(f"stopped at update {report.step} of {report.total}; the same command goes on from there", err=True)
        raise typer.Exit(130)
    console().print(
        f"{report.step} updates, {report.tokens_per_second:,.0f} tokens/s. Held out: perplexity "
        f"{fidelity['student_perplexity']:.2f}, the teacher's {fidelity['teacher_perplexity']:.2f} "
        f"({fidelity['ratio']:.2f} x); KL {fidelity['kl']:.3f} nats, same likeliest token {fidelity['agreement']:.1%}\n"
        f"next: bitinfer convert {report.student} packed",
        soft_wrap=True,
    )


def average(
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE...", help="Latent checkpoints, the oldest first.")],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    method: Annotated[Average, typer.Option(help="swa, warm: all alike; ema: with --decay; lawa: the --last ones.")] = (
        Average.swa
    ),
    decay: Annotated[float, typer.Option(help="Of ema.")] = 0.9,
    last: Annotated[int, typer.Option(min=1, help="Of lawa.")] = 5,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Average latent checkpoints before the sign is taken; scales are made non-negative first."""
    from bitinfer.distill.average import average_checkpoints

    report = average_checkpoints(sources, out, method=method.value, decay=decay, last=last, overwrite=overwrite)
    console().print(str(report), soft_wrap=True)


def _device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _dtype(device: str) -> Any:
    import torch

    return torch.float32 if _device(device) == "cpu" else torch.bfloat16


def _accelerator(precision: str, on_gpu: bool) -> Any:
    from accelerate import Accelerator

    return Accelerator(mixed_precision=precision, cpu=not on_gpu)
