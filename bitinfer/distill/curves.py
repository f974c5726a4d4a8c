"""Curves of a training run as a picture."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

PANELS = (
    ("cross-entropy and KL, nats per token", ("cross_entropy", "kl", "held_out_kl"), False),
    ("flip-flop ratio", ("flip_ratio",), True),
    ("gradient norm", ("grad_norm",), True),
    ("learning rate", ("lr",), False),
)


def draw_curves(lines: list[dict[str, Any]], file: str | Path) -> None:
    """Draw loss, flip-flop ratio, gradient norm and learning rate over the updates; spikes are vertical lines.

    Args:
        lines: the log of a run, see :func:`bitinfer.distill.trainer.read_log`.
        file: the PNG to write.
    """
    figure = Figure(figsize=(11, 7), layout="constrained")
    spikes = [line["step"] for line in lines if "spike" in line]
    for axes, (title, names, logarithmic) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            if logarithmic:
                points = [(x, y) for x, y in points if y > 0]
            if points:
                axes.plot(
                    *zip(*points, strict=True), label=name.replace("_", " "), marker="." if len(points) < 30 else ""
                )
        for step in spikes:
            axes.axvline(step, color="tab:red", linewidth=0.8, alpha=0.6)
        if logarithmic and axes.lines:
            axes.set_yscale("log")
        if len(names) > 1:
            axes.legend()
        axes.set(title=title, xlabel="updates")
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
