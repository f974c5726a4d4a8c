"""The command line: what it prints, its exit codes, and errors in one line that say what to do."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
import torch
from typer.testing import CliRunner

import bitinfer
from bitinfer import cli
from bitinfer.dispatch import BACKENDS
from bitinfer.formats import FORMATS
from bitinfer.formats.latent import METHODS

COMMANDS = ["convert", "info", "verify", "generate", "chat", "eval", "doctor", "bench kernels", "bench model"]
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Sources and packed folders, by name, and a text file."""
    root = tmp_path_factory.mktemp("cli")
    made = {"dense": tiny_models.dense(root / "dense", chat=True), "fbi": tiny_models.fbi(root / "fbi")}
    made["packed"] = bitinfer.convert(made["fbi"], root / "packed").path
    made["mute"] = bitinfer.convert(tiny_models.fbi(root / "mute-source", tokenizer=False), root / "mute").path
    made["text"] = root / "text.txt"
    made["text"].write_text(tiny_models.TEXT, encoding="utf-8")
    return made


def run(*arguments, code: int = 0):
    """Run a command in this process; check its exit code and that nothing but plain text was printed."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    assert not CONTROL.search(result.stdout), result.stdout
    return result


def fails(*arguments, says: str, code: int = 1) -> str:
    """Run a command that fails with one line on stderr and nothing on stdout."""
    result = run(*arguments, code=code)
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and re.search(says, line), line
    assert not result.stdout and "Traceback" not in result.output
    return line


def process(*arguments, **environment) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "bitinfer.cli", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


# help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples(command):
    text = run(*command.split(), "--help").stdout
    assert "Examples" in text and f"$ bitinfer {command}" in text


def test_the_list_of_commands_and_the_version():
    text = run("--help").stdout
    assert all(command.split()[0] in text for command in COMMANDS)
    assert run("--version").stdout == f"bitinfer {bitinfer.__version__}\n"


def test_choices_are_those_of_the_library():
    assert {f.value for f in cli.SourceFormat} == {"auto", *FORMATS} - {"packed"}
    assert {m.value for m in cli.Method} == set(METHODS)


# commands


def test_convert_info_verify(folders, tmp_path):
    target = tmp_path / "packed"
    text = run("convert", folders["fbi"], target).stdout
    assert "layers packed" in text and "bits per weight" in text
    assert text.rstrip().endswith(f"next: bitinfer verify {folders['fbi']} {target}")
    text = run("info", target).stdout
    assert "packed by bitinfer" in text and "model.layers.*.self_attn.q_proj" in text and "average width" in text
    assert json.loads(run("info", target, "--json").stdout)["storage"]["extra_values"] == 1920
    assert "PASS" in run("verify", folders["fbi"], target, "--tokens", 40).stdout
    result = json.loads(run("verify", folders["fbi"], target, "--tokens", 40, "--dtype", "bfloat16", "--json").stdout)
    assert result["passed"] is True and result["dtype"] == "bfloat16"


def test_convert_options_reach_the_library(folders, tmp_path):
    options = ["--format", "latent", "--method", "svd", "--dtype", "float16", "--act-bits", 4, "--act-block", 256]
    run("convert", folders["dense"], tmp_path / "p", *options, "--skip", "lm_head", "--skip", "*.down_proj")
    stored = json.loads((tmp_path / "p" / "config.json").read_text())["quantization_config"]
    assert (stored["format"], stored["act_bits"], stored["act_block"]) == ("latent", 4, 256)
    assert {"lm_head", "model.layers.0.mlp.down_proj"} <= set(stored["modules_to_not_convert"])
    fails("convert", folders["dense"], tmp_path / "p", "--format", "latent", says="exists")
    run("convert", folders["dense"], tmp_path / "p", "--format", "latent", "--group-size", 32, "--overwrite")
    stored = json.loads((tmp_path / "p" / "config.json").read_text())["quantization_config"]
    assert stored["layout"]["group_size"] == 32 and stored["act_bits"] is None


def test_info_of_a_source_says_what_to_do(folders):
    text = run("info", folders["fbi"]).stdout
    assert "not packed yet" in text and f"next: bitinfer convert {folders['fbi']}" in text.replace("\n", "")
    assert "--format latent" in run("info", folders["dense"]).stdout


def test_verify_fails_with_exit_code_1(folders, tmp_path):
    other = shutil.copytree(folders["fbi"], tmp_path / "other")
    state = torch.load(other / "pytorch_model.bin")
    state["model.layers.0.mlp.up_proj.wscale"] *= -1
    torch.save(state, other / "pytorch_model.bin")
    result = run("verify", other, folders["packed"], "--prompt", "The lamp is lit", code=1)
    assert "FAIL" in result.stdout and "does not compute what" in result.stderr
    result = run("verify", other, folders["packed"], "--prompt", "The lamp is lit", "--json", code=1)
    assert json.loads(result.stdout)["passed"] is False


def test_verify_texts(folders):
    text = run("verify", folders["fbi"], folders["packed"], "--text", folders["text"], "--tokens", 33).stdout
    assert re.search(r"positions compared\W+33\b", text)
    both = ["--text", folders["text"], "--prompt", "x"]
    assert "not both" in run("verify", folders["fbi"], folders["packed"], *both, code=2).stderr


def test_generate(folders):
    result = run("generate", folders["packed"], "The lamp", "--max-new-tokens", 8)
    model, tokenizer = bitinfer.load(folders["packed"])
    ids = tokenizer("The lamp", return_tensors="pt")["input_ids"]
    new = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert result.stdout.rstrip("\n") == tokenizer.decode(new, skip_special_tokens=True).rstrip("\n")
    assert re.fullmatch(
        r"prompt \d+ tokens at [\d.]+ tokens/s, first token after [\d.]+ s, \d+ new tokens( at [\d.]+ tokens/s)?\n",
        result.stderr,
    )


def test_generate_options(folders):
    ids = ["generate", folders["packed"], "--token-ids", "5,6,7", "--max-new-tokens", 12]
    greedy = run(*ids).stdout
    assert len(greedy.split()) == 12 and all(token.isdecimal() for token in greedy.split())
    sampled = [*ids, "--temperature", 2, "--seed", 4]
    assert run(*sampled).stdout == run(*sampled).stdout != greedy
    assert run(*sampled, "--top-k", 1).stdout == run(*sampled, "--top-p", 1e-6).stdout == greedy
    assert run(*ids, "--act-bits", 1).stdout != greedy
    assert run(*ids, "--act-bits", "none", "--dtype", "float32", "--threads", 1).stdout == greedy


def test_generate_without_a_tokenizer(folders):
    fails("generate", folders["mute"], "Hello", says=r'no tokenizer.*--token-ids "1,2,3"')
    assert run("generate", folders["mute"], "--token-ids", "1, 2", "--max-new-tokens", 3).stdout.strip()


def test_eval(folders):
    text = run("eval", folders["packed"], "--text", folders["text"], "--window", 64).stdout
    assert "perplexity" in text and "bits per byte" in text
    options = ["--window", 64, "--max-windows", 1, "--batch", 2, "--dtype", "bfloat16", "--act-bits", 8, "--json"]
    result = json.loads(run("eval", folders["packed"], "--text", folders["text"], *options).stdout)
    assert result["windows"] == 1 and result["perplexity"] > 1


def test_doctor():
    found = json.loads(run("doctor", "--json").stdout)
    assert found["healthy"] and found["versions"]["torch"]
    text = run("doctor").stdout
    assert found["install"] in text and "reference" in text


def test_doctor_fails_on_what_is_broken(monkeypatch):
    monkeypatch.setenv("BITINFER_BACKEND", "nonsense")
    text = run("doctor", code=1).stdout
    assert "problem:" in text and "next: unset BITINFER_BACKEND" in text


def test_bench_kernels(tmp_path, monkeypatch):
    from bitinfer.bench import cpu

    monkeypatch.setattr(cpu, "cache_bytes", lambda: 1 << 16)
    file = tmp_path / "results.json"
    text = run("bench", "kernels", "--shapes", "40x64", "--m", "1,2", "--threads", 1, "--json", file).stdout
    assert "40 x 64" in text and "sign_gemm" in text and "GB/s" in text
    stored = json.loads(file.read_text())
    assert {row["m"] for row in stored["measurements"]} == {0, 1, 2} and stored["machine"]["threads"] == 1
    few = json.loads(run("bench", "kernels", "--shapes", "8x32", "--tokens", 1, "--ops", "int8", "--json", "-").stdout)
    assert {row["op"] for row in few["measurements"]} == {"F.linear", "popcount_gemm", "pack_activations"}


def test_bench_model(folders, tmp_path):
    file = tmp_path / "model.json"
    options = ["--batches", "1,2", "--prompts", "9", "--context", 12, "--new-tokens", 3, "--dtype", "float32"]
    options += ["--head-bits", 8]
    text = run("bench", "model", folders["packed"], *options, "--json", file).stdout
    assert "decoding" in text and "fused" in text and "x dense" in text
    rows = json.loads(file.read_text())["measurements"]
    loops = {(r["model"], r["loop"], r["activations"]) for r in rows}
    packed = ("fused", "fused, 8-bit head", "transformers")
    assert loops == {("packed", w, a) for w in packed for a in ("fp32", "int8")} | {("dense", "transformers", "fp32")}
    assert {(r["batch"], r["context"], r["decode_tokens_per_second"] is None) for r in rows} == {
        (1, 12, False),
        (2, 12, False),
        (1, 9, True),
    }
    assert all(r["prefill_tokens_per_second"] > 0 for r in rows)
    too_long = run("bench", "model", folders["packed"], "--prompts", 4000, "--no-dense", "--batches", 1, "--context", 5)
    assert "4000 tokens are longer than the model reads" in " ".join(too_long.stdout.split())
    assert "packed folder" in run("bench", "model", "14b", code=1).stderr


# errors


@pytest.mark.parametrize("command", [["info"], ["generate", "--prompt-is", "x"], ["eval"], ["convert"], ["verify"]])
def test_missing_arguments_are_usage_errors(command):
    result = run(*command, code=2)
    assert "Usage:" in result.stderr and not result.stdout


@pytest.mark.parametrize(
    "options",
    [
        ["--format", "gguf"],
        ["--method", "magic"],
        ["--dtype", "int8"],
        ["--act-bits", "3"],
        ["--act-block", "128"],
        ["--group-size", "many"],
    ],
)
def test_options_out_of_choice_are_usage_errors(folders, tmp_path, options):
    assert options[0] in run("convert", folders["fbi"], tmp_path / "p", *options, code=2).stderr
    assert not (tmp_path / "p").exists()


def test_usage_errors_of_other_commands(folders, tmp_path):
    run("generate", folders["packed"], code=2)
    run("generate", folders["packed"], "x", "--token-ids", "1", code=2)
    assert '"1,2,3"' in run("generate", folders["packed"], "--token-ids", "one", code=2).stderr
    run("generate", folders["packed"], "x", "--max-new-tokens", 0, code=2)
    run("eval", folders["packed"], "--text", tmp_path / "none.txt", code=2)
    run("bench", "kernels", "--m", "1,x", code=2)
    run("nonsense", code=2)


def test_folders_that_are_wrong(folders, tmp_path):
    none, empty = tmp_path / "none", tmp_path / "empty"
    empty.mkdir()
    fails("info", none, says="no such folder")
    fails("info", empty, says=r"config\.json: this file is missing")
    fails("convert", none, tmp_path / "p", says="no such folder")
    fails("convert", folders["dense"], tmp_path / "p", says="--format latent")
    fails("convert", folders["packed"], tmp_path / "p", says="packed already")
    fails("verify", folders["fbi"], none, says="bitinfer convert")
    fails("verify", none, folders["packed"], says="no such folder")
    fails("generate", none, "x", says="bitinfer convert")
    fails("generate", folders["fbi"], "x", says=f"bitinfer convert {folders['fbi']}")
    fails("eval", folders["dense"], "--text", folders["text"], says="bitinfer convert")


def test_files_that_are_wrong(folders, tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("déjà vu".encode("latin-1"))
    fails("eval", folders["packed"], "--text", latin, says=r"not UTF-8 text \(byte 1\)")
    fails("eval", folders["packed"], "--text", folders["text"], "--window", 4096, says="reads 128 tokens at most")
    fails("bench", "kernels", "--shapes", "13b", says="'13b' is neither")
    fails("bench", "kernels", "--device", "tpu", says="must be 'cpu' or 'cuda'")
    if BACKENDS["cuda"].unavailable():
        fails(
            "bench", "kernels", "--device", "cuda", says="device 'cuda' has no kernels here: .* see `bitinfer doctor`"
        )


def test_what_bitinfer_did_not_word_says_how_to_see_more(monkeypatch):
    monkeypatch.setattr("bitinfer.doctor.diagnose", lambda: {}["missing"])
    monkeypatch.delenv(cli.DEBUG, raising=False)
    assert "BITINFER_DEBUG=1" in fails("doctor", says="KeyError: 'missing'")
    monkeypatch.setenv(cli.DEBUG, "1")
    result = run("doctor", code=1)
    assert "Traceback" in result.stderr and "error: KeyError" in result.stderr


def test_ctrl_c_exits_130(monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("bitinfer.doctor.diagnose", interrupt)
    result = run("doctor", code=130)
    assert result.stderr == "interrupted\n" and not result.stdout


# in a process of its own


def test_process_pipes_hold_plain_text(folders):
    result = process("verify", folders["fbi"], folders["packed"], "--tokens", 20)
    assert result.returncode == 0 and "PASS" in result.stdout
    assert not CONTROL.search(result.stdout) and result.stderr == ""
    result = process("info", folders["packed"] / "none")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_process_debug_shows_the_traceback(folders):
    for arguments, environment in ((["--debug"], {}), ([], {"BITINFER_DEBUG": "1"})):
        result = process(*arguments, "info", folders["packed"] / "none", **environment)
        assert result.returncode == 1 and "Traceback" in result.stderr and "FormatError" in result.stderr


def test_process_forces_an_instruction_set():
    isas = [isa["name"] for isa in json.loads(process("doctor", "--json").stdout)["instruction_sets"]]
    result = process("bench", "kernels", "--isa", "sse9", "--shapes", "64x512", "--m", 1)
    assert result.returncode == 1 and "sse9" in result.stderr
    if "scalar" in isas:
        result = process("bench", "kernels", "--isa", "scalar", "--shapes", "64x512", "--m", 1, "--json", "-")
        assert json.loads(result.stdout)["machine"]["isa"] == "scalar"


def test_process_interrupted_in_the_middle():
    command = [sys.executable, "-m", "bitinfer.cli", "bench", "kernels", "--shapes", "4096x4096"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    leader, follower = pty.openpty()  # a terminal: the bar tells when the command is at work
    child = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=follower,
        # shells start what runs in their background with the signal ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(follower)
    seen = b""
    end = time.monotonic() + 240
    while b"measuring" not in seen and time.monotonic() < end:
        seen += os.read(leader, 4096)
    child.send_signal(signal.SIGINT)
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 130, seen
    assert b"interrupted" in seen and b"Traceback" not in seen and out == b""
    os.close(leader)
