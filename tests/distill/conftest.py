"""A tiny teacher that has learnt something, and a corpus that it wrote, shared by the tests of distillation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grammar import NOUNS, sentences
from tiny_models import save_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bitinfer.distill import Corpus, Prompts, Writing, generate_corpus, load_teacher


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    vocabulary = save_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(sentences(4000, 0))["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        starts = torch.randint(len(ids) - 48, (16,))
        rows = torch.stack([ids[s : s + 48] for s in starts])
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def teacher(teacher_folder: Path) -> Any:
    return load_teacher(teacher_folder)[0]


@pytest.fixture(scope="session")
def tokenizer(teacher_folder: Path) -> Any:
    return load_teacher(teacher_folder)[1]


@pytest.fixture(scope="session")
def prompts() -> Prompts:
    return Prompts(plain=["The {}", "The"], topics=list(NOUNS))


@pytest.fixture(scope="session")
def writing() -> Writing:
    return Writing(row_length=48, shard_rows=64, greedy_tokens=1, max_document=40, seed=3)


@pytest.fixture(scope="session")
def corpus(
    teacher_folder: Path, prompts: Prompts, writing: Writing, tmp_path_factory: pytest.TempPathFactory
) -> Corpus:
    model, tokenizer = load_teacher(teacher_folder)
    return generate_corpus(
        model, tokenizer, tmp_path_factory.mktemp("corpus") / "c", prompts=prompts, how=writing, shards=5
    )


@pytest.fixture(autouse=True)
def single_thread() -> Any:
    """Sums must come in one order for runs to be equal bit for bit, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def student_of() -> Callable[..., Any]:
    from bitinfer.distill import build_student

    return lambda teacher, method="fbi", **options: build_student(
        teacher, method, **{"latent_std": 0.02 if method == "fbi" else None, **options}
    )
