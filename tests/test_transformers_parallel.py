"""Tensor parallelism: two processes over gloo compute what one does, or say why they cannot."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import IDS, llama, logits, pack, save
from transformers import AutoModelForCausalLM

from bitinfer import BinaryLinear, WeightLayout
from bitinfer.integrations.tensor_parallel import extend_plan, split_parts
from bitinfer.testing.problems import EVERYTHING, FBI, GROUPS, LAYOUTS, ONEBIT, PLAIN, ROW, TERNARY

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 512}
SHIFTED = WeightLayout(group_size=64, tensors=("weight_scale", "group_shift"))
ODD_SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 480}


def differing(name: str) -> WeightLayout:
    """Layers of one kind with layouts that split in different ways."""
    return WeightLayout(group_size=64) if name == "model.layers.1.mlp.down_proj" else ROW


WORKS = {
    "plain": lambda: pack(llama(**SIZES), PLAIN),
    "row": lambda: pack(llama(bias=True, **SIZES), ROW),
    "fbi": lambda: pack(llama(**SIZES), FBI),
    "ternary": lambda: pack(llama(**SIZES), TERNARY),
    "groups": lambda: pack(llama(**SIZES), SHIFTED),
    "int8": lambda: pack(
        llama(num_key_value_heads=4, hidden_size=512, intermediate_size=512), FBI, act_bits=8, act_block=256
    ),
}
REFUSED = {
    "onebit": (lambda: pack(llama(**SIZES), ONEBIT), r"q_proj normalises over all of its 128 outputs"),
    "wide-groups": (lambda: pack(llama(**SIZES), GROUPS), r"o_proj has 128 inputs.* 2 parts of whole groups of 128"),
    "half-words": (lambda: pack(llama(**ODD_SIZES), ROW), r"down_proj has 480 inputs.* 2 parts of whole words of 32"),
    "tokens": (lambda: pack(llama(**SIZES), ROW, act_bits=8), r"o_proj quantises activations over all.*act_block=256"),
    "blocks": (lambda: pack(llama(**SIZES), ROW, act_bits=8, act_block=256), r"o_proj has 128 inputs.*blocks of 256"),
    "differing": (lambda: pack(llama(**SIZES), differing), r"down_proj\.weight_scale is split along dimension"),
    "dense": (lambda: llama(**SIZES), r"packing while loading does not work under tensor parallelism"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every model in two processes, and return the folder of what they wrote."""
    root = tmp_path_factory.mktemp("parallel")
    folders = [save(make(), root / name) for name, make in WORKS.items()]
    folders += [save(make(), root / name) for name, (make, _) in REFUSED.items()]
    out = root / "out"
    out.mkdir()
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tests / "tensor_parallel_worker.py"), str(out), *map(str, folders)]
    path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKS)
def test_two_processes_compute_what_one_does(results, name):
    folder = results.parent / name
    model = AutoModelForCausalLM.from_pretrained(folder)
    split = torch.load(results / f"{name}.pt")
    expected = logits(model)
    assert (split["logits"] - expected).abs().max() <= 1e-5 * expected.abs().max()  # sums of two parts round otherwise
    tokens = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(split["tokens"], tokens)
    layer = model.model.layers[0].mlp
    up, down = list(layer.up_proj.weight.shape), list(layer.down_proj.weight.shape)
    up[-2], down[-1] = up[-2] // 2, down[-1] // 2
    assert (list(split["up"]), list(split["down"])) == (up, down)
    assert split["in_features"] == layer.down_proj.in_features // 2
    # saving collects the parts again
    assert (results / name / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_is_refused_in_every_process(results, name):
    messages = [(results / f"{name}-{rank}.txt").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    assert re.search(REFUSED[name][1], messages[0]), messages[0]


# the rules, without processes

ONE_LAYER = "model.layers.*.self_attn."


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_is_split_where_it_has_something_to_split(name):
    layer = BinaryLinear(256, 64, bias=True, layout=LAYOUTS[name])
    for style, axis in (("colwise", -2), ("rowwise", -1)):
        for part, split in split_parts(layer, style).items():
            shape = getattr(layer, part).shape
            if part == "bias":
                assert split is (style == "colwise")
            elif split:
                assert shape[axis] > 1
            else:
                assert shape[axis] == 1


def test_the_plan_keeps_whole_what_cannot_be_split():
    model = pack(llama(**SIZES), FBI)
    plan = {f"{ONE_LAYER}q_proj": "colwise", f"{ONE_LAYER}o_proj": "rowwise", "lm_head": "colwise_gather_output"}
    before = dict(plan)
    extend_plan(model, plan)
    added = plan.keys() - before.keys()
    assert added == {f"{ONE_LAYER}q_proj.in_scale", f"{ONE_LAYER}q_proj.in_shift"}
    assert {k: plan[k] for k in before} == before
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    assert all(plan[name] in ALL_PARALLEL_STYLES for name in added)


def test_the_plan_of_a_user_wins_and_no_plan_stays_none():
    model = pack(llama(**SIZES), EVERYTHING)
    plan = {f"{ONE_LAYER}q_proj": "colwise_rep", f"{ONE_LAYER}q_proj.in_scale": "colwise"}
    extend_plan(model, plan)
    assert plan[f"{ONE_LAYER}q_proj.in_scale"] == "colwise" and f"{ONE_LAYER}q_proj.in_shift" in plan
    empty: dict[str, str] = {}
    extend_plan(model, empty)
    assert not empty
