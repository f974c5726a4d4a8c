"""Train the small binary model that ships with bitinfer, from the teacher's weights to the packed folder.

    python examples/embedded_model/recipe.py train --teacher SmolLM2-135M-Instruct.Q4_1.gguf --out run1 \
        --corpus-minutes 6 --train-minutes 14
    python examples/embedded_model/recipe.py pack --teacher SmolLM2-135M-Instruct.Q4_1.gguf --run run1 --out embedded

``train`` needs one GPU. It chooses the vocabulary, lets the teacher write a corpus, distils for the time that it is
given, and leaves in ``--out`` all that a later call, on this machine or another, needs to go on: ``--resume run1`` with
``--span`` for the part of the learning rate's cosine that it covers. ``compare`` needs one too, and trains a student of
each method and start on the same batches. ``pack`` needs none: it makes the packed folder,
measures it on the held-out rows and writes samples. See README.md beside this file.
"""

import argparse
import json
import shutil
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from card import model_card
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

import bitinfer
from bitinfer.distill import (
    Corpus,
    Prompts,
    TrainConfig,
    Writing,
    build_student,
    fidelity,
    generate_corpus,
    load_snapshot,
    load_teacher,
    packed_bytes,
    reduce_vocabulary,
    restrict_vocabulary,
    save_snapshot,
    save_student,
    train,
)
from bitinfer.distill.corpus import HELD_OUT, TRAIN, VOCABULARY
from bitinfer.distill.generation import stop_tokens
from bitinfer.distill.trainer import read_log
from bitinfer.generate import generate

HERE = Path(__file__).resolve().parent
SEED = 2026
VOCABULARY_SIZE = 8192
# of the teacher's width, so that embedding, norms and every second or third layer can be its own
STUDENT = {"num_hidden_layers": 20, "max_position_embeddings": 512}
LIMIT = 16_000_000  # bytes of the packed folder, tokenizer and all
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAMPLES = [
    (False, "Once upon a time"),
    (False, "The history of bread"),
    (False, "The lighthouse keeper climbed the stairs and"),
    (False, "Whales are large animals that"),
    (False, "One morning, a boy"),
    (True, "Tell me about the moon."),
    (True, "Why do people like music?"),
    (True, "Write a short story about a dragon."),
    (True, "Explain in two sentences why the sky is blue."),
    (True, "Give me some advice about sleep."),
]
# what compare trains: method, peak learning rate, start. OneBit's paper takes 4e-4.
COMPARED: dict[str, tuple[Any, float, dict[str, Any]]] = {
    "FBI, from the teacher": ("fbi", 1.5e-3, {"init": "teacher"}),
    "FBI, from scratch": ("fbi", 1.5e-3, {"init": "scratch"}),
    "OneBit, SVID by NMF": ("onebit", 1.5e-3, {"start": "nmf"}),
    "OneBit, SVID by SVD": ("onebit", 1.5e-3, {"start": "svd"}),
    "OneBit, SVID by NMF, 4e-4": ("onebit", 4e-4, {"start": "nmf"}),
}
STATE, TOTALS = "state.tar", "totals.json"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "compare", "pack"):
        command = commands.add_parser(name)
        command.add_argument("--teacher", type=Path, required=True, help="a GGUF file or a model folder")
        command.add_argument("--out", type=Path, required=True, help="the folder to write")
        command.add_argument("--method", choices=["fbi", "onebit"], default="fbi")
        command.add_argument("--layers", type=int, default=STUDENT["num_hidden_layers"])
        command.add_argument("--vocabulary", type=int, default=VOCABULARY_SIZE)
        command.add_argument("--eval-rows", type=int, default=128)
        if name == "pack":
            command.add_argument("--run", type=Path, required=True, help="what train left in its --out")
            command.add_argument(
                "--act-bits", default="none", help='measured: "none,8,8/256" for a scale per 256 columns'
            )
            continue
        command.add_argument("--work", type=Path, default=Path("embedded-work"), help="corpus and checkpoints")
        command.add_argument("--corpus-minutes", type=float, default=6.0)
        if name == "compare":
            command.add_argument("--steps", type=int, default=400, help="updates of each student")
        command.add_argument("--train-minutes", type=float, default=14.0)
        command.add_argument("--resume", type=Path, help="the --out of an earlier call")
        command.add_argument("--span", type=float, nargs=2, default=(0.0, 1.0), help="part of the cosine")
        command.add_argument("--init", choices=["teacher", "scratch"], default="teacher")
        command.add_argument("--start", choices=["nmf", "svd"], default="nmf", help="of onebit")
        command.add_argument("--lr", type=float, default=1.5e-3)
        command.add_argument("--scale-lr", type=float, default=0.4)
        command.add_argument("--latent-std", type=float, default=0.02)
        command.add_argument("--warmup", type=int, default=200)
        command.add_argument("--rows", type=int, default=128, help="rows to an update")
        command.add_argument("--micro-rows", type=int, default=128)
        command.add_argument("--length", type=int, default=512, help="tokens to a row")
        command.add_argument("--shard-rows", type=int, default=4096)
        command.add_argument("--shards", type=int, default=200, help="at most, where --corpus-minutes ends sooner")
        command.add_argument("--seed", type=int, default=SEED, help="give each call of a training its own")
        command.add_argument("--no-compile", action="store_true")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGUN:6.0f} s] {text}", flush=True)


def progress() -> Callable[[int, int, str], None]:
    """Return what tells every quarter of a minute how far a training is."""
    last = [0.0]

    def show(done: int, total: int, what: str) -> None:
        if time.monotonic() - last[0] > 15:
            last[0] = time.monotonic()
            say(f"update {done} of {total or '?'}: {what}")

    return show


def prepare(o: argparse.Namespace) -> tuple[Any, Any, Corpus]:
    """Return the teacher and tokenizer over the chosen vocabulary, and the corpus that the teacher wrote."""
    torch.set_float32_matmul_precision("high")
    on_gpu = o.device.startswith("cuda")
    state, corpus_path = o.work / "state", o.work / f"corpus-{o.seed}"
    if o.resume is not None and not (state / VOCABULARY).exists():
        unpack_state(o.resume, state)
    teacher, tokenizer = load_teacher(o.teacher, torch.bfloat16 if on_gpu else torch.float32)
    teacher.to(o.device)
    tokenizer.chat_template = CHAT_TEMPLATE
    say(f"read the teacher: {sum(p.numel() for p in teacher.parameters()) / 1e6:.0f} M parameters on {o.device}")
    prompts = Prompts.read(HERE / "prompts.json")
    how = Writing(
        row_length=o.length, shard_rows=o.shard_rows, temperature=(0.6, 0.8), max_document=o.length // 2, seed=o.seed
    )
    teacher, tokenizer = reduce_vocabulary(teacher, tokenizer, state, o.vocabulary, prompts=prompts, how=how)
    shutil.rmtree(state / "pilot", ignore_errors=True)
    say(f"kept {o.vocabulary} tokens")
    about = {"vocabulary": o.vocabulary}
    if (state / "held-out.safetensors").exists():
        adopt_held_out(state, corpus_path, teacher, tokenizer, prompts, how, about)
    corpus = generate_corpus(
        teacher,
        tokenizer,
        corpus_path,
        prompts=prompts,
        how=how,
        shards=o.shards,
        minutes=o.corpus_minutes,
        about=about,
        progress=lambda done, total, speed: say(f"wrote shard {done} of at most {total}: {speed}"),
    )
    shutil.copyfile(corpus.path / "shard-00000.safetensors", state / "held-out.safetensors")
    if on_gpu:
        torch.cuda.empty_cache()
    return teacher, tokenizer, corpus


def settings(o: argparse.Namespace, **changes: Any) -> TrainConfig:
    on_gpu = o.device.startswith("cuda")
    config = TrainConfig(
        steps=None,
        minutes=o.train_minutes,
        rows=o.rows,
        micro_rows=min(o.micro_rows, o.rows),
        lr=o.lr,
        warmup=o.warmup,
        floor=0.02,
        span=tuple(o.span),
        scale_lr=o.scale_lr,
        precision="bf16" if on_gpu else "no",
        compile=on_gpu and not o.no_compile,
        save_every=500,
        log_every=20,
        eval_every=500,
        eval_rows=o.eval_rows,
        seed=o.seed,
    )
    return replace(config, **changes)


def run_training(o: argparse.Namespace) -> None:
    teacher, tokenizer, corpus = prepare(o)
    state = o.work / "state"
    shape = {**STUDENT, "num_hidden_layers": o.layers, "max_position_embeddings": o.length}
    student = build_student(teacher, o.method, shape, init=o.init, start=o.start, latent_std=o.latent_std, seed=o.seed)
    if o.resume is not None:
        load_snapshot(student, o.resume if (o.resume / "snapshot.json").exists() else o.work / "resumed")
    say(f"student: {packed_bytes(student.config) / 1e6:.2f} MB of tensors once packed")
    config = settings(o)
    run = o.work / f"run-{o.method}-{o.seed}"
    try:
        report = train(student, teacher, corpus, run, config, method=o.method, tokenizer=tokenizer, progress=progress())
    except RuntimeError as error:
        if not (config.compile and "no gradient" in str(error)):
            raise
        say(f"{error}; going on without compiling")
        student.zero_grad(set_to_none=True)
        for layer in [*student.model.layers, *teacher.model.layers]:
            layer._compiled_call_impl = None
        config = replace(config, compile=False, micro_rows=config.micro_rows // 4)
        run = run.with_name(f"{run.name}-eager")
        report = train(student, teacher, corpus, run, config, method=o.method, tokenizer=tokenizer, progress=progress())
    say(f"{report.tokens_per_second:,.0f} tokens/s, {report.step} updates, {len(report.skipped)} blocks skipped")
    if report.fidelity is not None:
        say(json.dumps(report.fidelity.to_dict()))
    add_to_totals(state / TOTALS, o, report, corpus)
    keep_state(o, student, report, run, state)
    say(f"wrote {o.out}")


def run_comparison(o: argparse.Namespace) -> None:
    """Train a student of each kind on the same batches, from the same number of updates; leave figures and curves."""
    teacher, _, corpus = prepare(o)
    shape = {**STUDENT, "num_hidden_layers": o.layers, "max_position_embeddings": o.length}
    o.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name, (method, lr, how) in COMPARED.items():
        torch._dynamo.reset()  # the layers of the last student
        student = build_student(teacher, method, shape, latent_std=o.latent_std, seed=o.seed, **how)
        config = settings(o, steps=o.steps, minutes=None, lr=lr, eval_every=0, save_every=10**9)
        run = o.work / f"compare-{name}"
        report = train(student, teacher, corpus, run, config, method=method, progress=progress())
        assert report.fidelity is not None
        results[name] = {
            "method": method,
            "lr": lr,
            **how,
            "tokens_per_second": report.tokens_per_second,
            **report.fidelity.to_dict(),
            "log": [line for line in read_log(run) if "kl" in line],
        }
        say(f"{name}: {json.dumps(report.fidelity.to_dict())}")
        (o.out / "comparison.json").write_text(json.dumps(results, indent=1) + "\n")
        shutil.rmtree(run)
    draw_comparison(results, o.out / "comparison.png")


def draw_comparison(results: dict[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = {"kl": "KL from the teacher, nats per token", "flip_ratio": "flip-flop ratio"}
    for axes, (field, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for name, found in results.items():
            axes.plot([x["step"] for x in found["log"]], [x[field] for x in found["log"]], label=name)
        axes.set(title=title, xlabel="updates", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=110)


def adopt_held_out(
    state: Path, path: Path, teacher: Any, tokenizer: Any, prompts: Prompts, how: Writing, about: dict[str, Any]
) -> None:
    """Begin a corpus with the held-out shard of the first call, so that all calls are measured alike."""
    settings = {"writing": asdict(how), "prompts": asdict(prompts), "held_out_shards": 1, **about}
    size = int(teacher.config.vocab_size)
    corpus = Corpus.create(path, vocab_size=size, row_length=how.row_length, about=settings, tokenizer=tokenizer)
    if not corpus.has("shard-00000"):
        tensors = load_file(state / "held-out.safetensors")
        corpus.add("shard-00000", tensors["tokens"].numpy(), tensors["scored"].numpy(), HELD_OUT)


def add_to_totals(file: Path, o: argparse.Namespace, report: Any, corpus: Corpus) -> None:
    """Count what this call and those before it did, for the model card."""
    totals = json.loads(file.read_text()) if file.exists() else {}
    for name, value in {
        "updates": report.step,
        "tokens": report.step * o.rows * o.length,
        "corpus_tokens": corpus.count(TRAIN) * o.length,
        "minutes": o.train_minutes,
        "corpus_minutes": o.corpus_minutes,
    }.items():
        totals[name] = totals.get(name, 0) + value
    file.write_text(json.dumps(totals))


def keep_state(o: argparse.Namespace, student: Any, report: Any, run: Path, state: Path) -> None:
    """Leave a few files that are enough to go on from, or to pack."""
    about = {"shape": {k: getattr(student.config, k) for k in STUDENT}, "method": o.method}
    folder = o.work / "snapshot"
    save_snapshot(student, folder, about=about)
    (state / "report.json").write_text(json.dumps({**report.__dict__, "options": vars(o)}, default=str, indent=1))
    for name in ("log.jsonl", "curves.png"):
        if (run / name).exists():
            shutil.copyfile(run / name, state / name)
    shutil.copyfile(folder / "snapshot.json", state / "snapshot.json")
    o.out.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.safetensors"):
        shutil.copyfile(file, o.out / file.name)
    partial = o.out / f".{STATE}.partial"
    with tarfile.open(partial, "w") as archive:
        for file in sorted(state.iterdir()):
            archive.add(file, file.name)
    partial.rename(o.out / STATE)


def unpack_state(run: Path, state: Path) -> None:
    """Undo keep_state: the vocabulary and the held-out rows go to ``state``, the snapshot beside it."""
    state.mkdir(parents=True, exist_ok=True)
    with tarfile.open(run / STATE) as archive:
        archive.extractall(state, filter="data")
    resumed = state.parent / "resumed"
    shutil.rmtree(resumed, ignore_errors=True)
    resumed.mkdir()
    for file in [state / "snapshot.json", *run.glob("latent-*.safetensors")]:
        shutil.copyfile(file, resumed / file.name)


def run_packing(o: argparse.Namespace) -> None:
    work = o.out.with_name(f"{o.out.name}.work")
    unpack_state(o.run, work / "state")
    teacher, _ = load_teacher(o.teacher)
    kept = json.loads((work / "state" / VOCABULARY).read_text())["teacher_ids"]
    restrict_vocabulary(teacher, kept)
    tokenizer = AutoTokenizer.from_pretrained(work / "state")
    about = json.loads((work / "resumed" / "snapshot.json").read_text())["about"]
    student = build_student(teacher, about["method"], about["shape"], init="scratch")
    load_snapshot(student, work / "resumed")
    ends = stop_tokens(teacher, tokenizer)
    student.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=ends[0],
        repetition_penalty=1.2,  # without it so small a model says all things twice
    )
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.padding_side, tokenizer.model_max_length = "left", student.config.max_position_embeddings
    save_student(student, work / "student", tokenizer)
    bitinfer.convert(work / "student", o.out, dtype="float16", embedding_bits=8, overwrite=True)
    size = sum(file.stat().st_size for file in o.out.iterdir())
    say(f"packed: {size:,} bytes in all, {'below' if size <= LIMIT else 'ABOVE'} the limit of {LIMIT:,}")
    rows = load_file(work / "state" / "held-out.safetensors")
    ids, scored = rows["tokens"][: o.eval_rows].long(), rows["scored"][: o.eval_rows]
    training = json.loads((work / "state" / TOTALS).read_text())
    results: dict[str, Any] = {"bytes": size, "vocabulary": len(kept), "training": training, "activations": {}}
    for form in o.act_bits.split(","):
        bits, _, block = form.partition("/")
        act_bits = None if bits == "none" else int(bits)
        model, _ = bitinfer.load(o.out, dtype=torch.float32, act_bits=act_bits, act_block=int(block or 0))
        found = fidelity(model, teacher, ids, scored, batch=8)
        results["activations"][form] = found.to_dict()
        say(f"activations {form}: {json.dumps(found.to_dict())}")
    model, tokenizer = bitinfer.load(o.out, dtype=torch.float32)
    samples = []
    for number, (chat, prompt) in enumerate(SAMPLES):
        run = generate(model, tokenizer, prompt, max_new_tokens=80, temperature=0.6, top_p=0.9, seed=number, chat=chat)
        samples.append({"chat": chat, "prompt": prompt, "text": run.text})
        say(f"{prompt} | {run.text}")
    results["samples"] = samples
    (work / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    (o.out / "README.md").write_text(model_card(results))


BEGUN = time.monotonic()

if __name__ == "__main__":
    arguments = options()
    {"train": run_training, "compare": run_comparison, "pack": run_packing}[arguments.command](arguments)
    sys.exit(0)
