"""The commands, end to end: a corpus, a student, its average, packed and asked to write."""

import json

import pytest
from grammar import NOUNS, sentences
from typer.testing import CliRunner

from bitinfer.cli import app


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())  # which wraps after long paths


def test_from_a_teacher_to_text(teacher_folder, tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"plain": ["The {}"], "topics": NOUNS}))
    corpus, out = tmp_path / "corpus", tmp_path / "run"
    written = run(
        *("corpus", corpus, "--teacher", teacher_folder, "--prompts", prompts, "--vocabulary", 280),
        *("--shards", 3, "--shard-rows", 24, "--length", 32, "--device", "cpu"),
    )
    assert "48 rows to train on, 24 held out, 32 tokens each" in written
    command = (
        *("distill", "--teacher", teacher_folder, "--corpus", corpus, "--out", out, "--rows", 8, "--lr", 0.004),
        *("--latent-std", 0.02, "--snapshot-every", 6, "--warmup", 3, "--device", "cpu"),
    )
    stopped = run(*command, "--steps", 18, "--minutes", 1e-6, code=130)
    assert "goes on from there" in stopped
    for _ in range(16):
        run(*command, "--steps", 18, "--minutes", 1e-6, code=130)
    report = json.loads(run(*command, "--steps", 18, "--minutes", 1e-6, "--json"))
    assert report["finished"] and report["step"] == 18 and report["fidelity"]["kl"] > 0
    snapshots = sorted((out / "snapshots").iterdir())
    assert len(snapshots) == 3
    averaged = run("average", *snapshots, "--out", tmp_path / "mean", "--method", "lawa", "--last", 2)
    assert "averaged 3 checkpoints, 14 binary layers" in averaged
    run("convert", tmp_path / "mean", tmp_path / "packed")
    assert run("generate", tmp_path / "packed", "The lamp", "--max-new-tokens", 5).strip()


def test_onebit_of_another_shape_from_text(teacher_folder, tmp_path):
    text, shape = tmp_path / "a.txt", tmp_path / "shape.json"
    text.write_text(sentences(400, 3))
    shape.write_text(json.dumps({"num_hidden_layers": 1, "vocab_size": 99, "model_type": "llama"}))
    run("corpus", tmp_path / "c", "--teacher", teacher_folder, "--text", text, "--length", 32)
    shown = run(
        *("distill", "--teacher", teacher_folder, "--student", shape, "--corpus", tmp_path / "c", "--device", "cpu"),
        *("--out", tmp_path / "r", "--method", "onebit", "--start", "svd", "--steps", 4, "--rows", 4),
    )
    assert "4 updates" in shown and "next: bitinfer convert" in shown
    assert (tmp_path / "r" / "student" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("distill", "--teacher", "T", "--corpus", "C", "--out", "o"), "--steps, --minutes"),
        (("corpus", "o", "--teacher", "/nothing"), "does not exist"),
        (("average", "a", "--out", "o"), "at least two"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code in (1, 2) and message in result.output and "Traceback" not in result.output
