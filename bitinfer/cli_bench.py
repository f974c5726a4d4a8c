"""The commands under ``bench``: single kernels and whole models."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from bitinfer.cli_options import CacheBits, DType, HeadBits, Threads, number_of
from bitinfer.terminal import console, progress_bar

JsonFile = Annotated[Path | None, typer.Option("--json", dir_okay=False, help="Write JSON here; - for stdout.")]


def register(command: Callable[..., Any], group: typer.Typer) -> None:
    """Add the commands to the command line, under ``group``."""
    command(
        "bitinfer bench kernels --quick",
        "bitinfer bench kernels --shapes 7b --tokens 1,32 --threads 8 --json results.json",
        "bitinfer bench kernels --shapes 4096x4096 --isa scalar",
        "bitinfer bench kernels --device cuda --json h200.json",
        "bitinfer bench kernels --device cuda --shapes 4096x4096 --tokens 1..4096 --ops int8 --plot figures",
        group=group,
    )(kernels)
    command(
        "bitinfer bench model 130m",
        "bitinfer bench model 7b --device cuda --batches 1,8,64 --prompts 128,512,2048 --json 7b.json",
        "bitinfer bench model packed-7B --act-bits none,8,4 --no-dense",
        group=group,
    )(model)


def kernels(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    shapes: Annotated[
        str | None,
        typer.Option(help="130m, 1.3b, 7b of FBI-LLM, 7b-fused, or NxK (outputs x inputs); with commas."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", "--m", help="Tokens M, with commas; 1..4096 doubles from 1 to 4096.")
    ] = None,
    ops: Annotated[
        str, typer.Option(help='Ops to time, with commas: sign_gemm, int8, "popcount_gemm int4"; by default all.')
    ] = "",
    threads: Threads = None,
    isa: Annotated[str | None, typer.Option(help="Force an instruction set of the cpu backend.")] = None,
    peers: Annotated[
        str | None,
        typer.Option(help="Compare with ggml on a CPU, torch, fp8, triton, gemlite, humming on CUDA; by default all."),
    ] = None,
    peer_seconds: Annotated[float, typer.Option(help="How long gemlite and humming may take, each in all.")] = 240.0,
    layout: Annotated[str, typer.Option(help="On CUDA, which terms the weights have: fbi, onebit, row, plain ...")] = (
        "fbi"
    ),
    json_file: JsonFile = None,
    plot: Annotated[
        Path | None, typer.Option(file_okay=False, help="Write figures into this folder (needs matplotlib).")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One small model, one token, a few calls each.")] = False,
) -> None:
    """Time each op against dense layers and other libraries, on cold weights, after checking its results."""
    if isa is not None:
        os.environ["BITINFER_CPU_ISA"] = isa
    from bitinfer import tables
    from bitinfer.bench import bench_kernels, parse_shapes, parse_tokens
    from bitinfer.bench.plot import plot as draw

    if quick:
        shapes, tokens = "130m", "1"
    try:
        rows = None if tokens is None else parse_tokens(tokens)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with progress_bar("measuring") as progress:
        report = bench_kernels(
            None if shapes is None else parse_shapes(shapes),
            rows,
            device=device,
            only=_words(ops),
            threads=threads,
            isa=isa,
            seconds=0.03 if quick else 0.3,
            peers=None if peers is None else _words(peers),
            peer_seconds=peer_seconds,
            layout=layout,
            progress=progress,
        )
    if plot is not None:
        stem = "kernels" if json_file is None or str(json_file) == "-" else json_file.stem
        for path in draw(report.to_dict(), plot, stem):
            typer.echo(f"wrote {path}", err=True)
    _show(report.to_dict(), json_file, lambda: tables.benchmark(report))


def model(
    what: Annotated[
        str,
        typer.Argument(metavar="SHAPE_OR_DIR", help="130m, 1.3b, 7b or 13b with random weights, or a packed folder."),
    ],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[DType, typer.Option(help="Of activations, scales, caches and dense weights.")] = DType.bfloat16,
    act_bits: Annotated[str, typer.Option(help="Activation formats, with commas: none, 8, 4, 2, 1.")] = "none,8",
    batches: Annotated[str, typer.Option(help="Sequences at a time, with commas.")] = "1,8",
    prompts: Annotated[str, typer.Option(help="Lengths of prompts whose prefill is timed, with commas.")] = "128,512",
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompts in front of decoding.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that each sequence writes.")] = 64,
    head_bits: HeadBits = None,
    cache_bits: CacheBits = None,
    dense: Annotated[bool, typer.Option(help="Run the dense model too.")] = True,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Also the dense model compiled with a static cache; takes minutes.")
    ] = False,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Time prompts and decoding of a whole model: packed and dense, fused and under transformers."""
    import torch

    from bitinfer import tables
    from bitinfer.bench import bench_model

    formats = [None if bits == "none" else _number("--act-bits", bits) for bits in _words(act_bits)]
    with progress_bar("measuring") as progress:
        report = bench_model(
            what,
            device=device,
            dtype=getattr(torch, dtype.value),
            act_bits=formats,
            batches=[_number("--batches", part) for part in _words(batches)],
            prompts=[_number("--prompts", part) for part in _words(prompts)],
            context=context,
            new_tokens=new_tokens,
            head_bits=head_bits,
            cache_bits=number_of(cache_bits),
            dense=dense,
            compiled=compiled,
            threads=threads,
            progress=progress,
        )
    _show(report.to_dict(), json_file, lambda: tables.models(report))


def _words(text: str) -> list[str]:
    return [part for part in map(str.strip, text.split(",")) if part]


def _number(option: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{option}: expected numbers from 1 on, with commas, got {text!r}")
    return int(text)


def _show(values: dict[str, Any], file: Path | None, table: Callable[[], Any]) -> None:
    text = json.dumps(values, indent=2)
    if str(file) == "-":
        typer.echo(text)
        return
    if file is not None:
        file.write_text(text + "\n", encoding="utf-8")
    console().print(table())
