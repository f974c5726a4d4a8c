"""convert: what it writes, what it reports, and that nothing is left where it fails."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import bitinfer
from bitinfer.checkpoint import Checkpoint
from bitinfer.convert import convert
from bitinfer.errors import FormatError
from bitinfer.formats import FORMATS
from bitinfer.shard_writer import ShardWriter
from bitinfer.testing.checkpoints import (
    SHAPES,
    write_binary_dense,
    write_dense,
    write_fbi_llm,
    write_onebit,
    write_tokenizer,
    write_weights,
)
from bitinfer.weight import WeightLayout


@pytest.fixture
def source(tmp_path):
    write_fbi_llm(tmp_path / "src", shards=3)
    return tmp_path / "src"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


# what is written


def test_config_and_files(source, tmp_path):
    report = convert(source, tmp_path / "new" / "dst", act_bits=8, act_block=256)
    dst = tmp_path / "new" / "dst"
    assert report.path == dst
    assert sorted(f.name for f in dst.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config, before = config_of(dst), config_of(source)
    quantization = config.pop("quantization_config")
    assert config.pop("dtype") == before.pop("torch_dtype") == "float32"
    assert config == before
    source_hashes = quantization.pop("source")
    assert source_hashes.keys() == {f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)}
    assert quantization == {
        "quant_method": "bitinfer",
        "layout_version": 1,
        "format": "fbi_llm",
        "layout": {"planes": 1, "group_size": 0, "tensors": ["in_scale", "in_shift"], "norm_eps": None},
        "layouts": {},
        "modules_to_not_convert": ["lm_head"],
        "act_bits": 8,
        "act_block": 256,
        "zeros": {},
    }
    with safe_open(dst / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_source_hashes_are_sha256(source, tmp_path):
    convert(source, tmp_path / "dst")
    hashes = config_of(tmp_path / "dst")["quantization_config"]["source"]
    for name, digest in hashes.items():
        output = subprocess.run(["sha256sum", source / name], capture_output=True, text=True, check=True).stdout
        assert output.split()[0] == digest


def test_folder_has_the_usual_permissions(source, tmp_path):
    convert(source, tmp_path / "dst")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "dst").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(("dtype", "name"), [("bf16", "bfloat16"), (torch.float16, "float16"), ("float32", "float32")])
def test_dtype_casts_scales_and_the_rest(source, tmp_path, dtype, name):
    report = convert(source, tmp_path / "dst", dtype=dtype)
    checkpoint = Checkpoint(tmp_path / "dst")
    assert {str(checkpoint.dtype(k)) for k in checkpoint} == {f"torch.{name}", "torch.uint32"}
    assert config_of(tmp_path / "dst")["dtype"] == name
    assert report.bytes_after == sum(checkpoint.nbytes(k) for k in checkpoint)
    before = Checkpoint(source)
    kept = "model.norm.weight"
    assert torch.equal(checkpoint.tensor(kept), before.tensor(kept).to(checkpoint.dtype(kept)))


def test_dtype_none_keeps_each_tensors_own(tmp_path):
    tensors = write_fbi_llm(tmp_path / "src")
    tensors = {n: t.bfloat16() if "norm" in n or "embed" in n else t for n, t in tensors.items()}
    write_weights(tmp_path / "src", tensors, kind="bin")
    convert(tmp_path / "src", tmp_path / "dst")
    checkpoint = Checkpoint(tmp_path / "dst")
    assert checkpoint.dtype("model.norm.weight") == torch.bfloat16
    assert checkpoint.dtype("lm_head.weight") == torch.float32
    assert config_of(tmp_path / "dst")["dtype"] == "float32"  # of most of the bytes


def test_large_outputs_are_sharded(source, tmp_path, monkeypatch):
    monkeypatch.setattr("bitinfer.shard_writer.ShardWriter.__init__.__defaults__", (1000, 100_000))
    convert(source, tmp_path / "dst")
    files = sorted((tmp_path / "dst").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    checkpoint = Checkpoint(tmp_path / "dst")
    packed = FORMATS["packed"]
    for name in packed.layer_names(checkpoint):
        assert packed.read(checkpoint, name).layout.tensors == ("in_scale", "in_shift")


def test_layouts_that_differ_are_listed(tmp_path):
    write_binary_dense(tmp_path / "src", group_size=128)  # rows of 176 have groups, rows of 64 none
    report = convert(tmp_path / "src", tmp_path / "dst")
    quantization = config_of(tmp_path / "dst")["quantization_config"]
    assert report.layout == WeightLayout()
    assert set(quantization["layouts"]) == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    assert all(layout["group_size"] == 128 for layout in quantization["layouts"].values())


def test_report(source, tmp_path):
    done = []
    report = convert(source, tmp_path / "dst", dtype="float16", progress=lambda *a: done.append(a))
    before, after = Checkpoint(source), Checkpoint(tmp_path / "dst")
    assert report.bytes_before == sum(before.nbytes(k) for k in before)
    assert report.bytes_after == sum(after.nbytes(k) for k in after)
    assert report.weights == sum(64 * 64 * 4 + 3 * 64 * 176 for _ in range(2))
    assert report.packed_bytes == sum(layer.bytes for layer in report.layers)
    assert report.bits_per_weight == pytest.approx(8 * report.packed_bytes / report.weights)
    assert report.notes == []
    assert str(report).startswith("fbi_llm: packed 14 layers at ")
    values = json.loads(json.dumps(report.to_dict()))
    assert values["weights"] == report.weights
    assert values["layers"][0]["layout"]["tensors"] == ["in_scale", "in_shift"]
    bytes_done, totals, labels = zip(*done, strict=True)
    assert list(bytes_done) == sorted(bytes_done)
    assert bytes_done[-1] == report.bytes_before
    assert set(totals) == {report.bytes_before}
    assert list(labels) == list(before)


def test_a_missing_tokenizer_is_noted(tmp_path):
    write_onebit(tmp_path / "src", tokenizer=False)
    report = convert(tmp_path / "src", tmp_path / "dst")
    assert any("no tokenizer found" in note and "tokenizer.json" in note for note in report.notes)
    write_tokenizer(tmp_path / "src")
    assert convert(tmp_path / "src", tmp_path / "other").notes == []


@pytest.mark.parametrize("skip", ["*.down_proj", ["lm_head", "layers.0"], ["self_attn", "lm_head"]])
def test_skipped_layers_stay_dense(tmp_path, skip):
    source = write_dense(tmp_path / "src")
    report = convert(tmp_path / "src", tmp_path / "dst", format="latent", skip=skip)
    packed = {layer.name for layer in report.layers}
    names = {n.removesuffix(".weight") for n in source if n.endswith(("_proj.weight", "lm_head.weight"))}
    part = {"*.down_proj": "down_proj"}.get(skip) if isinstance(skip, str) else next(s for s in skip if s != "lm_head")
    expected = {n for n in names if f".{part}." in f".{n}." or (not isinstance(skip, str) and n == "lm_head")}
    assert names - packed == expected == set(report.kept_dense)
    after = Checkpoint(tmp_path / "dst")
    assert all(torch.equal(after.tensor(f"{n}.weight"), source[f"{n}.weight"]) for n in expected)
    assert set(config_of(tmp_path / "dst")["quantization_config"]["modules_to_not_convert"]) == expected


def test_unknown_architectures_go_by_names(tmp_path):
    source = write_binary_dense(tmp_path / "src")
    config = config_of(tmp_path / "src") | {"model_type": "nobody_knows", "architectures": ["NobodyForCausalLM"]}
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    report = convert(tmp_path / "src", tmp_path / "dst")
    assert len(report.layers) == 14
    assert report.kept_dense == ["lm_head"]
    assert any("model_type 'nobody_knows'" in note for note in report.notes)
    assert torch.equal(Checkpoint(tmp_path / "dst").tensor("lm_head.weight"), source["lm_head.weight"])


def test_a_stored_tied_head_is_kept_as_it_is(tmp_path):
    source = write_binary_dense(tmp_path / "src", architecture="qwen3")
    source["lm_head.weight"] = source["model.embed_tokens.weight"]
    for file in (tmp_path / "src").glob("*.safetensors"):
        file.unlink()
    torch.save(source, tmp_path / "src" / "pytorch_model.bin")  # one storage under two names
    convert(tmp_path / "src", tmp_path / "dst", skip=())
    after = Checkpoint(tmp_path / "dst")
    assert torch.equal(after.tensor("lm_head.weight"), source["lm_head.weight"])


# sizes


def scale_bits(layout, shape, item=16):
    """Bits of the scales of a weight."""
    shapes = layout.shapes(shape[1], shape[0])
    return sum(item * torch.Size(s).numel() for name, s in shapes.items() if name != "weight")


@pytest.mark.parametrize(("shape", "bits"), [("130m", 1.028), ("1.3b", 1.0105), ("7b", 1.0053)])
def test_bits_per_weight_of_the_published_models(shape, bits):
    """Analytically: one bit, and alpha and beta in 16 bits for each column of every linear layer."""
    hidden, inner, *_ = SHAPES[shape]
    layout = WeightLayout(tensors=("in_scale", "in_shift"))
    shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
    weights = sum(n * k for n, k in shapes)
    packed = sum(8 * 4 * torch.Size(layout.shapes(k, n)["weight"]).numel() for n, k in shapes)
    total = packed + sum(scale_bits(layout, s) for s in shapes)
    assert packed == weights
    assert total / weights == pytest.approx(bits, rel=0.01)


def test_a_layer_of_the_7b_shape():
    rows, columns = 11008, 4096
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).half()
    tensors = {"x.weight": weight, "x.wscale": torch.ones(1, columns).half(), "x.wbias": torch.ones(1, columns).half()}
    packed = FORMATS["fbi_llm"].read(tensors, "x")
    assert packed.bits_per_weight == 1 + 32 / rows
    assert packed.bits_per_weight == pytest.approx(1.0053, rel=0.01)


def test_a_converted_folder_is_no_larger_than_the_theory(tmp_path):
    write_fbi_llm(tmp_path / "src", "130m", layers=2, vocab=1000, tokenizer=False)
    report = convert(tmp_path / "src", tmp_path / "dst", dtype="float16")
    theory = sum(n * k + scale_bits(layer.layout, (n, k)) for layer in report.layers for n, k in [layer.shape]) / 8
    assert report.packed_bytes == theory
    assert report.bits_per_weight == pytest.approx(1.028, rel=0.01)
    dense = 2 * (2 * 1000 * 768 + 5 * 768)
    assert report.bytes_after == theory + dense
    assert (tmp_path / "dst" / "model.safetensors").stat().st_size == pytest.approx(theory + dense, rel=0.01)


def run_python(code, *arguments, **options):
    env = os.environ | {"PYTHONPATH": str(Path(bitinfer.__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, **options)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from Linux's /proc")
def test_memory_is_bounded_by_the_largest_shard(tmp_path):
    """All resident memory counts, Python, torch and mapped files included."""
    write_fbi_llm(tmp_path / "src", "1.3b", layers=4, vocab=4000, shards=3)
    largest = max(f.stat().st_size for f in (tmp_path / "src").glob("*.bin"))
    assert largest > 250e6
    code = """
        import sys
        import transformers.models.llama.modeling_llama
        from bitinfer.convert import convert

        def peak():  # ru_maxrss would start at the size of the process that started this one
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

        before = peak()
        convert(sys.argv[1], sys.argv[2], dtype="float16")
        print(before, peak())
    """
    result = run_python(code, tmp_path / "src", tmp_path / "dst")
    assert result.returncode == 0, result.stderr
    before, after = map(int, result.stdout.split())
    assert after < largest + 1e9
    assert after - before < largest + 150e6


# arguments


def test_an_existing_folder_is_refused(source, tmp_path):
    (tmp_path / "dst").mkdir()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        convert(source, tmp_path / "dst")
    assert list((tmp_path / "dst").iterdir()) == []


def test_overwrite_replaces_our_own_folder(source, tmp_path):
    dst = tmp_path / "dst"
    convert(source, dst)
    (dst / "stale.txt").write_text("x")
    convert(source, dst, dtype="float16", overwrite=True)
    assert config_of(dst)["dtype"] == "float16"
    assert not (dst / "stale.txt").exists()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["dst", "src"]


def test_overwrite_leaves_other_folders_alone(source, tmp_path):
    for name, content in (("home", "photo.jpg"), ("model", "config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / content).write_text("{}")
        with pytest.raises(FileExistsError, match="no folder that bitinfer packed"):
            convert(source, tmp_path / name, overwrite=True)
        assert (tmp_path / name / content).read_text() == "{}"
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="it is no folder"):
        convert(source, tmp_path / "file", overwrite=True)


def test_a_failed_overwrite_leaves_the_old_folder(source, tmp_path):
    dst = tmp_path / "dst"
    convert(source, dst)
    before = {f.name: f.read_bytes() for f in dst.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        convert(source, dst, overwrite=True, progress=stop_after(5))
    assert {f.name: f.read_bytes() for f in dst.iterdir()} == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["dst", "src"]


def test_folders_inside_each_other_are_refused(source):
    for dst in (source, source / "packed", source.parent):
        with pytest.raises(ValueError, match="separate folders"):
            convert(source, dst, overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "fbi"}, "unknown format 'fbi'; known are auto, packed, fbi_llm, onebit, binary_dense, latent"),
        ({"dtype": "float8"}, "dtype must be None, float32, float16 or bfloat16, got 'float8'"),
        ({"dtype": torch.int8}, "dtype must be"),
        ({"act_bits": 3}, "act_bits must be None or one of"),
        ({"act_bits": 8, "act_block": 128}, "act_block must be 0 or 256, got 128"),
        ({"group_size": 100}, "group_size must be 0 or a multiple of 32, got 100"),
        ({"group_size": 64}, "group_size=64 has no meaning for format 'fbi_llm'"),
        ({"method": "svd"}, "method='svd' has no meaning for format 'fbi_llm'"),
        ({"zero_limit": 2}, "zero_limit must be a share from 0 to 1, got 2"),
        ({"skip": ["q_proj"]}, r"skip=\['q_proj'\] names model\.layers\.0\.self_attn\.q_proj, which .* binary"),
    ],
)
def test_arguments_are_checked(source, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "dst", **options)
    assert [f.name for f in tmp_path.iterdir()] == ["src"]


# failures


def stop_after(count, error=KeyboardInterrupt):
    """Return a progress callback that raises at its ``count``-th call."""
    calls = []

    def progress(done, total, label):
        calls.append(label)
        if len(calls) == count:
            raise error

    return progress


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_interruption_leaves_nothing(source, tmp_path, error):
    with pytest.raises(error):
        convert(source, tmp_path / "deep" / "er" / "dst", progress=stop_after(20, error))
    assert [f.name for f in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_nothing(source, tmp_path, monkeypatch, code):
    calls = []

    def full(self, *args):
        calls.append(args)
        if len(calls) == 30:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(ShardWriter, "_write", full)
    with pytest.raises(OSError, match="not enough disk space, nothing is left behind") as caught:
        convert(source, tmp_path / "dst")
    assert caught.value.errno == code
    assert caught.value.filename == str(tmp_path / "dst")
    assert [f.name for f in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("limit", [10_000, 100_000])
def test_a_real_write_error_leaves_nothing(source, tmp_path, limit):
    """A limit on the size of files: the write itself fails, early and late in the shard."""
    code = """
        import resource, sys
        from bitinfer.convert import convert
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
        try:
            convert(sys.argv[1], sys.argv[2])
        except OSError as error:
            print(error)
    """
    result = run_python(code, source, tmp_path / "dst", limit)
    assert "not enough disk space, nothing is left behind" in result.stdout, result.stderr
    assert str(tmp_path / "dst") in result.stdout
    assert [f.name for f in tmp_path.iterdir()] == ["src"]


def test_too_little_space_is_seen_before(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(OSError, match=r"about \d+ MB are needed and 0 MB are free") as caught:
        convert(source, tmp_path / "new" / "dst")
    assert caught.value.errno == errno.ENOSPC
    assert [f.name for f in tmp_path.iterdir()] == ["src"]


def test_the_estimate_is_close(source, tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr(sys.modules["bitinfer.convert"], "check_space", lambda dst, size: needed.append(size))
    for dtype in (None, "float16"):
        convert(source, tmp_path / str(dtype), dtype=dtype)
        written = sum(f.stat().st_size for f in (tmp_path / str(dtype)).iterdir())
        assert needed[-1] == pytest.approx(written, rel=0.05)


def test_a_killed_conversion_leaves_nothing_that_loads(source, tmp_path):
    code = """
        import os, signal, sys
        from bitinfer.convert import convert
        def progress(done, total, label):
            if done > total / 2:
                os.kill(os.getpid(), signal.SIGKILL)
        convert(sys.argv[1], sys.argv[2], progress=progress)
    """
    result = run_python(code, source, tmp_path / "dst")
    assert result.returncode == -signal.SIGKILL, result.stderr
    left = [f for f in tmp_path.iterdir() if f.name != "src"]
    assert [f.name.startswith("dst.incomplete-") for f in left] == [True]
    assert all(file.name.endswith(".partial") for file in left[0].iterdir())
    with pytest.raises(FormatError, match=r"config\.json: this file is missing"):
        Checkpoint(left[0])
    convert(source, tmp_path / "dst")  # what is left is not in the way


def test_termination_as_an_exception_leaves_nothing(source, tmp_path):
    code = """
        import os, signal, sys
        from bitinfer.convert import convert
        signal.signal(signal.SIGTERM, lambda *a: sys.exit(143))
        def progress(done, total, label):
            if done > total / 2:
                os.kill(os.getpid(), signal.SIGTERM)
        convert(sys.argv[1], sys.argv[2], progress=progress)
    """
    result = run_python(code, source, tmp_path / "dst")
    assert result.returncode == 143, result.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["src"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(source, tmp_path):
    def progress(done, total, label):
        (tmp_path / "dst").mkdir(exist_ok=True)

    with pytest.raises(FileExistsError, match="appeared"):
        convert(source, tmp_path / "dst", progress=progress)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["dst", "src"]
    assert list((tmp_path / "dst").iterdir()) == []


def test_a_source_that_cannot_be_read_any_more_leaves_nothing(source, tmp_path):
    def progress(done, total, label):
        (source / "pytorch_model-00003-of-00003.bin").unlink(missing_ok=True)

    with pytest.raises(FileNotFoundError):
        convert(source, tmp_path / "dst", progress=progress)
    assert [f.name for f in tmp_path.iterdir()] == ["src"]
