"""replace_linear: swap the ``nn.Linear`` layers of any model for packed ones, and report what was done."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from bitinfer.nn.linear import BinaryLinear
from bitinfer.weight import BinaryWeight


@dataclass
class ReplaceReport:
    """What :func:`replace_linear` did.

    Attributes:
        replaced: dotted names of the layers that are packed now.
        skipped: dotted name of each linear layer left as it was, with the reason.
        bytes_before, bytes_after: bytes of all parameters and buffers of the model, shared ones counted once.
    """

    replaced: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        ratio = self.bytes_before / max(self.bytes_after, 1)
        lines = [
            f"packed {len(self.replaced)} linear layers, left {len(self.skipped)}: "
            f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB ({ratio:.1f} x smaller)"
        ]
        return "\n".join(lines + [f"  left {name}: {reason}" for name, reason in self.skipped.items()])


def replace_linear(
    model: nn.Module,
    skip: Iterable[str] = ("lm_head",),
    act_bits: int | None = None,
    *,
    act_block: int = 0,
    group_size: int = 0,
    binarize: Callable[[str, nn.Linear], BinaryWeight] | None = None,
) -> ReplaceReport:
    """Replace every ``nn.Linear`` inside ``model`` by a :class:`bitinfer.BinaryLinear`, in place.

    A layer that stands at several places stays one layer, dense if ``skip`` matches one of them; layers that share a
    weight go on sharing the packed one. Left alone, with the reason in the report: names that ``skip`` matches, weights
    tied to something that is no linear layer (an embedding), subclasses of ``nn.Linear`` (other code relies on them),
    layers packed already.

    Args:
        model: any module; it must not itself be the ``nn.Linear``.
        skip: names of modules to leave, with all inside: whole components of the dotted name (``"lm_head"``,
            ``"layers.0.mlp"``), or patterns with ``*`` over the whole name.
        act_bits, act_block: see :class:`bitinfer.BinaryLinear`.
        group_size: 0 for one scale per row, else columns that share a scale, a multiple of 32.
        binarize: how to pack ``(name, linear)``; by default sign and mean absolute value.

    Returns:
        What was replaced, what was left and why, bytes before and after.

    Raises:
        ValueError: ``model`` is itself a linear layer, or has layers on the meta device.
    """
    if isinstance(model, nn.Linear):
        raise ValueError("replace_linear: model is itself an nn.Linear; use BinaryLinear.from_linear(model)")
    report = ReplaceReport(bytes_before=model_bytes(model))
    reasons = _reasons_to_skip(model, tuple(skip))
    layers: dict[int, BinaryLinear] = {}  # id of a dense layer -> its replacement
    weights: dict[int, nn.Parameter] = {}  # id of a dense weight -> its packed words
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, BinaryLinear):
            report.skipped[name] = "already packed"
        elif isinstance(module, nn.Linear) and id(module) in reasons:
            report.skipped[name] = reasons[id(module)]
        elif isinstance(module, nn.Linear):
            if id(module) not in layers:
                if binarize is None:
                    new = BinaryLinear.from_linear(module, act_bits, act_block, group_size)
                else:
                    new = BinaryLinear.from_weight(binarize(name, module), act_bits, act_block).train(module.training)
                new.weight = weights.setdefault(id(module.weight), new.weight)
                layers[id(module)] = new
            model.set_submodule(name, layers[id(module)])
            report.replaced.append(name)
    for module in model.modules():
        # its fused fast path reads linear1.weight itself; this attribute is its own switch to the plain path
        if isinstance(module, nn.TransformerEncoderLayer) and isinstance(module.linear1, BinaryLinear):
            module.activation_relu_or_gelu = 0
    report.bytes_after = model_bytes(model)
    return report


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers of ``model``, shared storage counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.nbytes for t in {t.data_ptr() if not t.is_meta else id(t): t for t in tensors}.values())


def _reasons_to_skip(model: nn.Module, skip: tuple[str, ...]) -> dict[int, str]:
    """Map the id of every linear layer that must stay to the reason."""
    reasons: dict[int, str] = {}
    users: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)  # id of a parameter -> the modules that hold it
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            users[id(parameter)].append((name, module))
        if not isinstance(module, nn.Linear):
            continue
        matched = next((s for s in skip if f".{s}." in f".{name}." or fnmatchcase(name, s)), None)
        if matched is not None:
            reasons[id(module)] = f"skip={matched!r}"
        elif type(module) is not nn.Linear:
            reasons.setdefault(id(module), f"it is a {type(module).__name__}, which other code relies on")
    # a weight that something dense goes on using cannot be packed for the others
    stay = {
        id(module.weight): name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in reasons
    }
    for module in model.modules():
        if not isinstance(module, nn.Linear) or id(module) in reasons:
            continue
        others = [other for other, user in users[id(module.weight)] if not isinstance(user, nn.Linear)]
        if others:
            reasons[id(module)] = f"its weight is tied to {others[0]}"
        elif id(module.weight) in stay:
            reasons[id(module)] = f"its weight is shared with {stay[id(module.weight)]}, which stays"
    return reasons
