"""Make binary language models: student layers, what they learn from, corpora, training and averaging."""

from bitinfer.distill.average import AverageReport, average_checkpoints
from bitinfer.distill.config import TrainConfig, TrainReport
from bitinfer.distill.corpus import Corpus, corpus_from_text
from bitinfer.distill.generation import Writing, generate_corpus, reduce_vocabulary
from bitinfer.distill.models import (
    build_student,
    load_student,
    load_teacher,
    packed_bytes,
    restrict_vocabulary,
    save_student,
)
from bitinfer.distill.objectives import Distiller, Fidelity, distillation_loss, fidelity, hidden_state_loss
from bitinfer.distill.prompts import Prompts
from bitinfer.distill.snapshot import load_snapshot, save_snapshot
from bitinfer.distill.students import FBILinear, OneBitLinear, make_student, pack_students
from bitinfer.distill.trainer import DivergedError, train
from bitinfer.distill.vocabulary import reduce_tokenizer

__all__ = [
    "AverageReport",
    "Corpus",
    "Distiller",
    "DivergedError",
    "FBILinear",
    "Fidelity",
    "OneBitLinear",
    "Prompts",
    "TrainConfig",
    "TrainReport",
    "Writing",
    "average_checkpoints",
    "build_student",
    "corpus_from_text",
    "distillation_loss",
    "fidelity",
    "generate_corpus",
    "hidden_state_loss",
    "load_snapshot",
    "load_student",
    "load_teacher",
    "make_student",
    "pack_students",
    "packed_bytes",
    "reduce_tokenizer",
    "reduce_vocabulary",
    "restrict_vocabulary",
    "save_snapshot",
    "save_student",
    "train",
]
