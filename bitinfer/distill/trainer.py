"""The training loop: accelerate underneath, checkpoints that resume exactly, and recovery from loss spikes."""

import json
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from bitinfer.checkpoint import read_json
from bitinfer.distill.config import TrainConfig, TrainReport, TrainState
from bitinfer.distill.corpus import HELD_OUT, TRAIN, Batches, Corpus, write_json
from bitinfer.distill.models import save_student
from bitinfer.distill.objectives import Distiller, Fidelity, default_hidden_weight, fidelity
from bitinfer.distill.students import flip_ratio, latent_signs, student_layers
from bitinfer.errors import BitinferError

LOG = "log.jsonl"
RUN = "run.json"
KEPT_CHECKPOINTS = 2
SPIKE_AFTER = 16  # updates before which nothing is a spike
MAX_ROLLBACKS = 20
ADAM_EPS = 1e-10  # the gradient of one latent weight among millions is small
TIMED_UPDATES = 20  # from which the number of updates that fit into the time is estimated
Progress = Callable[[int, int, str], None]


class DivergedError(BitinferError, RuntimeError):
    """The loss kept spiking however often the run was rolled back."""


def train(
    student: Any,
    teacher: Any,
    corpus: Corpus,
    out: str | Path,
    config: TrainConfig,
    *,
    method: str,
    tokenizer: Any | None = None,
    about: dict[str, Any] | None = None,
    progress: Progress | None = None,
    accelerator: Any | None = None,
) -> TrainReport:
    """Train a student, or go on with a run that was interrupted.

    ``out`` gets ``checkpoints/`` (everything, to resume from), ``log.jsonl``, ``curves.png``, ``snapshots/`` and in the
    end ``student/`` in the published layout. A run that is resumed does the same updates as one that never stopped.
    SIGTERM and SIGINT end it after the update at hand, with a checkpoint.

    A spike is a loss that is not finite or ``spike_factor`` times the median of the last ones. Then the last checkpoint
    is restored and the data between it and the spike skipped, as FBI-LLM does with its data chunks.

    Args:
        student: from :func:`build_student`; its parameters are trained.
        teacher: over the same vocabulary; frozen, and moved to the device.
        corpus: see :class:`Corpus`.
        out: the folder of the run.
        config: how to train.
        method: "fbi" or "onebit".
        tokenizer: saved with the student.
        about: further settings that must be the same when the run is resumed.
        progress: called with (updates done, updates in all, what to show).
        accelerator: an ``accelerate.Accelerator``, or None to make one.

    Raises:
        ValueError: the corpus has another vocabulary or too few rows, or ``out`` holds a run with other settings.
        DivergedError: the loss spiked again and again.
    """
    return _Run(student, teacher, corpus, Path(out), config, method, tokenizer, about or {}, accelerator).go(progress)


class _Run:
    def __init__(
        self,
        student: Any,
        teacher: Any,
        corpus: Corpus,
        out: Path,
        config: TrainConfig,
        method: str,
        tokenizer: Any | None,
        about: dict[str, Any],
        accelerator: Any | None,
    ) -> None:
        from accelerate import Accelerator

        # it warns of each checkpoint that head and embedding are one tensor, which is as it should be
        logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)

        for role, model in (("student", student), ("teacher", teacher)):
            if model.config.vocab_size != corpus.vocab_size:
                raise ValueError(
                    f"train: the {role} has {model.config.vocab_size} tokens and the corpus {corpus.vocab_size}; use "
                    "the vocabulary that the corpus was made with"
                )
        self.accelerator = accelerator or Accelerator(mixed_precision=config.precision)
        self.config, self.corpus, self.out, self.tokenizer = config, corpus, out, tokenizer
        processes = self.accelerator.num_processes
        if config.rows % (processes * config.micro_rows):
            raise ValueError(
                f"train: rows={config.rows} must be a multiple of micro_rows={config.micro_rows} times "
                f"{processes} processes"
            )
        self.accumulate = config.rows // (processes * config.micro_rows)
        self.batches = Batches(corpus.count(TRAIN), config.rows, config.seed)
        self.state = TrainState(total=config.steps)
        self.dtype = torch.bfloat16 if config.precision == "bf16" else None
        weight = config.hidden_weight
        distiller = Distiller(
            student,
            teacher.to(self.accelerator.device).requires_grad_(False).eval(),
            hidden_weight=default_hidden_weight(method, corpus.row_length) if weight is None else weight,
            label_mix=config.label_mix,
            chunk=config.chunk,
            dtype=self.dtype,
        )
        if config.compile:
            distiller.compile_layers()
        optimizer = _optimizer(distiller.student, config, self.accelerator.device)
        self.distiller, self.optimizer = self.accelerator.prepare(distiller, optimizer)
        self.accelerator.register_for_checkpointing(self.state)
        self.inner: Distiller = self.accelerator.unwrap_model(self.distiller)
        self.about = json.loads(json.dumps({"method": method, "config": asdict(config), **about}))
        self.seconds, self.done_here = 0.0, 0
        self.stop = threading.Event()
        self.time_is_up = self.interrupted = False
        self.last_flips: float | None = None

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def go(self, progress: Progress | None) -> TrainReport:
        self._open()
        self.begun = time.monotonic()
        with _signals(self.stop):
            while not self._at_end():
                self._update(progress)
                if self._check_spike():
                    continue
                self._check_clock()
                last = self._at_end()
                self._after_update(last)
                if self.interrupted and not last:
                    self._save()
                    self._draw()
                    return self._report(False, None, None)
        result = self._evaluate()
        self._write_log({"step": self.state.step, **{f"held_out_{k}": v for k, v in result.to_dict().items()}})
        folder = self.out / "student"
        if self.is_main:
            save_student(self.inner.student, folder, self.tokenizer)
        self._draw()
        self.accelerator.wait_for_everyone()
        return self._report(True, result, folder)

    # one update

    def _update(self, progress: Progress | None) -> None:
        config, state, start = self.config, self.state, time.monotonic()
        self.rate = config.schedule().rate(state.step, state.total or max(state.step + 1, config.warmup + 1))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * group["lr_scale"]
        rows = self.batches[state.position]
        mine = rows.reshape(self.accumulate, self.accelerator.num_processes, -1)[:, self.accelerator.process_index]
        sums = torch.zeros(4, device=self.accelerator.device)
        for index, part in enumerate(mine):
            ids, scored = (t.to(self.accelerator.device, non_blocking=True) for t in self.corpus.rows(TRAIN, part))
            last = index == len(mine) - 1
            with self.accelerator.autocast(), _no_sync(self.accelerator, self.distiller, not last):
                terms = self.distiller(ids, scored)
                self.accelerator.backward(terms.loss / len(mine))
            sums += torch.stack([t.detach().float() for t in terms]) / len(mine)
        if self.done_here == 0:
            self._check_gradients()
        self.norm = self.accelerator.clip_grad_norm_(self.distiller.parameters(), config.clip)
        self.logged = (state.step + 1) % config.log_every == 0
        signs = latent_signs(self.inner.student) if self.logged else []
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.flips = flip_ratio(signs, latent_signs(self.inner.student)) if self.logged else None
        if self.flips is not None:
            self.last_flips = self.flips.item()
        self.sums = self.accelerator.reduce(sums, "mean")
        self.loss = self.sums[0].item()
        state.step += 1
        state.position += 1
        state.tokens += len(rows) * self.corpus.row_length
        self.done_here += 1
        self.seconds = time.monotonic() - start
        if progress is not None:
            flips = "" if self.last_flips is None else f", flips {self.last_flips:.1e}"
            progress(state.step, state.total or 0, f"loss {self.loss:.3f}{flips}, {self._speed():,.0f} tokens/s")

    def _check_gradients(self) -> None:
        """Refuse to train where a compiler lost gradients, which shows as latent weights that have none at all."""
        for name, layer in student_layers(self.inner.student):
            gradient = layer.weight.grad
            if gradient is None or not gradient.count_nonzero():
                how = "; the layers are compiled: try compile=False" if self.config.compile else ""
                raise RuntimeError(f"train: no gradient reaches {name}.weight{how}")

    def _after_update(self, last: bool) -> None:
        config, state = self.config, self.state
        if state.total is None:
            self._estimate_total()
        if self.logged:
            loss, cross_entropy, entropy, hidden = self.sums.tolist()
            assert self.flips is not None
            self._write_log(
                {
                    "step": state.step,
                    "position": state.position,
                    "loss": loss,
                    "cross_entropy": cross_entropy,
                    "kl": cross_entropy - entropy,
                    "hidden": hidden,
                    "lr": self.rate,
                    "grad_norm": float(self.norm),
                    "flip_ratio": self.flips.item(),
                    "tokens": state.tokens,
                }
            )
        if config.eval_every and state.step % config.eval_every == 0 and not last:
            result = self._evaluate()
            self._write_log({"step": state.step, **{f"held_out_{k}": v for k, v in result.to_dict().items()}})
        if config.snapshot_every and state.step % config.snapshot_every == 0 and self.is_main:
            save_student(self.inner.student, self.out / "snapshots" / f"step-{state.step:08d}", self.tokenizer)
        if state.step % config.save_every == 0 or last:
            self._save()

    def _estimate_total(self) -> None:
        """Fix the number of updates once their speed is known; until then the rate only warms up."""
        if self.done_here == 1:
            self.timed = time.monotonic()  # the first one compiles
        if self.done_here < 1 + TIMED_UPDATES or self.config.minutes is None:
            return
        each = (time.monotonic() - self.timed) / (self.done_here - 1)
        left = 60 * self.config.minutes - (time.monotonic() - self.begun)
        self.state.total = self.state.step + max(1, int(self._shared(left / each)))

    def _shared(self, value: float) -> float:
        """Return the mean over all processes, which must come to the same decisions."""
        here = torch.tensor([value], dtype=torch.float64 if self.accelerator.device.type == "cpu" else torch.float32)
        return float(self.accelerator.reduce(here.to(self.accelerator.device), "mean").item())

    def _check_clock(self) -> None:
        minutes = self.config.minutes
        self.time_is_up = self._shared(minutes is not None and time.monotonic() - self.begun > 60 * minutes) > 0
        self.interrupted = self._shared(self.stop.is_set()) > 0 or (self.time_is_up and self.config.steps is not None)

    def _at_end(self) -> bool:
        state = self.state
        # without a number of steps the time decides, and what fits into it was only estimated
        timed_out = self.time_is_up and self.config.steps is None and not self.interrupted
        return timed_out or (state.total is not None and state.step >= state.total)

    # spikes

    def _check_spike(self) -> bool:
        state, losses = self.state, self.state.losses
        usual = sorted(losses)[len(losses) // 2] if len(losses) >= SPIKE_AFTER else math.inf
        if math.isfinite(self.loss) and self.loss < self.config.spike_factor * usual:
            losses.append(self.loss)
            return False
        spike, loss, end = state.step, self.loss, state.position
        skipped = list(state.skipped)
        if len(skipped) >= MAX_ROLLBACKS:
            raise DivergedError(
                f"train: the loss spiked to {loss:.3g} at update {spike} after {len(skipped)} rollbacks; lower lr "
                f"({self.config.lr:g}), or raise spike_factor ({self.config.spike_factor:g})"
            )
        self._load(self._latest())
        state.skipped = [*skipped, [state.position, end]]
        state.position = end
        self._trim_log(state.step)
        self._write_log({"step": state.step, "spike": spike, "spike_loss": loss, "skipped": state.skipped[-1]})
        self._save(again=True)  # or an interruption now would forget what to skip
        return True

    # checkpoints

    def _open(self) -> None:
        file = self.out / RUN
        if file.exists():
            stored = read_json(file)
            if stored != self.about:
                old, new = ({**s, **s.get("config", {})} for s in (stored, self.about))
                names = sorted(n for n in {*old, *new} - {"config"} if old.get(n) != new.get(n))
                raise ValueError(
                    f"{self.out}: holds a run with other settings ({', '.join(names)}); pass another folder"
                )
        elif self.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(file, self.about)
        self.accelerator.wait_for_everyone()
        latest = self._latest()
        if latest is None:
            self._save()
        else:
            self._load(latest)
            self._trim_log(self.state.step)

    def _latest(self) -> Path | None:
        found = sorted((self.out / "checkpoints").glob("step-*"))
        return found[-1] if found else None

    def _save(self, again: bool = False) -> None:
        folder = self.out / "checkpoints" / f"step-{self.state.step:08d}"
        if folder.exists() and not again:
            return
        partial = folder.with_name(f".partial-{folder.name}")
        if self.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.is_main:
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(partial, folder)
            for old in sorted(folder.parent.glob("step-*"))[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _load(self, folder: Path | None) -> None:
        assert folder is not None
        self.accelerator.load_state(str(folder))

    # what is written for people

    def _evaluate(self) -> Fidelity:
        ids, scored = (t[: self.config.eval_rows] for t in self.corpus.rows(HELD_OUT))
        model = self.inner.student.eval()
        with self.accelerator.autocast():
            result = fidelity(model, self.inner.teacher, ids, scored, batch=self.config.micro_rows, dtype=self.dtype)
        model.train()
        return result

    def _write_log(self, values: dict[str, Any]) -> None:
        if self.is_main:
            with (self.out / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")

    def _trim_log(self, step: int) -> None:
        """Drop what the log says about updates that are undone, but for the spikes that undid them."""
        file = self.out / LOG
        if not self.is_main or not file.exists():
            return
        lines = read_log(self.out)
        partial = file.with_name(f".{LOG}.partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step))
        os.replace(partial, file)

    def _draw(self) -> None:
        if not self.is_main or not (self.out / LOG).exists():
            return
        try:
            from bitinfer.distill.curves import draw_curves
        except ImportError:
            return
        draw_curves(read_log(self.out), self.out / "curves.png")

    def _speed(self) -> float:
        return self.config.rows * self.corpus.row_length / max(self.seconds, 1e-9)

    def _report(self, finished: bool, result: Fidelity | None, folder: Path | None) -> TrainReport:
        speed = self.done_here * self.config.rows * self.corpus.row_length / max(time.monotonic() - self.begun, 1e-9)
        state = self.state
        return TrainReport(finished, state.step, state.total, result, state.skipped, speed, folder)


def read_log(out: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log."""
    return [json.loads(line) for line in (Path(out) / LOG).read_text(encoding="utf-8").splitlines()]


def _optimizer(student: Any, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    latents = [layer.weight for _, layer in student_layers(student)]
    known = {id(p) for p in latents}
    others: list[Tensor] = [p for p in student.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        {"params": latents, "weight_decay": config.weight_decay, "lr_scale": 1.0},
        {"params": others, "weight_decay": 0.0, "lr_scale": config.scale_lr},
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=ADAM_EPS, fused=device.type == "cuda"
    )


@contextmanager
def _no_sync(accelerator: Any, model: Any, wanted: bool) -> Iterator[None]:
    if wanted:
        with accelerator.no_sync(model):
            yield
    else:
        yield


@contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """Set ``stop`` on SIGTERM and SIGINT instead of dying at once; a second one takes its usual course."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
