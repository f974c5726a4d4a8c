"""Tensor parallelism: which tensors of a packed layer are split, and which layers cannot be.

transformers splits every parameter of a layer alike: by rows (dimension -2) under a column-wise plan, by columns
(dimension -1) under a row-wise one. That is right for the words, and for every tensor that has rows or columns of its
own; ``[1, K]`` has no rows and ``[N, 1]`` no columns to split, so each process keeps them whole.
"""

from typing import Any

import torch
from torch import nn

from bitinfer.checks import BLOCK_SIZE
from bitinfer.integrations.loading import packed_layers
from bitinfer.nn import BinaryLinear
from bitinfer.packing import WORD_BITS

ROWS, COLUMNS = "colwise", "rowwise"  # transformers names a style for how the transposed matrix is cut


def split_parts(module: BinaryLinear, style: str) -> dict[str, bool]:
    """Return, for each parameter of a layer, whether it is split under ``style`` (``colwise`` or ``rowwise``)."""
    per_group = style == ROWS or bool(module.layout.group_size)
    split = {
        "weight": True,
        "weight_scale": per_group,
        "group_shift": per_group,
        "in_scale": style == COLUMNS,
        "in_shift": style == COLUMNS,
        "bias": style == ROWS,
    }
    return {part: split[part] for part, _ in module.named_parameters(recurse=False)}


def extend_plan(model: nn.Module, plan: dict[str, str]) -> None:
    """Add to a plan of transformers, in place, the parameters that stay whole. Without a plan nothing happens.

    A rule holds for all layers of a kind (``layers.*.mlp.up_proj``); where their layouts disagree none is added, and
    :func:`check_split` refuses the model if it is really split.
    """
    if not plan:
        return
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard

    # 5.17 has no style that does nothing; this one touches a module's output and no parameter
    whole = "replicate" if "replicate" in ALL_PARALLEL_STYLES else "all_reduce"
    wishes: dict[str, set[bool]] = {}
    for name, module in packed_layers(model).items():
        kind = replace_layer_number_by_wildcard(name)
        style = next((s for s in (ROWS, COLUMNS) if plan.get(kind, "").startswith(s)), None)
        if style is not None:
            for part, split in split_parts(module, style).items():
                if part != "bias":  # which transformers treats by itself
                    wishes.setdefault(f"{kind}.{part}", set()).add(split)
    plan.update({name: whole for name, split in wishes.items() if split == {False} and name not in plan})


def check_split(model: nn.Module) -> None:
    """Check how packed layers were split, and tell row-wise ones how many columns are theirs.

    The outcome is the same in every process, so that none waits for another that has stopped.

    Raises:
        ValueError: a layer cannot be split this way, or its parameters were split in ways that do not fit together.
    """
    for name, module in packed_layers(model).items():
        dims = {part: _split_dim(p) for part, p in module.named_parameters(recurse=False)}
        if dims["weight"] is None and not any(d is not None for d in dims.values()):
            continue
        style = {-2: ROWS, -1: COLUMNS}.get(dims["weight"] or 0)
        expected = {} if style is None else split_parts(module, style)
        axis = -2 if style == ROWS else -1
        wanted = {
            part: (-1 if part == "bias" and split else axis) if split else None for part, split in expected.items()
        }
        if dims != wanted:
            wrong = next((p for p in dims if dims[p] != wanted.get(p)), "weight")
            raise ValueError(
                f"{name}.{wrong} is split along dimension {dims[wrong]} where {module.layout} needs "
                f"{wanted.get(wrong)}: the tensor parallel plan does not fit packed layers; use transformers' own plan "
                "for this model, or keep the layer whole"
            )
        size = _tp_size(module.weight)
        _check_possible(name, module, style or ROWS, size)
        if style == COLUMNS:
            module.in_features //= size


def gather_words(model: nn.Module) -> dict[str, Any] | None:
    """Return the state dict of a split model with its words whole, or None for a model that is not split.

    Every process has to call it. The words travel as int32, since not every backend of torch.distributed sends uint32;
    transformers gathers the rest.
    """
    split = {f"{n}.weight": m for n, m in packed_layers(model).items() if _split_dim(m.weight) is not None}
    if not split:
        return None
    from torch.distributed.tensor import DTensor

    state = dict(model.state_dict())
    for key, module in split.items():
        words: Any = module.weight.detach()
        part = words.to_local().view(torch.int32)
        whole = DTensor.from_local(
            part, words.device_mesh, words.placements, run_check=False, shape=words.shape, stride=words.stride()
        )
        state[key] = whole.full_tensor().view(torch.uint32)
    return state


def _check_possible(name: str, module: BinaryLinear, style: str, size: int) -> None:
    if module.layout.norm_eps is not None:
        raise ValueError(
            f"{name} normalises over all of its {module.out_features} outputs, so it cannot be split over {size} "
            "processes; load models with such layers (OneBit) without tensor parallelism, or keep the layer out of the "
            "plan"
        )
    if style == ROWS:
        return
    unit = module.layout.group_size or WORD_BITS
    why = f"groups of {unit} columns" if module.layout.group_size else f"words of {WORD_BITS} columns"
    if module.act_bits is not None:
        if not module.act_block:
            raise ValueError(
                f"{name} quantises activations over all of its {module.in_features} inputs, so its columns cannot be "
                f"split over {size} processes; pass act_block={BLOCK_SIZE}, or act_bits=None"
            )
        unit, why = max(unit, BLOCK_SIZE), f"activation blocks of {BLOCK_SIZE} columns" if unit < BLOCK_SIZE else why
    if module.in_features % (size * unit):
        raise ValueError(
            f"{name} has {module.in_features} inputs, which do not divide into {size} parts of whole {why}; use "
            "another number of processes, or keep the layer out of the plan"
        )


def _tp_size(parameter: Any) -> int:
    return parameter.device_mesh.size(_tp_dim(parameter))


def _tp_dim(parameter: Any) -> int:
    """Return the mesh dimension of tensor parallelism, which may stand beside others that gather before use."""
    names = parameter.device_mesh.mesh_dim_names or ()
    return names.index("tp") if "tp" in names else 0


def _split_dim(parameter: Any) -> int | None:
    """Return along which dimension, counted from the end, a parameter is split; None for not at all."""
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return None
    names = parameter.device_mesh.mesh_dim_names or ()
    if names and "tp" not in names:
        return None
    dim = getattr(placements[_tp_dim(parameter)], "dim", None)
    return None if dim is None else (dim - parameter.dim() if dim >= 0 else dim)
