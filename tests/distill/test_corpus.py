"""Corpora: what a teacher writes, shards and manifest, text files, and reduced vocabularies."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from grammar import NOUNS, sentences
from transformers import AutoTokenizer

from bitinfer import FormatError
from bitinfer.distill import (
    Corpus,
    Prompts,
    Writing,
    corpus_from_text,
    generate_corpus,
    load_teacher,
    reduce_tokenizer,
    reduce_vocabulary,
    restrict_vocabulary,
)
from bitinfer.distill.decoder import LlamaDecoder
from bitinfer.distill.generation import QUEUE, Writer, draw_prompts, stop_tokens
from bitinfer.distill.models import run_trunk


def test_the_decoder_is_transformers_own(teacher, corpus):
    ids = corpus.rows("held_out", range(5))[0].repeat(1, 2)  # 96 tokens: more than one bucket of the cache
    with torch.no_grad():
        wanted = teacher(ids).logits
    decoder = LlamaDecoder(teacher, 5, 96)
    decoder.keys.fill_(7.0)  # what lies ahead in the cache must not matter
    position = torch.zeros(1, dtype=torch.int64)
    for at in range(96):
        logits = decoder.step(ids[:, at], position, (at // 64 + 1) * 64)
        torch.testing.assert_close(logits, wanted[:, at], rtol=1e-4, atol=1e-4)
        position += 1


def test_written_rows_follow_prompts_greedy_first(teacher, tokenizer):
    how = Writing(row_length=60, shard_rows=6, greedy_tokens=2, max_document=9, seed=1)
    queues = draw_prompts(Prompts(plain=["The {} is", "The"], topics=list(NOUNS)), tokenizer, 6, (1, 0), 30)
    assert all(len(queue) == QUEUE for queue in queues)
    stops = stop_tokens(teacher, tokenizer)
    tokens, scored = Writer(LlamaDecoder(teacher, 6, 60), stops, how).write(queues, seed=5)
    with torch.no_grad():
        likeliest = teacher(torch.from_numpy(tokens)).logits.argmax(-1).numpy()
    documents = 0
    for row in range(6):
        at = 0
        for prompt in queues[row]:
            cut = prompt[: 60 - at]
            assert tokens[row, at : at + len(cut)].tolist() == cut and not scored[row, at : at + len(cut)].any()
            at += len(cut)
            written = 0
            while at < 60:
                assert scored[row, at]
                if written < 2:
                    assert tokens[row, at] == likeliest[row, at - 1]
                at, written = at + 1, written + 1
                if tokens[row, at - 1] in stops or written == 9:
                    documents += 1
                    break
            if at >= 60:
                break
    assert documents >= 6


def test_sampling_follows_the_teachers_distribution(teacher, tokenizer):
    rows = 4000
    how = Writing(row_length=6, shard_rows=rows, greedy_tokens=0, temperature=(2.0, 2.0), max_document=6, seed=0)
    prompt = tokenizer("The lamp")["input_ids"][:2]
    tokens, _ = Writer(LlamaDecoder(teacher, rows, 6), [], how).write([[prompt]] * rows, seed=1)
    with torch.no_grad():
        p = (teacher(torch.tensor([prompt])).logits[0, -1] / 2.0).softmax(-1).numpy()
    drawn = np.bincount(tokens[:, 2], minlength=len(p)) / rows
    assert abs(drawn - p).sum() / 2 < 0.08  # total variation; 4000 draws over some 300 tokens
    assert p.max() < 0.9


def test_a_corpus_says_what_it_is(corpus):
    manifest = json.loads((corpus.path / "manifest.json").read_text())
    assert [s["split"] for s in manifest["shards"]] == ["held_out"] + ["train"] * 4
    assert manifest["about"]["writing"]["row_length"] == 48 and manifest["about"]["prompts"]["topics"] == list(NOUNS)
    ids, scored = corpus.rows("train")
    assert ids.shape == scored.shape == (256, 48) and ids.dtype == torch.int64 and scored.dtype == torch.bool
    assert corpus.count("train") == 256 and corpus.count("held_out") == 64
    held_out = {tuple(row) for row in corpus.rows("held_out")[0].tolist()}
    assert not held_out & {tuple(row) for row in ids.tolist()}
    assert corpus.token_counts().sum() == 5 * 64 * 48
    assert torch.equal(corpus.rows("train", [7, 3])[0], ids[[7, 3]])
    from safetensors.numpy import load_file

    assert load_file(corpus.path / "shard-00000.safetensors")["tokens"].dtype == np.uint16


def test_an_interrupted_corpus_goes_on_to_the_same(teacher_folder, prompts, writing, corpus, tmp_path):
    model, tokenizer = load_teacher(teacher_folder)

    class Stopped(Exception):
        pass

    def progress(done, total, what):
        if done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        generate_corpus(model, tokenizer, tmp_path, prompts=prompts, how=writing, shards=5, progress=progress)
    assert len(Corpus(tmp_path).shards) == 2
    again = generate_corpus(model, tokenizer, tmp_path, prompts=prompts, how=writing, shards=5)
    for split in ("train", "held_out"):
        for got, wanted in zip(again.rows(split), corpus.rows(split), strict=True):
            assert torch.equal(got, wanted)
    with pytest.raises(FormatError, match=r"other settings is there \(writing\)"):
        generate_corpus(model, tokenizer, tmp_path, prompts=prompts, how=replace(writing, seed=9), shards=5)
    (tmp_path / "shard-00003.safetensors").unlink()
    with pytest.raises(FormatError, match=r"shard-00003\.safetensors: this shard is missing"):
        Corpus(tmp_path).rows("train")


def test_time_ends_a_corpus_but_not_before_it_is_of_use(teacher_folder, prompts, writing, tmp_path):
    model, tokenizer = load_teacher(teacher_folder)
    made = generate_corpus(model, tokenizer, tmp_path, prompts=prompts, how=writing, shards=50, minutes=0)
    assert [s["split"] for s in made.shards] == ["held_out", "train"]


def test_wide_vocabularies_take_wider_numbers(tmp_path):
    from safetensors.numpy import load_file

    wide = Corpus.create(tmp_path / "w", vocab_size=70000, row_length=4, about={})
    wide.add("a", np.array([[69999, 1, 2, 3]]), np.ones((1, 4), bool), "train")
    assert wide.rows("train")[0][0, 0] == 69999
    assert load_file(tmp_path / "w" / "a.safetensors")["tokens"].dtype == np.uint32
    with pytest.raises(ValueError, match="below 70000"):
        wide.add("b", np.array([[70000, 1, 2, 3]]), np.ones((1, 4), bool), "train")
    with pytest.raises(ValueError, match=r"\[rows, 4\]"):
        wide.add("b", np.zeros((1, 5)), np.ones((1, 5), bool), "train")


def test_text_files_with_a_part_held_out(tokenizer, tmp_path):
    texts = [sentences(300, seed) for seed in (1, 2)]
    files = [tmp_path / f"{i}.txt" for i in range(2)]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    made = corpus_from_text(files, tokenizer, tmp_path / "c", row_length=32, held_out=0.1)
    for index, text in enumerate(texts):
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        train, held_out = (made._read(s)[0].ravel().tolist() for s in made.shards if s["name"].endswith(f"0000{index}"))
        held_out, train = sorted((train, held_out), key=len)
        assert train + held_out == ids[: len(ids) // 32 * 32] and len(held_out) >= 0.08 * len(ids)
    assert made.rows("train")[1].all()
    files[0].write_text("short")
    with pytest.raises(ValueError, match="fewer than two rows"):
        corpus_from_text(files[:1], tokenizer, tmp_path / "d", row_length=32)


def test_a_reduced_tokenizer_writes_every_text(tokenizer):
    text = sentences(400, 0)
    counts = np.bincount(tokenizer(text)["input_ids"], minlength=len(tokenizer))
    kept, reduced = reduce_tokenizer(tokenizer, counts, 272)
    assert len(kept) == len(reduced) == 272 and kept == sorted(kept)
    for sample in (text, "Grüße, Ωmega! <s> x </s>\n\t", sentences(5, 7)):
        ids = reduced(sample)["input_ids"]
        assert reduced.decode(ids) == tokenizer.decode(tokenizer(sample)["input_ids"])
        # every token is the old one of that name
        assert tokenizer.convert_ids_to_tokens([kept[i] for i in ids]) == reduced.convert_ids_to_tokens(ids)
    assert reduced.eos_token_id == kept.index(tokenizer.eos_token_id)
    top = [i for i in np.argsort(-counts)[:8] if counts[i]]
    assert set(top) <= set(kept)
    for size, match in ((10, "below the"), (0, "from 1"), (298, "from 1")):
        with pytest.raises(ValueError, match=match):
            reduce_tokenizer(tokenizer, counts, size)


def test_a_restricted_teacher_is_the_teacher_renormalised(teacher_folder):
    model, _ = load_teacher(teacher_folder)
    restricted, _ = load_teacher(teacher_folder)
    kept = [0, 1, *range(40, 290, 3)]
    restrict_vocabulary(restricted, kept)
    ids = torch.randint(len(kept), (3, 20))
    with torch.no_grad():
        p = model(torch.tensor(kept)[ids]).logits.softmax(-1)[..., kept]
        got = restricted(ids).logits.softmax(-1)
        torch.testing.assert_close(got, p / p.sum(-1, keepdim=True))
        torch.testing.assert_close(restricted.lm_head(run_trunk(restricted, ids)[-1]), restricted(ids).logits)
    assert restricted.config.vocab_size == len(kept) and restricted.config.eos_token_id == 1
    for bad in ([3, 2], [0, 400], []):
        with pytest.raises(ValueError, match="ascending"):
            restrict_vocabulary(model, bad)


def test_the_vocabulary_is_chosen_once(teacher_folder, prompts, writing, tmp_path):
    model, tokenizer = load_teacher(teacher_folder)
    small = replace(writing, shard_rows=16)
    model, reduced = reduce_vocabulary(model, tokenizer, tmp_path, 280, prompts=prompts, how=small)
    made = generate_corpus(model, reduced, tmp_path, prompts=prompts, how=small, shards=2)
    assert made.vocab_size == model.config.vocab_size == len(reduced) == 280 and len(made.kept) == 280
    text = AutoTokenizer.from_pretrained(tmp_path).decode(made.rows("train", [0])[0][0])
    assert "The" in text
    again, tokenizer = load_teacher(teacher_folder)
    again, same = reduce_vocabulary(again, tokenizer, tmp_path, 280, prompts=prompts, how=small)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight) and same.get_vocab() == reduced.get_vocab()
    with pytest.raises(FormatError, match="280 tokens is there, not of 270"):
        reduce_vocabulary(load_teacher(teacher_folder)[0], tokenizer, tmp_path, 270)


def test_the_embedded_models_prompts():
    prompts = Prompts.read(Path(__file__).parents[2] / "examples" / "embedded_model" / "prompts.json")
    rng = np.random.default_rng(0)
    drawn = [prompts.draw(rng, ["garden", "river"], place == 0) for _ in range(300) for place in range(2)]
    assert len(set(drawn)) > 450 and not any("{}" in text for text in drawn)
    chat = [text.lstrip() for text in drawn if "<|im_start|>" in text]
    assert 0.5 < len(chat) / len(drawn) < 0.7
    assert all(t.startswith("<|im_start|>user\n") and t.endswith("<|im_start|>assistant\n") for t in chat)


def test_prompts(tokenizer, tmp_path):
    rng = np.random.default_rng(0)
    file = tmp_path / "p.json"
    file.write_text(
        json.dumps({"chat": ["Say {} and {}."], "topics": ["a", "b"], "turn": "<u>{}</u>", "between": "\n"})
    )
    drawn = {Prompts.read(file).draw(rng, [], first) for first in (True, False) for _ in range(50)}
    assert "<u>Say a and b.</u>" in drawn and "\n<u>Say b and a.</u>" in drawn and len(drawn) == 8
    words = Prompts(plain=["{} is"], topics=["x"], word_share=0.5)
    drawn = [words.draw(rng, ["lamp"], True) for _ in range(200)]
    assert set(drawn) == {"X is", "Lamp is"} and 60 < drawn.count("Lamp is") < 140
    assert Prompts().draw(rng, ["word"], True) == "word"
    file.write_text('{"colour": 1}')
    with pytest.raises(ValueError, match="unknown keys"):
        Prompts.read(file)
    with pytest.raises(ValueError, match="need topics"):
        Prompts(plain=["{}"])
