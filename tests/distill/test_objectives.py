"""Objectives: chunked losses against plain ones, the label mix, hidden states, and what fidelity measures."""

import math

import pytest
import torch
import torch.nn.functional as F

from bitinfer.distill import Distiller, distillation_loss, fidelity, hidden_state_loss
from bitinfer.distill.models import layer_map, run_trunk


def problem(tokens=53, width=16, vocabulary=37):
    torch.manual_seed(0)
    hidden, head = torch.randn(tokens, width), torch.randn(vocabulary, width)
    teacher, teacher_head = torch.randn(tokens, 24), torch.randn(vocabulary, 24) * 0.3
    labels, weight = torch.randint(vocabulary, (tokens,)), torch.rand(tokens)
    weight[::5] = 0
    return hidden.requires_grad_(), head.requires_grad_(), teacher, teacher_head, labels, weight / weight.sum()


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [1, 7, 53, 1000])
def test_chunked_loss_is_the_plain_one(mix, chunk):
    hidden, head, teacher, teacher_head, labels, weight = problem()
    logits = hidden @ head.t()
    soft = F.cross_entropy(logits, (teacher @ teacher_head.t()).softmax(-1), reduction="none")
    hard = F.cross_entropy(logits, labels, reduction="none")
    wanted = (((1 - mix) * soft + mix * hard) * weight).sum()
    grads = torch.autograd.grad(3 * wanted, (hidden, head))
    loss, entropy = distillation_loss(hidden, head, teacher, teacher_head, labels, weight, label_mix=mix, chunk=chunk)
    torch.testing.assert_close(loss, wanted)
    for got, want in zip(torch.autograd.grad(3 * loss, (hidden, head)), grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    p = (teacher @ teacher_head.t()).softmax(-1)
    torch.testing.assert_close(entropy, -((p * p.log()).sum(-1) * weight).sum())


def test_no_chunk_is_wider_than_asked():
    sizes = []

    def spy(student, teacher, labels, weight, mix):
        from bitinfer.distill.objectives import _chunk_terms

        sizes.append(student.shape)
        return _chunk_terms(student, teacher, labels, weight, mix)

    distillation_loss(*problem(), chunk=20, terms=spy)
    assert sizes == [(20, 37), (20, 37), (13, 37)]


def test_bfloat16_products_stay_close():
    hidden, head, *rest = problem()
    wanted, _ = distillation_loss(hidden, head, *rest)
    got, _ = distillation_loss(hidden, head, *rest, dtype=torch.bfloat16)
    assert got.dtype == torch.float32 and abs(got - wanted) < 0.02 * wanted


def test_bad_arguments_are_named():
    hidden, head, teacher, teacher_head, labels, weight = problem()
    with pytest.raises(ValueError, match="37 tokens and teacher_head 30"):
        distillation_loss(hidden, head, teacher, teacher_head[:30], labels, weight)
    with pytest.raises(ValueError, match="label_mix"):
        distillation_loss(hidden, head, teacher, teacher_head, labels, weight, label_mix=1.5)
    with pytest.raises(ValueError, match="width"):
        hidden_state_loss([hidden], [teacher], weight)


def test_hidden_states_count_by_direction():
    weight = torch.tensor([0.25, 0.75])
    a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[5.0, 0.0], [3.0, 0.0]])
    assert hidden_state_loss([a], [b], weight).item() == pytest.approx(0.75 * 2)
    assert hidden_state_loss([a, a], [3 * a, b], weight).item() == pytest.approx(1.5)


def test_fewer_layers_take_evenly_spaced_ones():
    assert layer_map(30, 30) == list(range(30))
    assert layer_map(2, 30) == [0, 29] and layer_map(1, 4) == [3]
    chosen = layer_map(20, 30)
    assert chosen[0] == 0 and chosen[-1] == 29 and sorted(set(chosen)) == chosen


def test_the_trunk_is_transformers_own(teacher, corpus):
    ids = corpus.rows("held_out", range(3))[0]
    with torch.no_grad():
        states = run_trunk(teacher, ids, all_states=True)
        wanted = teacher(ids, output_hidden_states=True)
        torch.testing.assert_close(teacher.lm_head(states[-1]), wanted.logits)
    for got, want in zip(states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(got, want)


def test_a_batch_is_averaged_over_the_scored_tokens(teacher, corpus, student_of):
    ids, scored = corpus.rows("train", range(6))
    student = student_of(teacher, "onebit")
    terms = Distiller(student, teacher, hidden_weight=2.0)(ids, scored)
    with torch.no_grad():
        logits, wanted = (m.lm_head(run_trunk(m, ids)[-1][:, :-1]) for m in (student, teacher))
    per_token = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1).softmax(-1), reduction="none")
    marks = scored[:, 1:].flatten()
    assert 0 < marks.sum() < marks.numel()
    torch.testing.assert_close(terms.cross_entropy, per_token[marks].mean())
    torch.testing.assert_close(terms.loss.detach(), terms.cross_entropy + 2 * terms.hidden)
    assert terms.hidden > 0 and all(p.grad is None for p in teacher.parameters())


def test_fidelity(teacher, corpus, student_of):
    ids, scored = corpus.rows("held_out", range(10))
    same = fidelity(teacher, teacher, ids, scored, batch=3)
    assert same.kl == 0 and same.agreement == 1 and same.ratio == 1 and same.tokens == scored[:, 1:].sum()
    student = student_of(teacher)
    other = fidelity(student, teacher, ids, scored, batch=4)
    with torch.no_grad():
        nll = F.cross_entropy(student(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    assert other.student_nll == pytest.approx(nll[scored[:, 1:].flatten()].mean().item(), rel=1e-5)
    assert other.kl > 0 and other.teacher_nll == pytest.approx(same.teacher_nll, rel=1e-5)
    assert other.student_perplexity == pytest.approx(math.exp(other.student_nll))
