"""The training loop: exact resumption, spikes, signals, schedule, and what it leaves behind."""

import json
import math
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from bitinfer.distill import DivergedError, TrainConfig, train
from bitinfer.distill.corpus import Batches
from bitinfer.distill.schedule import Schedule
from bitinfer.distill.trainer import _Run, read_log

CONFIG = TrainConfig(
    steps=24, rows=8, micro_rows=4, lr=4e-3, warmup=4, save_every=5, log_every=4, eval_every=8, eval_rows=8
)


class Stopped(Exception):
    """What a killed process looks like from inside."""


def stop_at(step):
    def progress(done, total, what):
        if done == step:
            raise Stopped

    return progress


@pytest.mark.parametrize("method", ["fbi", "onebit"])
def test_resumed_training_is_uninterrupted_training(method, teacher, corpus, student_of, tmp_path):
    whole = student_of(teacher, method)
    train(whole, teacher, corpus, tmp_path / "whole", CONFIG, method=method)
    for stop in (2, 13, 22):  # before the first checkpoint, between two, behind the last
        with pytest.raises(Stopped):
            train(
                student_of(teacher, method),
                teacher,
                corpus,
                tmp_path / "cut",
                CONFIG,
                method=method,
                progress=stop_at(stop),
            )
    resumed = student_of(teacher, method)
    report = train(resumed, teacher, corpus, tmp_path / "cut", CONFIG, method=method)
    assert report.finished and report.step == 24
    for (name, wanted), got in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(wanted, got), name
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "cut")
    assert (tmp_path / "cut" / "curves.png").stat().st_size > 10_000


def test_the_log_tells_the_flip_ratio_and_the_gradient_norm(teacher, corpus, student_of, tmp_path):
    train(student_of(teacher), teacher, corpus, tmp_path, CONFIG, method="fbi")
    lines = [line for line in read_log(tmp_path) if "loss" in line]
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20, 24]
    assert all(0 < line["flip_ratio"] < 0.2 and line["grad_norm"] > 0 for line in lines)
    assert all(line["kl"] >= 0 and line["tokens"] == line["step"] * 8 * 48 for line in lines)
    held_out = [line["held_out_kl"] for line in read_log(tmp_path) if "held_out_kl" in line]
    assert len(held_out) == 3 and held_out[-1] < held_out[0]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def spoil(monkeypatch, at, value):
    """Make the loss at some updates ``value``, counted over all that are done, rolled back or not."""
    done = [0]
    original = _Run._update

    def update(self, progress):
        original(self, progress)
        done[0] += 1
        if done[0] in at:
            self.loss = value
            with torch.no_grad():  # as if the update had done harm
                for parameter in self.inner.student.parameters():
                    parameter.fill_(math.nan)

    monkeypatch.setattr(_Run, "_update", update)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e4])
def test_a_spike_is_rolled_back_and_its_block_skipped(value, teacher, corpus, student_of, tmp_path, monkeypatch):
    spoil(monkeypatch, {19}, value)
    student = student_of(teacher)
    report = train(student, teacher, corpus, tmp_path, CONFIG, method="fbi")
    # update 19 is undone to the checkpoint at 15; the batches 15 to 18 are never read again
    assert report.finished and report.skipped == [[15, 19]]
    assert all(torch.isfinite(p).all() for p in student.parameters())
    lines = read_log(tmp_path)
    assert [(line["spike"], line["skipped"]) for line in lines if "spike" in line] == [(19, [15, 19])]
    assert [line["position"] for line in lines if "loss" in line] == [4, 8, 12, 20, 24, 28]


def test_what_was_skipped_stays_skipped_after_an_interruption(teacher, corpus, student_of, tmp_path, monkeypatch):
    spoil(monkeypatch, {19}, math.nan)
    uninterrupted = student_of(teacher)
    train(uninterrupted, teacher, corpus, tmp_path / "a", CONFIG, method="fbi")
    monkeypatch.undo()
    spoil(monkeypatch, {19}, math.nan)
    with pytest.raises(Stopped):  # update 16 comes a second time right after the spike
        seen = []

        def progress(done, total, what):
            seen.append(done)
            if seen.count(16) == 2:
                raise Stopped

        train(student_of(teacher), teacher, corpus, tmp_path / "b", CONFIG, method="fbi", progress=progress)
    resumed = student_of(teacher)
    report = train(resumed, teacher, corpus, tmp_path / "b", CONFIG, method="fbi")
    assert report.skipped == [[15, 19]]
    for wanted, got in zip(uninterrupted.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(wanted, got)


def test_endless_spikes_are_an_error(teacher, corpus, student_of, tmp_path, monkeypatch):
    spoil(monkeypatch, set(range(3, 1000)), math.nan)
    with pytest.raises(DivergedError, match="after 20 rollbacks; lower lr"):
        train(student_of(teacher), teacher, corpus, tmp_path, CONFIG, method="fbi")


def test_a_lost_gradient_is_an_error(teacher, corpus, student_of, tmp_path):
    student = student_of(teacher)
    student.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"no gradient reaches model\.layers\.1\.mlp\.up_proj\.weight"):
        train(student, teacher, corpus, tmp_path, CONFIG, method="fbi")


def test_accumulated_gradients_are_those_of_the_whole_batch(teacher, corpus, student_of, tmp_path):
    # one update; rows have about as many scored tokens each, so the mean of means is nearly the mean
    students = []
    for name, micro in (("one", 8), ("many", 2)):
        student = student_of(teacher)
        config = replace(CONFIG, steps=1, micro_rows=micro)
        train(student, teacher, corpus, tmp_path / name, config, method="fbi")
        students.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    start = torch.cat([p.detach().flatten() for p in student_of(teacher).parameters()])
    moves = [s - start for s in students]
    assert torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.9 and moves[0].abs().max() > 0


def test_a_run_does_not_go_on_with_other_settings(teacher, corpus, student_of, tmp_path):
    train(student_of(teacher), teacher, corpus, tmp_path, replace(CONFIG, steps=2), method="fbi")
    with pytest.raises(ValueError, match=r"other settings \(lr, steps\)"):
        train(student_of(teacher), teacher, corpus, tmp_path, replace(CONFIG, lr=1e-4), method="fbi")
    with pytest.raises(ValueError, match="multiple of micro_rows=3"):
        train(student_of(teacher), teacher, corpus, tmp_path / "b", replace(CONFIG, micro_rows=3), method="fbi")
    with pytest.raises(ValueError, match="fewer than one batch"):
        train(
            student_of(teacher),
            teacher,
            corpus,
            tmp_path / "c",
            replace(CONFIG, rows=1000, micro_rows=1000),
            method="fbi",
        )


def test_time_decides_how_many_updates_there_are(teacher, corpus, student_of, tmp_path):
    config = replace(CONFIG, steps=None, minutes=3 / 60, warmup=5, save_every=1000, eval_every=0)
    begun = time.monotonic()
    report = train(student_of(teacher), teacher, corpus, tmp_path, config, method="fbi")
    assert report.finished and report.total is not None and 22 <= report.step <= report.total
    assert time.monotonic() - begun < 15
    rates = [line["lr"] for line in read_log(tmp_path) if "lr" in line]
    assert rates[-1] < 0.5 * max(rates)


def test_minutes_with_steps_interrupt_and_the_same_call_goes_on(teacher, corpus, student_of, tmp_path):
    config = replace(CONFIG, steps=8, minutes=1e-6)
    calls, report = 0, None
    while report is None or not report.finished:
        report = train(student_of(teacher), teacher, corpus, tmp_path / "cut", config, method="fbi")
        calls += 1
        assert calls <= 8
    assert calls == 8 and report.step == 8


SCRIPT = """
import sys, torch
from pathlib import Path
from bitinfer.distill import Corpus, TrainConfig, build_student, load_teacher, train
torch.set_num_threads(1)
teacher, _ = load_teacher(sys.argv[1])
student = build_student(teacher, "fbi", latent_std=0.02)
config = TrainConfig(steps=100000, rows=8, micro_rows=8, warmup=4, save_every=10, eval_every=0)
def show(done, total, what):
    print(done, flush=True)
report = train(student, teacher, Corpus(sys.argv[2]), sys.argv[3], config, method="fbi", progress=show)
print("stopped", report.finished, report.step, flush=True)
"""


def run_until(arguments, wanted):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    assert process.stdout is not None
    for line in process.stdout:
        if line.split()[0].isdigit() and int(line) >= wanted:
            break
    return process, watchdog


def test_sigterm_saves_and_sigkill_loses_at_most_an_interval(teacher_folder, corpus, tmp_path):
    arguments = (teacher_folder, corpus.path, tmp_path)
    process, watchdog = run_until(arguments, 13)
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read().split("\n")
    assert process.wait(60) == 0
    watchdog.cancel()
    stopped = next(line.split() for line in rest if line.startswith("stopped"))
    assert stopped[1] == "False" and int(stopped[2]) >= 13
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    assert newest.name == f"step-{int(stopped[2]):08d}"  # nothing is lost
    process, watchdog = run_until(arguments, int(stopped[2]) + 25)
    process.kill()
    seen = int(stopped[2]) + 25
    process.wait(60)
    watchdog.cancel()
    complete = [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith("step-")]
    assert seen - int(max(complete).split("-")[1]) < 10
    process, watchdog = run_until(arguments, int(max(complete).split("-")[1]) + 1)  # and it goes on from there
    process.kill()
    process.wait(60)
    watchdog.cancel()


def test_batches_depend_on_seed_and_position_alone():
    a, b = Batches(50, 8, seed=1), Batches(50, 8, seed=1)
    forward = [a[i].tolist() for i in range(20)]
    assert [b[i].tolist() for i in reversed(range(20))] == forward[::-1]
    for epoch in range(3):
        rows = [row for batch in forward[6 * epoch : 6 * epoch + 6] for row in batch]
        assert len(set(rows)) == 48
    assert forward[0] != forward[6] and Batches(50, 8, seed=2)[0].tolist() != forward[0]


def test_schedule():
    whole = Schedule(1.0, 10, 0.1)
    assert whole.rate(0, 100) == pytest.approx(0.1) and whole.rate(10, 100) == pytest.approx(1.0)
    assert whole.rate(99, 100) == pytest.approx(0.1, abs=1e-3) and whole.rate(55, 100) == pytest.approx(0.55)
    first, second = Schedule(1.0, 0, 0.1, (0, 0.5)), Schedule(1.0, 0, 0.1, (0.5, 1))
    joined = [first.rate(i, 50) for i in range(50)] + [second.rate(i, 50) for i in range(50)]
    assert joined == pytest.approx([Schedule(1.0, 0, 0.1).rate(i, 100) for i in range(100)])
    for bad in ({"peak": 0.0}, {"warmup": -1}, {"floor": 2.0}, {"span": (0.5, 0.5)}):
        with pytest.raises(ValueError, match="Schedule"):
            Schedule(**{"peak": 1.0, "warmup": 1, **bad})


def test_settings_that_make_no_sense_are_named():
    for bad, word in (
        ({"steps": None}, "steps, minutes"),
        ({"rows": 0}, "rows"),
        ({"precision": "fp8"}, "precision"),
        ({"spike_factor": 1.0}, "spike_factor"),
    ):
        with pytest.raises(ValueError, match=word):
            TrainConfig(**bad)


def test_the_run_folder_says_what_it_is(teacher, corpus, student_of, tmp_path):
    config = replace(CONFIG, steps=4, snapshot_every=2)
    report = train(student_of(teacher), teacher, corpus, tmp_path, config, method="fbi", about={"note": 1})
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["method"] == "fbi" and about["note"] == 1 and about["config"]["steps"] == 4
    assert sorted(p.name for p in (tmp_path / "snapshots").iterdir()) == ["step-00000002", "step-00000004"]
    assert report.student == tmp_path / "student" and (report.student / "pytorch_model.bin").exists()
