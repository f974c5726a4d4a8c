"""Matrices are read in pieces of some rows; the result must not depend on their size."""

import pytest
import torch

from bitinfer.errors import FormatError
from bitinfer.formats import FORMATS
from bitinfer.formats.latent import Latent

ROWS, COLUMNS = 23, 70


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def column_levels():
    return 0.5 * random(ROWS, COLUMNS).sign() * random(1, COLUMNS, seed=1).half() + random(1, COLUMNS, seed=2).half()


CASES = {
    "latents": (
        FORMATS["fbi_llm"],
        {"wscale": random(1, COLUMNS), "wbias": random(1, COLUMNS), "weight": random(ROWS, COLUMNS)},
    ),
    "columns": (FORMATS["fbi_llm"], {"weight": column_levels().half()}),
    "symmetric": (FORMATS["binary_dense"], {"weight": random(ROWS, COLUMNS).sign() * random(ROWS, 1, seed=1)}),
    "shifted": (
        FORMATS["binary_dense"],
        {"weight": (random(ROWS, COLUMNS).sign() * random(ROWS, 1, seed=1) + random(ROWS, 1, seed=2)).half()},
    ),
    "absmean": (Latent(group_size=32), {"weight": random(ROWS, COLUMNS)}),
}


@pytest.mark.parametrize("elements", [1, COLUMNS, 3 * COLUMNS, 5 * COLUMNS + 1])
@pytest.mark.parametrize("case", CASES)
def test_pieces_change_nothing(monkeypatch, case, elements):
    reader, parts = CASES[case]
    tensors = {f"x.{part}": tensor for part, tensor in parts.items()}
    whole, _ = reader.read_counted(tensors, "x")
    monkeypatch.setattr("bitinfer.formats.base.CHUNK_ELEMENTS", elements)
    pieces, _ = reader.read_counted(tensors, "x")
    assert whole.layout == pieces.layout
    assert all(torch.equal(t, pieces.tensors()[name]) for name, t in whole.tensors().items())


def test_zeros_are_summed_over_pieces(monkeypatch):
    monkeypatch.setattr("bitinfer.formats.base.CHUNK_ELEMENTS", 3 * COLUMNS)
    weight = random(ROWS, COLUMNS)
    weight[::5, 7] = 0.0
    with pytest.raises(FormatError, match=r"x\.weight holds 5 exact zeros among 1610"):
        FORMATS["latent"].read({"x.weight": weight}, "x")


def test_the_row_with_the_most_values_is_named_across_pieces(monkeypatch):
    monkeypatch.setattr("bitinfer.formats.base.CHUNK_ELEMENTS", 3 * COLUMNS)
    weight = random(ROWS, COLUMNS).sign()
    weight[17] = random(COLUMNS)
    with pytest.raises(FormatError, match=rf"x\.weight is not binary: row 17 takes {COLUMNS} values"):
        FORMATS["binary_dense"].read({"x.weight": weight}, "x")
