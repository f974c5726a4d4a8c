"""Both methods learn from a tiny teacher, by far better than taking signs alone."""

import copy
import math

import pytest
import torch

import bitinfer
from bitinfer.distill import TrainConfig, fidelity, pack_students, train
from bitinfer.distill.models import run_trunk

# nats per token that a student may be worse than its teacher on held-out text
DISTANCE = 0.1


@pytest.mark.parametrize("method", ["fbi", "onebit"])
def test_students_come_close_to_their_teacher(method, teacher, corpus, student_of, tmp_path):
    ids, scored = corpus.rows("held_out")
    signs_only = copy.deepcopy(teacher)
    bitinfer.replace_linear(signs_only)
    naive = fidelity(signs_only, teacher, ids, scored)
    student = student_of(teacher, method)
    before = fidelity(student, teacher, ids, scored)
    config = TrainConfig(
        steps=240, rows=16, micro_rows=16, lr=4e-3, warmup=10, eval_every=0, log_every=20, eval_rows=64
    )
    report = train(student, teacher, corpus, tmp_path / "run", config, method=method)
    after = report.fidelity
    assert report.finished and after is not None
    assert after.student_nll < after.teacher_nll + DISTANCE, (before, after)
    assert naive.student_nll > after.teacher_nll + 5 * DISTANCE, naive
    assert after.kl < 0.1 * min(before.kl, naive.kl)
    assert after.teacher_nll < math.log(corpus.vocab_size) - 2  # the teacher knows something to learn


@pytest.mark.parametrize("method", ["fbi", "onebit"])
def test_packed_students_compute_what_they_did(method, teacher, corpus, student_of):
    student = student_of(teacher, method).eval()
    for name, parameter in student.named_parameters():  # scales of both signs, shifts that are not zero
        if name.endswith(("wscale", "input_factor", "weight_scale")):
            parameter.data *= torch.where(torch.rand_like(parameter) < 0.3, -1.0, 1.0)
    ids = corpus.rows("held_out", range(4))[0]
    with torch.no_grad():
        wanted = student.lm_head(run_trunk(student, ids)[-1])
        double = copy.deepcopy(student).double()
        truth = double.lm_head(run_trunk(double, ids)[-1])
        names = pack_students(student)
        got = student(ids).logits
    assert len(names) == 14 and sum(isinstance(m, bitinfer.BinaryLinear) for m in student.modules()) == 14
    error, own = (got.double() - truth).square().mean().sqrt(), (wanted.double() - truth).square().mean().sqrt()
    assert error <= 2 * own + 1e-6 * truth.square().mean().sqrt(), (error, own)
