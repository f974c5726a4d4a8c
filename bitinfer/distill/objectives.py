"""What a student learns from: the teacher's next-token distribution, its hidden states, and the text itself.

Logits are computed in chunks of tokens and turned into gradients on the spot, so that no more than a chunk times the
vocabulary is ever held, whatever the batch.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitinfer.distill.models import layer_map, run_trunk

CHUNK = 8192  # tokens whose logits are held at a time


def _chunk_terms(
    student: Tensor, teacher: Tensor, labels: Tensor, weight: Tensor, label_mix: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted loss and teacher entropy of a chunk, and the gradient of the loss by the student's logits.

    For target ``p = (1 - mix) * softmax(teacher) + mix * onehot(label)`` the loss of a token is ``-sum_v p log q`` and
    its gradient ``q - p``.
    """
    log_q = F.log_softmax(student.float(), -1)
    log_p = F.log_softmax(teacher.float(), -1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    if label_mix:
        p = torch.lerp(p, F.one_hot(labels, p.shape[-1]).to(p.dtype), label_mix)
    loss = -(p * log_q).sum(-1)
    gradient = (log_q.exp() - p) * weight.unsqueeze(-1)
    return (loss * weight).sum(), (entropy * weight).sum(), gradient.to(student.dtype)


class _ChunkedLoss(torch.autograd.Function):
    """Cross-entropy of a student's head against a teacher's; gradients are made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        labels: Tensor,
        weight: Tensor,
        label_mix: float,
        chunk: int,
        dtype: torch.dtype,
        terms: Callable[..., tuple[Tensor, Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            narrow, narrow_teacher = head.to(dtype), teacher_head.to(dtype)
            loss = torch.zeros((), device=hidden.device)
            entropy = torch.zeros((), device=hidden.device)
            grad_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
            grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                x = hidden[rows].to(dtype)
                wanted = teacher_hidden[rows].to(dtype) @ narrow_teacher.t()
                part, own, gradient = terms(x @ narrow.t(), wanted, labels[rows], weight[rows], label_mix)
                loss += part
                entropy += own
                grad_hidden[rows] = gradient @ narrow
                grad_head += gradient.t() @ x
        ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_head.to(head.dtype))
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return (grad_hidden * grads[0].to(grad_hidden.dtype), grad_head * grads[0], *[None] * 8)


def distillation_loss(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    label_mix: float = 0.0,
    chunk: int = CHUNK,
    dtype: torch.dtype | None = None,
    terms: Callable[..., tuple[Tensor, Tensor, Tensor]] = _chunk_terms,
) -> tuple[Tensor, Tensor]:
    """Return ``sum_m weight[m] * CE(p[m], softmax(hidden[m] head^T))`` and the teacher's own entropy, weighted alike.

    With ``label_mix`` 0 this is FBI-LLM's autoregressive distillation (arXiv 2407.07093, section 3.2), which has no
    label term: ``p = softmax(teacher_hidden teacher_head^T)``. Gradients reach ``hidden`` and ``head``, to first order
    only. Sums are float32.

    Args:
        hidden, teacher_hidden: ``[M, D]`` and ``[M, D']``, behind the last norm.
        head, teacher_head: ``[V, D]`` and ``[V, D']``, over the same vocabulary.
        labels: int64 ``[M]``, the tokens that follow; read where ``label_mix`` is not 0.
        weight: float32 ``[M]``, usually 1 over the number of tokens that count, and 0 for the others.
        label_mix: share of the label in the target, 0 to 1.
        chunk: tokens whose logits are held at a time.
        dtype: of the logits' matrix products; None for autocast's dtype where it is on, else that of ``hidden``.
        terms: the arithmetic on a chunk; a compiled version may be passed.

    Raises:
        ValueError: the vocabularies differ in size, or ``label_mix`` is out of range.
    """
    if head.shape[0] != teacher_head.shape[0]:
        raise ValueError(
            f"distillation_loss: head has {head.shape[0]} tokens and teacher_head {teacher_head.shape[0]}; "
            "restrict the teacher to the student's vocabulary first"
        )
    if not 0 <= label_mix <= 1:
        raise ValueError(f"distillation_loss: label_mix must be from 0 to 1, got {label_mix}")
    if dtype is None:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    loss, entropy = _ChunkedLoss.apply(
        hidden, head, teacher_hidden, teacher_head, labels, weight, label_mix, chunk, dtype, terms
    )
    return loss, entropy


def hidden_state_loss(student: list[Tensor], teacher: list[Tensor], weight: Tensor) -> Tensor:
    """Return OneBit's distance of hidden states: ``sum over layers, tokens of weight * || s/|s| - t/|t| ||^2``.

    Args:
        student: what enters each layer, ``[M, D]`` each.
        teacher: the matching states, of the same shapes.
        weight: float32 ``[M]``.

    Raises:
        ValueError: the widths differ.
    """
    if student[0].shape != teacher[0].shape:
        raise ValueError(
            f"hidden_state_loss: the student's states are {tuple(student[0].shape)} and the teacher's "
            f"{tuple(teacher[0].shape)}; give the student the teacher's width, or hidden_weight=0"
        )
    total = torch.zeros((), device=weight.device)
    for s, t in zip(student, teacher, strict=True):
        difference = F.normalize(s.float(), dim=-1) - F.normalize(t.float(), dim=-1)
        total = total + (difference.square().sum(-1) * weight).sum()
    return total


class Terms(NamedTuple):
    """The loss of a batch (with gradient), and what it is made of: cross-entropy, teacher entropy, hidden distance."""

    loss: Tensor
    cross_entropy: Tensor
    entropy: Tensor
    hidden: Tensor


class Distiller(nn.Module):
    """A student with its teacher at its side; its forward pass is the loss of a batch.

    FBI: the cross-entropy alone. OneBit: ``cross-entropy + hidden_weight * distance of hidden states`` (arXiv
    2402.11295, eq. 9 to 11). Its scripts sum the logits' term over the tokens of a row and multiply it by 0.01, which
    for rows of T tokens is ``hidden_weight = 100 / T``: the default here.

    Args:
        student: a model with student layers, the only one whose parameters are this module's.
        teacher: frozen; on the same device and over the same vocabulary.
        hidden_weight: 0 for none; None for the method's own.
        label_mix: share of the label in the target.
        chunk: see :func:`distillation_loss`.
        dtype: of the residual stream and the products; None for float32 throughout.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        *,
        hidden_weight: float = 0.0,
        label_mix: float = 0.0,
        chunk: int = CHUNK,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self._teacher = [teacher]  # in a list, it is no part of this module: not trained, not saved
        self.hidden_weight, self.label_mix, self.chunk, self.dtype = hidden_weight, label_mix, chunk, dtype
        self.terms: Callable[..., tuple[Tensor, Tensor, Tensor]] = _chunk_terms
        self.layers = layer_map(student.config.num_hidden_layers, teacher.config.num_hidden_layers)

    @property
    def teacher(self) -> Any:
        return self._teacher[0]

    def compile_layers(self) -> None:
        """Compile the layers of both models, one by one, and the loss: minutes less than the models as a whole."""
        for layer in [*self.student.model.layers, *self.teacher.model.layers]:
            layer.compile(dynamic=False)
        self.terms = torch.compile(_chunk_terms, dynamic=False)

    def forward(self, ids: Tensor, scored: Tensor) -> Terms:
        """Return the loss of rows ``ids [B, T]``, averaged over the tokens that ``scored [B, T]`` marks as targets."""
        with torch.no_grad():
            *teacher_states, teacher_hidden = run_trunk(self.teacher, ids, all_states=bool(self.hidden_weight))
        *states, hidden = run_trunk(self.student, ids, self.dtype, all_states=bool(self.hidden_weight))
        weight = scored[:, 1:].float()
        weight = (weight / weight.sum().clamp_min(1)).flatten()
        labels = ids[:, 1:].flatten()
        cross_entropy, entropy = distillation_loss(
            _rows(hidden),
            self.student.lm_head.weight,
            _rows(teacher_hidden),
            self.teacher.lm_head.weight,
            labels,
            weight,
            label_mix=self.label_mix,
            chunk=self.chunk,
            dtype=self.dtype,
            terms=self.terms,
        )
        distance = torch.zeros((), device=ids.device)
        if self.hidden_weight:
            chosen = [_rows(teacher_states[i]) for i in self.layers]
            distance = hidden_state_loss([_rows(s) for s in states], chosen, weight)
        loss = cross_entropy + self.hidden_weight * distance
        return Terms(loss, cross_entropy.detach(), entropy, distance.detach())


def default_hidden_weight(method: str, row_length: int) -> float:
    """Return the weight of the hidden states' distance that a method uses: none for FBI-LLM, ``100 / T`` for OneBit."""
    return 100.0 / row_length if method == "onebit" else 0.0


def _rows(states: Tensor) -> Tensor:
    """Return the states that predict something, ``[B * (T - 1), D]``."""
    return states[:, :-1].flatten(0, 1)


class Fidelity(NamedTuple):
    """How well a student stands in for its teacher on held-out rows; nats are per token.

    Attributes:
        tokens: targets that were scored.
        student_nll, teacher_nll: mean negative log likelihood of the text.
        kl: mean KL divergence of the student's distribution from the teacher's.
        agreement: share of tokens where both have the same likeliest one.
    """

    tokens: int
    student_nll: float
    teacher_nll: float
    kl: float
    agreement: float

    @property
    def student_perplexity(self) -> float:
        return math.exp(self.student_nll)

    @property
    def teacher_perplexity(self) -> float:
        return math.exp(self.teacher_nll)

    @property
    def ratio(self) -> float:
        """The student's perplexity over the teacher's."""
        return math.exp(self.student_nll - self.teacher_nll)

    def to_dict(self) -> dict[str, float]:
        """Return a JSON-ready dictionary, perplexities and their ratio included."""
        named = {name: getattr(self, name) for name in ("student_perplexity", "teacher_perplexity", "ratio")}
        return {**self._asdict(), **named}


@torch.no_grad()
def fidelity(
    student: Any, teacher: Any, ids: Tensor, scored: Tensor, *, batch: int = 8, dtype: torch.dtype | None = None
) -> Fidelity:
    """Compare a student with its teacher on rows ``ids [R, T]``, over the targets that ``scored [R, T]`` marks.

    Args:
        student: a model with student layers, dense or packed.
        teacher: over the same vocabulary.
        batch: rows at a time.
        dtype: of the student's residual stream, as in training; sums are float64.
    """
    device = next(student.parameters()).device
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for start in range(0, len(ids), batch):
        part = ids[start : start + batch].to(device)
        marks = scored[start : start + batch, 1:].to(device).flatten()
        labels = part[:, 1:].flatten()
        states = [run_trunk(student, part, dtype)[-1], run_trunk(teacher, part)[-1]]
        for first in range(0, len(labels), CHUNK):
            rows = slice(first, first + CHUNK)
            log_q, log_p = (
                F.log_softmax(model.lm_head(_rows(s)[rows].to(model.lm_head.weight.dtype)).float(), -1)
                for model, s in zip((student, teacher), states, strict=True)
            )
            target, mark = labels[rows].unsqueeze(1), marks[rows].double()
            per_token = (
                torch.ones_like(mark),
                -log_q.gather(1, target)[:, 0],
                -log_p.gather(1, target)[:, 0],
                (log_p.exp() * (log_p - log_q)).sum(-1),
                log_p.argmax(-1) == log_q.argmax(-1),
            )
            sums += torch.stack([(value.double() * mark).sum() for value in per_token])
    count, *totals = sums.tolist()
    if not count:
        raise ValueError("fidelity: scored marks no target")
    return Fidelity(int(count), *(total / count for total in totals))
