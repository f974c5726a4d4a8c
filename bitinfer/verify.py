"""Compare a packed model with the model that its source describes, logit by logit.

The reference is built from the source's own formula (``Format.reference_linear``) in float32, apart from the packed
code; for a source that was only approximated it is the dense model itself. One model is in memory at a time: the
reference's logits wait in a temporary file.
"""

import gc
import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitinfer.checkpoint import Checkpoint
from bitinfer.errors import FormatError
from bitinfer.formats import FORMATS, Format
from bitinfer.info import packed_quantization
from bitinfer.int8_rows import restore_all, restore_rows, round_rows
from bitinfer.models.cache import read_cache, round_cache
from bitinfer.nn import BinaryLinear

WINDOW = 512  # tokens to a forward pass
# Relative error that a lossless conversion may show in float32: roundings of some dozen layers.
FP32_TOLERANCE = 1e-4
# In half precision the yardstick is the dense model's own error in that dtype, measured in the same run.
HALF_SLACK = 2.0
SAMPLE_TEXT = (
    "The lighthouse keeper climbed the stairs at dusk, as he had done every evening for thirty years. From the "
    "gallery he could see the harbour, the fishing boats coming home one after another, and far out a single sail "
    "that did not move. He lit the lamp, wound the clockwork, and wrote the hour into the log: wind from the "
    "west, sea calm, all well. In the year 1893 the company sent a letter. It said that the lamp would be "
    "replaced by an electric one, which needs neither oil nor a keeper; that 2 men would come with the new "
    "machine in March; and that he might stay in the house until the end of the month. He read it twice, folded "
    "it, and put it under the log. Then he went up again, because it was dusk."
)


@dataclass
class Verification:
    """What :func:`verify` measured.

    Attributes:
        format: the source format.
        lossless: whether packed and original should agree to rounding; else the numbers are only reported.
        passed: whether ``relative_error <= tolerance``; None where nothing is required.
        tolerance: of ``relative_error``; None where nothing is required.
        dtype: what the packed model computed in; the reference computes in float32.
        tokens: positions compared.
        max_error: largest absolute difference of a logit.
        relative_error: root mean square of the differences over that of the reference's logits about their mean.
        kl_mean, kl_max: KL divergence of the packed from the reference's next-token distribution, nats per token.
        top1_agreement: share of positions where both have the same likeliest token.
        nll_reference, nll_packed: mean negative log likelihood of the text, nats per token.
        notes: what a user should know about this comparison.
    """

    format: str
    lossless: bool
    passed: bool | None
    tolerance: float | None
    dtype: str
    tokens: int
    max_error: float
    relative_error: float
    kl_mean: float
    kl_max: float
    top1_agreement: float
    nll_reference: float
    nll_packed: float
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return asdict(self)


def verify(
    src: str | Path,
    dst: str | Path,
    *,
    text: str | Sequence[int] | None = None,
    tokens: int = 256,
    dtype: torch.dtype = torch.float32,
    act_bits: int | str | None = "config",
    head_bits: int | None = None,
    cache_bits: int | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> Verification:
    """Run the original and the packed model over the same tokens and compare their logits.

    A lossless conversion passes when its relative error is at most 1e-4, or, where it rounded to half precision or
    computes in it, at most twice the error that the dense model itself makes in that precision on the same tokens.

    Args:
        src: the source folder that was converted. A packed folder stands for its weights as they are, dequantised:
            ``verify(dst, dst)`` checks that the kernels compute what is stored, whatever was lost in conversion.
        dst: the packed folder.
        text: text or token ids to compare on; None takes a built-in paragraph (without a tokenizer: random ids).
        tokens: compare at most this many positions.
        dtype: what the packed model computes in.
        act_bits: as of :func:`bitinfer.load`; quantised activations are an approximation and only reported.
        head_bits: as of :func:`bitinfer.fuse`: 8 rounds the rows of the head, which is an approximation too.
        cache_bits: as of :func:`bitinfer.fuse`: 8 or 4 rounds keys and values, an approximation as well.
        on_stage: called with a word on what is happening now.

    Raises:
        FormatError: a folder is not what it should be, or the two do not belong together.
        ValueError: an argument is out of range.
    """
    if tokens < 2:
        raise ValueError(f"verify: tokens must be at least 2, got {tokens}")
    stage = on_stage or (lambda text: None)
    quantization = packed_quantization(dst)
    notes: list[str] = []
    if FORMATS["packed"].matches(Checkpoint(src)):
        source_format = FORMATS["packed"]
        notes.append("SRC is packed itself: its weights, dequantised, are the original here")
    else:
        source_format = _format(quantization)
    lossless = not source_format.approximates
    if not lossless:
        notes.append("this conversion approximates a dense model: the numbers say how closely, and none is required")
    rounded = quantization.get("int8_rows") or []
    if rounded and source_format.name != "packed":  # which holds the rounded ones
        lossless = False
        notes.append(
            f"{' and '.join(rounded)} are rounded to 8 bits, which is an approximation: none of this is required"
        )
    bits = quantization.get("act_bits") if act_bits == "config" else act_bits
    if bits is not None:
        notes.append(f"activations are quantised to {bits} bits, which is an approximation: none of this is required")
    if head_bits not in (None, 8):
        raise ValueError(f"verify: head_bits must be None or 8, got {head_bits!r}")
    if head_bits is not None:
        notes.append("the head is rounded to 8 bits, which is an approximation: none of this is required")
    if cache_bits not in (None, 8, 4):
        raise ValueError(f"verify: cache_bits must be None, 8 or 4, got {cache_bits!r}")
    if cache_bits is not None:
        notes.append(f"keys and values are rounded to {cache_bits} bits, an approximation: none of this is required")
    zeros = sum((quantization.get("zeros") or {}).values())
    if zeros:
        notes.append(f"{zeros} weights are exactly zero in the source and +1 in the packed model")

    stage("reading the source")
    reference = load_reference(src, source_format)
    ids = _choose_ids(src, dst, text, tokens, reference.config, notes)
    with tempfile.TemporaryFile() as file:
        stage("running the original")
        shape = (len(ids), int(reference.config.vocab_size))
        stored = np.memmap(file, np.float32, "w+", shape=shape)
        for rows, logits in _logits(reference, ids):
            stored[rows] = logits.float().numpy()
        wanted = torch.from_numpy(stored)
        half = _coarsest(src, dst, dtype)
        tolerance: float | None = None
        if lossless and bits is None and head_bits is None and cache_bits is None:
            tolerance = FP32_TOLERANCE
            if half != torch.float32:
                stage(f"running the original in {_name(half)}, whose own error is the yardstick")
                own = _compare(wanted, _logits(reference.to(half), ids), ids)["relative_error"]
                tolerance = max(tolerance, HALF_SLACK * own)
        del reference
        gc.collect()
        stage("running the packed model")
        packed = _load_packed(dst, dtype, act_bits)
        if head_bits is not None:
            head = packed.get_output_embeddings()
            rounded_head = restore_rows(*round_rows(head.weight.detach())).to(dtype)
            head.weight = nn.Parameter(rounded_head, requires_grad=False)  # the embedding, if tied, stays as it is
        measures = _compare(wanted, _logits(packed, ids, cache_bits), ids)
    passed = None if tolerance is None else bool(measures["relative_error"] <= tolerance)
    return Verification(
        source_format.name, lossless, passed, tolerance, _name(dtype), len(ids), **measures, notes=notes
    )


def load_reference(src: str | Path, source_format: Format) -> Any:
    """Build the dense model that a source checkpoint describes, in float32 and in evaluation mode.

    Layers that the format packs come from ``Format.reference_linear``, or for a format that only approximates them are
    the dense ones; every other tensor is the checkpoint's own.

    Raises:
        FormatError: ``src`` is no checkpoint of that format.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    checkpoint = Checkpoint(src)
    names = [] if source_format.approximates else source_format.layer_names(checkpoint)
    if not names and not source_format.approximates:
        raise FormatError(f"{src}: holds no layer of format {source_format.name}; is it the folder that was converted?")
    state: dict[str, Tensor] = {}
    modules: dict[str, nn.Module] = {}
    consumed: set[str] = set()
    for name in names:
        module = source_format.reference_linear(checkpoint, name)
        if isinstance(module, nn.Sequential):  # a norm follows: the module itself goes in, after loading
            modules[name], module = module, module[0]
        state |= {f"{name}.{part}": parameter.detach() for part, parameter in module.named_parameters()}
        consumed.update(source_format.consumed(name))
    state |= restore_all({k: checkpoint.tensor(k) for k in checkpoint if k not in consumed and k not in state})
    values = source_format.config(checkpoint)
    values.pop("quantization_config", None)
    config = AutoConfig.for_model(**values)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()
    for name, module in modules.items():
        model.set_submodule(name, module.eval())
    return model.requires_grad_(False)


def _format(quantization: Mapping[str, Any]) -> Format:
    name = quantization.get("format")
    if name not in FORMATS:
        raise FormatError(
            f"the packed folder comes from format {name!r}, unknown to this bitinfer: pip install -U bitinfer"
        )
    return FORMATS[name]


def _load_packed(dst: str | Path, dtype: torch.dtype, act_bits: int | str | None) -> Any:
    from bitinfer.load import load

    model, _ = load(dst, dtype=dtype, act_bits=act_bits)
    if not any(isinstance(module, BinaryLinear) for module in model.modules()):
        raise FormatError(f"{dst}: no layer of the loaded model is packed; convert the source again")
    return model.eval()


def _choose_ids(
    src: str | Path,
    dst: str | Path,
    text: str | Sequence[int] | None,
    tokens: int,
    config: Any,
    notes: list[str],
) -> list[int]:
    """Return the token ids to compare on, at most ``tokens``; a note tells when they are random."""
    if text is not None and not isinstance(text, str):
        ids = [int(i) for i in text]
    else:
        tokenizer = _tokenizer(dst) or _tokenizer(src)
        if tokenizer is None and text is not None:
            raise ValueError(
                f"verify: neither {src} nor {dst} has a tokenizer; copy its files there or leave out the text"
            )
        if tokenizer is None:
            notes.append("there is no tokenizer: compared on random tokens")
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(0, config.vocab_size, (tokens,), generator=generator).tolist()
        else:
            ids = list(tokenizer(text or SAMPLE_TEXT, verbose=False)["input_ids"])
    ids = ids[:tokens]
    if len(ids) < 2:
        raise ValueError(f"verify: the text has {len(ids)} tokens; at least 2 are needed")
    if not all(0 <= i < config.vocab_size for i in ids):
        raise ValueError(f"verify: token ids must lie in 0 to {config.vocab_size - 1}, got {min(ids)} to {max(ids)}")
    return ids


def _tokenizer(folder: str | Path) -> Any | None:
    from transformers import AutoTokenizer

    from bitinfer.load import TOKENIZER_FILES

    if not any((Path(folder) / mark).is_file() for mark in TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _logits(model: Any, ids: Sequence[int], cache_bits: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits ``[T, V]`` of each window of ``ids``, on the CPU, with the rows that they stand for.

    With ``cache_bits`` attention reads keys and values rounded to so many bits.
    """
    longest = min(WINDOW, getattr(model.config, "max_position_embeddings", None) or WINDOW)
    # newer transformers have renamed it
    cache_argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    for first in range(0, len(ids), longest):
        part = torch.tensor([ids[first : first + longest]], device=model.device)
        with torch.no_grad():  # left before the yield: a generator that is given up would leave the mode on
            cache = {} if cache_bits is None else {cache_argument: _rounded_cache(cache_bits)}
            logits = model(part, use_cache=cache_bits is not None, **cache).logits[0].cpu()
        yield slice(first, first + part.shape[1]), logits


def _rounded_cache(bits: int) -> Any:
    from transformers import DynamicCache

    class RoundedCache(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            rounded = (read_cache(round_cache(x, bits), x.shape[-1], x.dtype) for x in (key_states, value_states))
            return super().update(*rounded, *args, **kwargs)

    return RoundedCache()


def _compare(wanted: Tensor, got: Iterator[tuple[slice, Tensor]], ids: Sequence[int]) -> Mapping[str, float]:
    """Return the measures of :class:`Verification`; all sums are float64."""
    total = dict.fromkeys(("square", "spread", "kl", "agree", "nll_wanted", "nll_got"), 0.0)
    max_error = kl_max = 0.0
    count = predicted = 0
    for rows, logits in got:
        if logits.shape[-1] != wanted.shape[-1]:
            raise FormatError(
                f"the packed model has {logits.shape[-1]} tokens in its vocabulary, the original {wanted.shape[-1]}: "
                "they are not the same model"
            )
        labels = torch.tensor(list(ids[rows]))
        for chunk in range(0, len(logits), 64):  # float64 copies of 64 rows, not of all
            a, b = wanted[rows][chunk : chunk + 64].double(), logits[chunk : chunk + 64].double()
            difference = (a - b).abs()
            max_error = max(max_error, difference.max().item())
            if not b.isfinite().all():
                max_error = float("nan")
            total["square"] += difference.square().mean(-1).sum().item()
            total["spread"] += (a - a.mean(-1, keepdim=True)).square().mean(-1).sum().item()
            log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
            kl = (log_a.exp() * (log_a - log_b)).sum(-1)
            total["kl"] += kl.sum().item()
            kl_max = max(kl_max, kl.max().item())
            total["agree"] += (a.argmax(-1) == b.argmax(-1)).sum().item()
            following = labels[chunk + 1 : chunk + 1 + len(a)]
            picked = slice(0, len(following))
            total["nll_wanted"] -= log_a[picked].gather(1, following[:, None]).sum().item()
            total["nll_got"] -= log_b[picked].gather(1, following[:, None]).sum().item()
            count, predicted = count + len(a), predicted + len(following)
    return {
        "max_error": max_error,
        "relative_error": (total["square"] / total["spread"]) ** 0.5 if total["spread"] else total["square"] ** 0.5,
        "kl_mean": total["kl"] / count,
        "kl_max": kl_max,
        "top1_agreement": total["agree"] / count,
        "nll_reference": total["nll_wanted"] / max(predicted, 1),
        "nll_packed": total["nll_got"] / max(predicted, 1),
    }


def _coarsest(src: str | Path, dst: str | Path, dtype: torch.dtype) -> torch.dtype:
    """Return the least precise of the dtype to compute in and those to which the conversion rounded."""
    before, after = ({folder.dtype(name) for name in folder} for folder in (Checkpoint(src), Checkpoint(dst)))
    rounded = after - before | {dtype}
    return next((d for d in (torch.bfloat16, torch.float16) if d in rounded), torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
