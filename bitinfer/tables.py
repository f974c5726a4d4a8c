"""What the commands print: one function per report, each returning rich renderables."""

import itertools
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from bitinfer.bench import BenchReport, ModelReport
    from bitinfer.convert import ConversionReport
    from bitinfer.doctor import Diagnosis
    from bitinfer.evaluate import Perplexity
    from bitinfer.generate import Generation
    from bitinfer.info import ModelInfo
    from bitinfer.verify import Verification


def size(nbytes: float) -> str:
    """Write a number of bytes in powers of ten, as papers do: ``1.34 GB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.{2 if nbytes < 100 * factor else 1}f} {unit}"
    return f"{nbytes:.0f} B"


def conversion(report: "ConversionReport", took: float) -> RenderableType:
    """Summarise a conversion."""
    table = _facts(f"{report.format} -> {report.path}")
    table.add_row("layers packed", f"{len(report.layers)}")
    table.add_row("layers left dense", ", ".join(report.kept_dense[:4]) + (" ..." if report.kept_dense[4:] else ""))
    table.add_row("all tensors", f"{size(report.bytes_before)} -> {size(report.bytes_after)}")
    table.add_row("saved", f"{1 - report.bytes_after / max(report.bytes_before, 1):.2%}")
    table.add_row("packed layers", f"{size(report.packed_bytes)} for {report.weights:,} weights")
    table.add_row("bits per weight", f"{report.bits_per_weight:.4f}")
    table.add_row("exact zeros, now +1", f"{report.zeros:,}")
    table.add_row("time", f"{took:.1f} s")
    return Group(table, *_notes(report.notes))


def model(info: "ModelInfo") -> RenderableType:
    """Describe a model folder: what it is, its layers by kind, and the storage table."""
    about = _facts(info.path)
    about.add_row("kind", "packed by bitinfer" if info.packed else "not packed yet")
    about.add_row("format", info.format)
    about.add_row("architecture", info.architecture)
    about.add_row("weight files", size(info.file_bytes))
    if info.packed:
        block = f" per {info.act_block} columns" if info.act_block else " per token"
        about.add_row("activations", "as they come" if info.act_bits is None else f"int{info.act_bits}, scaled{block}")
    layers = Table(title="packed layers" if info.packed else "layers that convert would pack", title_justify="left")
    for name in ("layer", "count", "shape", "bytes", "bits/weight", "layout")[: None if info.packed else -1]:
        layers.add_column(name, justify="left" if name in ("layer", "layout") else "right")
    for pattern, count, one, nbytes in info.groups():
        shape = f"{one.out_features} x {one.in_features}"
        row = [escape(pattern), str(count), shape, size(nbytes), f"{one.bits_per_weight:.4f}"]
        if info.packed:
            row.append(_layout(one.planes, one.group_size, one.tensors, one.norm_eps))
        layers.add_row(*row)
    parts: list[RenderableType] = [about, layers, _dense(info), storage(info), *_notes(info.notes)]
    if not info.packed:
        option = " --format latent" if info.format == "dense" else ""
        parts.append(next_step(f"bitinfer convert {info.path} {info.path.rstrip('/')}-packed{option}"))
    return Group(*parts)


def storage(info: "ModelInfo") -> Table:
    """Build the storage table of the FBI-LLM and OneBit papers."""
    s = info.storage
    title = "storage" if info.packed else "storage after converting, with scales and dense tensors in fp16 (expected)"
    table = Table(title=title, title_justify="left")
    columns = {
        "fp16": size(s.fp16_bytes),
        "packed": size(s.packed_bytes),
        "saving": f"{s.saving:.2%}",
        "linears only": size(s.linear_bytes),
        "scales": f"{s.extra_values:,}",
        "their share": f"{s.extra_share:.3%}",
        "bits/weight": f"{s.bits_per_weight:.4f}",
        "average width": f"{s.average_bit_width:.4f}",
    }
    for name in columns:
        table.add_column(name, justify="right")
    table.add_row(*columns.values())
    table.caption = "scales: values beside the signs; average width: bits over weights and scales, as papers count"
    table.caption_justify = "left"
    return table


def verification(report: "Verification") -> RenderableType:
    """Show how far a packed model is from its original."""
    original = "its own weights, dequantised," if report.format == "packed" else f"the original ({report.format})"
    table = _facts(f"packed model in {report.dtype} against {original} in float32")
    table.add_row("positions compared", f"{report.tokens}")
    table.add_row("largest logit error", f"{report.max_error:.3g}")
    table.add_row("relative error (RMS)", f"{report.relative_error:.3g}")
    table.add_row("KL divergence, mean", f"{report.kl_mean:.3g} nats per token")
    table.add_row("KL divergence, largest", f"{report.kl_max:.3g} nats")
    table.add_row("same likeliest token", f"{report.top1_agreement:.2%}")
    table.add_row("loss, original -> packed", f"{report.nll_reference:.4f} -> {report.nll_packed:.4f} nats per token")
    if report.passed is None:
        verdict = "[yellow]REPORTED ONLY[/]: an approximation, no agreement is required"
    else:
        word = "[green]PASS[/]" if report.passed else "[red]FAIL[/]"
        sign = "<=" if report.passed else ">"
        verdict = f"{word}: relative error {report.relative_error:.3g} {sign} tolerance {report.tolerance:.3g}"
    table.add_row("verdict", verdict)
    return Group(table, *_notes(report.notes))


def speed(result: "Generation") -> str:
    """Write the speed of a generation in one line."""
    decode = result.decode_tokens_per_second
    parts = [
        f"prompt {result.prompt_tokens} tokens at {result.prefill_tokens_per_second:.1f} tokens/s",
        f"first token after {result.time_to_first_token:.2f} s",
        f"{len(result.token_ids)} new tokens" + (f" at {decode:.1f} tokens/s" if decode is not None else ""),
    ]
    return ", ".join(parts)


def evaluation(result: "Perplexity", name: str) -> RenderableType:
    """Show a perplexity."""
    table = _facts(name)
    table.add_row("perplexity", f"{result.perplexity:.4f}")
    table.add_row("loss", f"{result.nll:.4f} nats per token")
    if result.bits_per_byte is not None:
        table.add_row("bits per byte", f"{result.bits_per_byte:.4f}")
    table.add_row("windows", f"{result.windows} of {result.window} tokens, not overlapping")
    table.add_row("speed", f"{result.windows * result.window / max(result.seconds, 1e-9):.1f} tokens/s")
    return table


def diagnosis(report: "Diagnosis") -> RenderableType:
    """Show what is installed, what runs, and what to do about the rest."""
    meaning = {
        "full": "CPU and CUDA kernels",
        "cpu only": "CPU kernels, no CUDA kernels",
        "pure python": "no compiled kernels: everything runs, slowly",
    }
    about = _facts("installation")
    about.add_row("install", f"{report.install} ({meaning[report.install]})")
    for part, state in report.libraries.items():
        about.add_row(part, _coloured(state))
    for name, version in report.versions.items():
        about.add_row(name, version or "not installed")
    machine = report.machine
    about.add_row("processor", f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} torch threads")
    about.add_row("GPUs", ", ".join(machine["gpus"]) or "none that torch sees")
    backends = Table(
        "backend", "runs here", "self-test", title="backends, in order of preference", title_justify="left"
    )
    for backend in report.backends:
        tests = ", ".join(f"{device}: {result}" for device, result in backend.self_test.items())
        runs = _coloured("yes" if backend.available else f"no: {backend.reason}")
        backends.add_row(backend.name, runs, escape(tests) or "-")
    choices = _facts("tensors run on")
    for device, reasons in report.choices.items():
        chosen = next(name for name, reason in reasons.items() if reason is None)
        before = (
            f"not {name}: {reason}" for name, reason in itertools.takewhile(lambda item: item[1], reasons.items())
        )
        choices.add_row(device, escape("; ".join((chosen, *before))))
    parts: list[RenderableType] = [about, backends, choices]
    if report.instruction_sets:
        sets = Table("instruction set", "there", "", title="CPU kernels, in order of preference", title_justify="left")
        for isa in report.instruction_sets:
            there = _coloured("yes" if isa["supported"] else f"no: {isa['reason']}")
            sets.add_row(isa["name"], there, "runs" if isa["name"] == report.active_instruction_set else "")
        parts.append(sets)
    if report.cuda_kernels:
        tokens = list(report.cuda_kernels[0]["kernels"])
        kernels = Table("op", *(f"M={m}" for m in tokens), title="CUDA kernels at 4096 x 4096", title_justify="left")
        for row in report.cuda_kernels:
            kernels.add_row(f"{row['op']} {row['activations']}", *row["kernels"].values())
        parts.append(kernels)
    if report.variables:
        variables = _facts("environment variables that change what runs")
        for name, value in report.variables.items():
            variables.add_row(name, escape(value))
        parts.append(variables)
    for problem in report.problems:
        colour = "red" if problem["serious"] else "yellow"
        parts.append(f"[{colour}]{'problem' if problem['serious'] else 'missing'}:[/] {escape(problem['problem'])}")
        parts.append(next_step(problem["next_step"]))
    if not report.problems:
        parts.append("[green]all is well[/]")
    return Group(*parts)


def benchmark(report: "BenchReport") -> RenderableType:
    """Show the timings of the kernels, a table for each shape."""
    m = report.machine
    runs_on = f"{m['threads']} threads" if m["device"] == "cpu" else f"driver {m['driver']}, CUDA {m['cuda']}"
    head = (
        f"{m['device_name']}, {runs_on}, torch {m['torch']}, bitinfer {m['bitinfer']} "
        f"({m['commit'] or 'no commit known'}); memory reads at {report.bandwidth_gb_per_s:,.1f} GB/s"
    )
    by_shape = defaultdict(list)
    for row in report.measurements:
        by_shape[row.n, row.k].append(row)
    peers = list(dict.fromkeys(peer for row in report.measurements for peer in row.ratios))
    left = ["op", "activations", "kernel"] if m["device"] == "cuda" else ["op", "activations", "backend"]
    digits = 1 if m["device"] == "cpu" else 2
    parts: list[RenderableType] = [escape(head)]
    for (n, k), rows in by_shape.items():
        table = Table(title=f"{n} x {k}", title_justify="left")
        names = ["M", *left, "median us", "IQR us", "GB/s", "of memory", "TOPS"]
        for name in (*names, *(f"x {peer.removeprefix('F.linear ')}" for peer in peers)):
            table.add_column(name, justify="left" if name in left else "right")
        for row in sorted(rows, key=lambda row: row.m):
            table.add_row(
                str(row.m or "-"),
                row.op,
                row.activations,
                row.kernel or row.backend,
                f"{row.median_us:.{digits}f}",
                f"{row.iqr_us:.{digits}f}",
                f"{row.gb_per_s:.2f}",
                f"{row.bandwidth_share:.1%}",
                "" if row.tops is None else f"{row.tops:,.{2 if row.tops < 10 else 0}f}",
                *(f"{row.ratios[peer]:.2f}" if peer in row.ratios else "" for peer in peers),
            )
        parts.append(table)
    if m["load"] > m["cores"] / 2:
        parts.append(
            f"[yellow]note:[/] other programs kept this machine busy (load {m['load']:.1f}): run again when idle"
        )
    parts += _notes(report.notes)
    parts.append(
        "M: tokens. GB/s: bytes of the weight over the median. TOPS: 2 M N K over the median. x ...: times faster than "
        "F.linear of that dtype, or than that peer."
    )
    return Group(*parts)


def models(report: "ModelReport") -> RenderableType:
    """Show the timings of whole models, a table for decoding and one for prompts."""
    m = report.machine
    runs_on = f"{m['threads']} threads" if m["device"] == "cpu" else f"driver {m['driver']}, CUDA {m['cuda']}"
    head = (
        f"{report.name} on {m['device_name']}, {runs_on}, torch {m['torch']}, bitinfer {m['bitinfer']} "
        f"({m['commit'] or 'no commit known'})"
    )
    decoding = Table(title="decoding", title_justify="left")
    prompts = Table(title="prompts, one at a time", title_justify="left")
    left = ("model", "loop", "activations")
    for table, names in (
        (decoding, ("batch", "context", "tokens/s", "ms a step", "x dense", "peak", "weights")),
        (prompts, ("tokens", "tokens/s", "ms to first token", "x dense")),
    ):
        for name in (*left, *names):
            table.add_column(name, justify="left" if name in left else "right")
    rows = report.measurements
    for row in sorted(rows, key=lambda row: (row.decode_tokens_per_second is None, row.batch, row.context)):
        dense = [r for r in rows if r.model == "dense" and (r.batch, r.context) == (row.batch, row.context)]
        about = (row.model, row.loop, row.activations)
        speed = row.decode_tokens_per_second
        if speed is None:
            ratio = "".join(f"{row.prefill_tokens_per_second / r.prefill_tokens_per_second:.2f}" for r in dense[:1])
            to_first = f"{1e3 * row.seconds_to_first_token:.1f}"
            prompts.add_row(*about, str(row.context), f"{row.prefill_tokens_per_second:,.0f}", to_first, ratio)
            continue
        ratio = "".join(f"{speed / (r.decode_tokens_per_second or speed):.2f}" for r in dense[:1])
        peak = "" if row.peak_bytes is None else size(row.peak_bytes)
        step = f"{1e3 * row.batch / speed:.2f}"
        where = (str(row.batch), str(row.context))
        decoding.add_row(*about, *where, f"{speed:,.1f}", step, ratio, peak, size(row.weight_bytes))
    parts: list[RenderableType] = [escape(head), decoding, prompts, *_notes(report.notes)]
    parts.append("x dense: times faster than the dense model under transformers in the same run.")
    return Group(*parts)


def next_step(command: str) -> str:
    """Write what to do next."""
    return f"[bold]next:[/] {escape(command)}"


def _layout(planes: int, group_size: int, tensors: Iterable[str], norm_eps: float | None) -> str:
    parts = [f"{planes} planes"] if planes > 1 else []
    parts += [
        *tensors,
        *([f"group {group_size}"] if group_size else []),
        *(["LayerNorm"] if norm_eps is not None else []),
    ]
    return ", ".join(parts) or "signs alone"


def _dense(info: "ModelInfo") -> Table:
    """List the tensors that stay dense, those of all layers together."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, nbytes in info.dense.items():
        key = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        sums[key][0] += 1
        sums[key][1] += nbytes
    table = Table(title="dense tensors", title_justify="left")
    for name in ("tensor", "count", "bytes"):
        table.add_column(name, justify="left" if name == "tensor" else "right")
    for key, (count, nbytes) in sorted(sums.items(), key=lambda item: -item[1][1]):
        table.add_row(escape(key), str(count), size(nbytes))
    return table


def _facts(title: str) -> Table:
    table = Table(title=escape(title), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table


def _notes(notes: Iterable[str]) -> list[RenderableType]:
    return [f"[yellow]note:[/] {escape(note)}" for note in notes]


def _coloured(state: Any) -> str:
    text = escape(str(state))
    return f"[green]{text}[/]" if text.startswith("yes") else f"[yellow]{text}[/]"
