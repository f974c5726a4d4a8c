"""Which tensors of a checkpoint are the weights of linear layers: asked of the model that its configuration builds."""

import functools
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bitinfer.checkpoint import Checkpoint
from bitinfer.errors import FormatError


@dataclass(frozen=True)
class Modules:
    """The linear layers of a model and the shapes of its parameters.

    Attributes:
        linears: name of each ``nn.Linear`` -> (out_features, in_features).
        special: those among them that must stay dense: their weight is tied to an embedding, or they are a subclass
            that other code relies on.
        shapes: name of every parameter -> shape.
    """

    linears: dict[str, tuple[int, int]] = field(default_factory=dict)
    special: frozenset[str] = frozenset()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


def model_modules(config: Mapping[str, Any]) -> Modules | None:
    """Return the modules of the transformers model that ``config.json`` describes, built without memory.

    None without transformers, or for a model that it does not know or cannot build.
    """
    return _build(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}, sort_keys=True))


@functools.lru_cache(maxsize=8)
def _build(config_json: str) -> Modules | None:
    values = json.loads(config_json)
    model_type = values.pop("model_type", None)
    try:
        import transformers

        config = transformers.AutoConfig.for_model(model_type, **values)
        names = values.get("architectures") or [""]
        model_class = getattr(transformers, str(names[0]), None)
        with torch.device("meta"):
            if model_class is None:
                model = transformers.AutoModelForCausalLM.from_config(config)
            else:
                model = model_class._from_config(config)
    except Exception:  # not installed, unknown, or a configuration that its class refuses: all mean "ask the names"
        return None
    users: dict[int, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[id(parameter)].append(module)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    special = {
        name
        for name, m in linears.items()
        if type(m) is not nn.Linear or any(not isinstance(user, nn.Linear) for user in users[id(m.weight)])
    }
    return Modules(
        {name: (m.out_features, m.in_features) for name, m in linears.items()},
        frozenset(special),
        {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)},
    )


def linear_names(checkpoint: Checkpoint, config: Mapping[str, Any]) -> list[str]:
    """Return the names of the linear layers whose weights are stored, in the order of the checkpoint.

    They are the ``nn.Linear`` modules of the model that ``config`` builds; where none can be built, or where its names
    are not those of the file, the matrices whose names end in ``_proj.weight``.
    """
    stored = [k.removesuffix(".weight") for k in checkpoint if k.endswith(".weight") and len(checkpoint.shape(k)) == 2]
    modules = model_modules(config)
    if modules is not None:
        known = [n for n in stored if n in modules.linears and n not in modules.special]
        if any(n != "lm_head" for n in known):
            return known
    return [name for name in stored if name.endswith("_proj")]


def kind_of(name: str) -> str:
    """Return a name with its numbers replaced: layers of one kind differ in nothing else."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def check_one_way(layers: Iterable[str], others: Iterable[str], format_name: str, lacking: str) -> None:
    """Raise FormatError if a linear layer in ``others`` is of the same kind as one of the binary ``layers``."""
    kinds = {kind_of(name): name for name in layers}
    for name in others:
        if kind_of(name) in kinds:
            raise FormatError(
                f"{name} lacks {lacking}, which {kinds[kind_of(name)]} has; some layers are stored as {format_name} "
                "and some are not: the checkpoint is mixed or incomplete"
            )
