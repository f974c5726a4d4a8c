"""Our own folders read back, and what is wrong with them found."""

import json

import pytest
import torch
from packed_folder import load_packed
from safetensors.torch import save_file

from bitinfer.checkpoint import Checkpoint
from bitinfer.convert import convert
from bitinfer.errors import FormatError
from bitinfer.formats import FORMATS, detect
from bitinfer.testing.checkpoints import (
    write_binary_dense,
    write_dense,
    write_fbi_llm,
    write_onebit,
)

PACKED = FORMATS["packed"]
SOURCES = {
    "fbi": (write_fbi_llm, {}, {}),
    "fbi-row": (write_fbi_llm, {"pattern": "row"}, {}),
    "onebit": (write_onebit, {"bias": True}, {}),
    "groups": (write_binary_dense, {"group_size": 32, "symmetric": False}, {}),
    "latent": (write_dense, {}, {"format": "latent"}),
}


@pytest.mark.parametrize("source", SOURCES)
def test_round_trip(tmp_path, source):
    writer, options, how = SOURCES[source]
    writer(tmp_path / "src", **options)
    report = convert(tmp_path / "src", tmp_path / "dst", **how)
    before, after = Checkpoint(tmp_path / "src"), Checkpoint(tmp_path / "dst")
    assert detect(after) is PACKED
    assert set(PACKED.layer_names(after)) == {layer.name for layer in report.layers}
    reader = FORMATS[report.format]
    for layer in report.layers:
        expected, packed = reader.read(before, layer.name), PACKED.read(after, layer.name)
        assert packed.layout == expected.layout == layer.layout
        assert packed.in_features == expected.in_features == layer.shape[1]
        assert packed.tensors().keys() == expected.tensors().keys()
        assert all(torch.equal(packed.tensors()[n], t) for n, t in expected.tensors().items())
        assert set(packed.tensors(f"{layer.name}.")) <= set(PACKED.consumed(layer.name))
        x = torch.randn(3, layer.shape[1], generator=torch.Generator().manual_seed(0))
        reference = reader.reference_linear(before, layer.name)(x)
        torch.testing.assert_close(PACKED.reference_linear(after, layer.name)(x), reference, rtol=1e-4, atol=1e-4)


@pytest.fixture
def folder(tmp_path):
    write_binary_dense(tmp_path / "src", symmetric=False)
    convert(tmp_path / "src", tmp_path / "dst")
    return tmp_path / "dst"


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(values)
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder, change):
    tensors, _ = load_packed(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


NAME = "model.layers.0.mlp.down_proj"  # 176 columns: the last word is half empty


def read_all(folder):
    checkpoint = Checkpoint(folder)
    return [PACKED.read(checkpoint, name) for name in PACKED.layer_names(checkpoint)]


def test_a_newer_layout_is_refused(folder):
    change_config(folder, layout_version=2)
    with pytest.raises(FormatError, match=r"layout_version 2, written by a newer bitinfer.*pip install -U bitinfer"):
        read_all(folder)


@pytest.mark.parametrize("version", [None, "1", 0])
def test_a_version_that_is_none_is_refused(folder, version):
    change_config(folder, layout_version=version)
    with pytest.raises(FormatError, match=f"layout_version {version!r}, expected 1"):
        read_all(folder)


@pytest.mark.parametrize("layout", [None, {"planes": 0}, {"tensors": ["other"]}, {"colour": 1}, 7])
def test_a_layout_that_is_none_is_refused(folder, layout):
    change_config(folder, layout=layout)
    with pytest.raises(FormatError, match=r"the layout of model\.layers\.0\S* is not valid"):
        read_all(folder)


def test_missing_and_superfluous_tensors_are_refused(folder):
    change_config(folder, layout={"planes": 1, "group_size": 0, "tensors": ["weight_scale"], "norm_eps": None})
    with pytest.raises(FormatError, match=r"group_shift is stored, but the layout in config.json does not have it"):
        read_all(folder)
    layout = {"planes": 1, "group_size": 0, "tensors": ["weight_scale", "in_scale", "group_shift"], "norm_eps": None}
    change_config(folder, layout=layout)
    with pytest.raises(FormatError, match=r"in_scale is missing"):
        read_all(folder)


def test_damaged_words_are_refused(folder):
    def set_padding(tensors):
        tensors[f"{NAME}.weight"].view(torch.int32)[3, -1] |= 1 << 20

    change_tensors(folder, set_padding)
    with pytest.raises(FormatError, match=rf"{NAME}\.weight has bits set past column 176"):
        read_all(folder)


def test_words_of_the_wrong_shape_are_refused(folder):
    change_tensors(folder, lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"][:, :-1].clone()}))
    with pytest.raises(FormatError, match=f"{NAME}: the stored tensors do not fit together"):
        read_all(folder)


def test_scales_that_are_not_numbers_are_refused(folder):
    change_tensors(folder, lambda t: t[f"{NAME}.weight_scale"].fill_(float("nan")))
    with pytest.raises(FormatError, match=rf"{NAME}\.weight_scale holds 64 values that are NaN"):
        read_all(folder)


def test_planes_and_words_must_agree(folder):
    layout = {"planes": 2, "group_size": 0, "tensors": ["weight_scale", "group_shift"], "norm_eps": None}
    change_config(folder, layout=layout)
    with pytest.raises(FormatError, match=r"expected uint32 .* with 2 plane"):
        read_all(folder)


def test_a_folder_without_words_is_refused(folder):
    def dense(tensors):
        for name in [n for n, t in tensors.items() if t.dtype == torch.uint32]:
            tensors[name] = tensors[name].view(torch.int32)

    change_tensors(folder, dense)
    with pytest.raises(FormatError, match="no uint32 weight is stored"):
        read_all(folder)


def test_a_plain_mapping_has_no_layout(folder):
    with pytest.raises(TypeError, match="must be a Checkpoint"):
        PACKED.read(dict(Checkpoint(folder)), NAME)


def test_packed_folders_are_not_converted_again(folder, tmp_path):
    for name in ("auto", "fbi_llm", "latent"):
        with pytest.raises(FormatError, match="is packed already"):
            convert(folder, tmp_path / "again", format=name)
    with pytest.raises(FormatError, match="'packed' is what convert writes"):
        convert(tmp_path / "src", tmp_path / "again", format="packed")
