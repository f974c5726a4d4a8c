"""What a training run is told, where it stands, and how it ended."""

from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bitinfer.distill.objectives import CHUNK, Fidelity
from bitinfer.distill.schedule import Schedule

SPIKE_HISTORY = 64  # updates whose losses tell what is usual


@dataclass(frozen=True)
class TrainConfig:
    """How a student is trained. Lengths are in updates of the weights unless said otherwise.

    Attributes:
        steps: updates in all; None takes as many as fit into ``minutes``.
        minutes: wall clock of one call, after which the run ends as if it had come to its last update, if ``steps`` is
            None, or is checkpointed and interrupted.
        rows: rows of the corpus to an update, over all processes.
        micro_rows: rows that a process computes at once; gradients are accumulated over the others.
        lr, warmup, floor, span: see :class:`Schedule`.
        scale_lr: learning rate of all that is no latent weight, as a multiple.
        weight_decay: of latent weights alone.
        betas: of AdamW.
        clip: largest norm of the gradient.
        label_mix, hidden_weight: see :class:`Distiller`; ``hidden_weight`` None is the method's own.
        precision: "bf16" or "no" (float32).
        compile: compile layers and loss; meant for GPUs.
        chunk: tokens whose logits are held at a time.
        save_every, log_every, eval_every: updates between checkpoints, log lines and evaluations (0: at the end).
        eval_rows: held-out rows that an evaluation reads.
        snapshot_every: updates between students in the published layout, for averaging (0: none but the last).
        spike_factor: a loss this many times the usual one is a spike.
        seed: of the order of the data.
    """

    steps: int | None = 1000
    minutes: float | None = None
    rows: int = 64
    micro_rows: int = 64
    lr: float = 1e-3
    warmup: int = 50
    floor: float = 0.1
    span: tuple[float, float] = (0.0, 1.0)
    scale_lr: float = 1.0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    label_mix: float = 0.0
    hidden_weight: float | None = None
    precision: str = "no"
    compile: bool = False
    chunk: int = CHUNK
    save_every: int = 200
    log_every: int = 10
    eval_every: int = 200
    eval_rows: int = 64
    snapshot_every: int = 0
    spike_factor: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("TrainConfig: give steps, minutes or both")
        for name in ("rows", "micro_rows", "save_every", "log_every", "eval_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig: {name} must be at least 1, got {getattr(self, name)}")
        if self.precision not in ("bf16", "no"):
            raise ValueError(f"TrainConfig: precision must be bf16 or no, got {self.precision!r}")
        if not self.spike_factor > 1:
            raise ValueError(f"TrainConfig: spike_factor must be above 1, got {self.spike_factor}")
        self.schedule()

    def schedule(self) -> Schedule:
        return Schedule(self.lr, self.warmup, self.floor, (self.span[0], self.span[1]))


@dataclass
class TrainState:
    """Where a run stands; saved with each checkpoint.

    Attributes:
        step: updates done.
        position: batches read, those that were skipped among them.
        total: updates in all, once that is known.
        tokens: tokens read by the updates that stand.
        losses: the last losses.
        skipped: ranges of positions that were skipped after a spike.
    """

    step: int = 0
    position: int = 0
    total: int | None = None
    tokens: int = 0
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=SPIKE_HISTORY))
    skipped: list[list[int]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return {**asdict(self), "losses": list(self.losses)}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, deque(value, maxlen=SPIKE_HISTORY) if name == "losses" else value)


@dataclass(frozen=True)
class TrainReport:
    """How a run ended.

    Attributes:
        finished: whether it came to its last update; if not, the same call goes on with it.
        step, total: updates done, and in all.
        fidelity: on held-out rows, if it finished.
        skipped: ranges of batches that were skipped after a loss spike.
        tokens_per_second: of this call, evaluations and checkpoints included.
        student: the folder with the student in its published layout, if it finished.
    """

    finished: bool
    step: int
    total: int | None
    fidelity: Fidelity | None
    skipped: list[list[int]]
    tokens_per_second: float
    student: Path | None
