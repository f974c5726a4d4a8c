"""Tokens per second of whole models: packed ones beside the same model dense, under transformers and under our loop."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitinfer.bench import llama_cpp
from bitinfer.bench.machine import describe, describe_gpu
from bitinfer.models import fuse, unfuse
from bitinfer.nn import BinaryLinear
from bitinfer.testing.checkpoints import SHAPES, llama_config
from bitinfer.weight import WeightLayout

FBI = WeightLayout(tensors=("in_scale", "in_shift"))
NEW_TOKENS = 64  # of a decoding run
ROUNDS = 3
Progress = Callable[[int, int, str], None]


@dataclass
class ModelMeasurement:
    """One way to run one model.

    Attributes:
        model: the weights: ``packed``, ``dense``, or ``llama.cpp`` with its type.
        loop: what decodes: ``fused`` is ours, ``fused, 8-bit head`` the same with ``head_bits=8``, ``fused, 8-bit
            cache`` with ``cache_bits=8``, ``transformers`` its own, ``transformers compiled`` that with a static cache
            and ``torch.compile``, ``llama.cpp`` its own.
        activations: ``fp16``, ``bf16``, ``fp32`` or ``int8``, ``int4``, ``int2``, ``int1``.
        batch, context: sequences, and tokens of each prompt.
        decode_tokens_per_second: of all sequences together, after the first token; None where only prompts were run.
        prefill_tokens_per_second: prompt tokens over the time to the first token.
        seconds_to_first_token: from the call to the first token.
        peak_bytes: most memory of the GPU that torch held; None on a CPU.
        weight_bytes: of the model's parameters.
    """

    model: str
    loop: str
    activations: str
    batch: int
    context: int
    decode_tokens_per_second: float | None
    prefill_tokens_per_second: float
    seconds_to_first_token: float
    peak_bytes: int | None
    weight_bytes: int


@dataclass
class ModelReport:
    """All measurements of a run of :func:`bench_model`, medians of ROUNDS rounds."""

    machine: dict[str, Any]
    name: str
    measurements: list[ModelMeasurement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return asdict(self)


def bench_model(
    what: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    act_bits: Sequence[int | None] = (None, 8),
    batches: Sequence[int] = (1, 8),
    prompts: Sequence[int] = (128, 512),
    context: int = 512,
    new_tokens: int = NEW_TOKENS,
    head_bits: int | None = None,
    cache_bits: int | None = None,
    dense: bool = True,
    compiled: bool = False,
    peers: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ModelReport:
    """Time prompts and decoding of a model, packed and dense, under transformers and fused.

    Decoding is timed by the difference of a call that writes ``new_tokens`` more and one that writes a single token.

    Args:
        what: 130m, 1.3b, 7b or 13b for FBI-LLM's shapes with random weights, or a packed folder.
        device: ``cpu`` or ``cuda``.
        dtype: of activations, scales, caches and dense weights.
        act_bits: the packed model's activation formats; None for floating point.
        batches: sequences at a time, for decoding behind prompts of ``context`` tokens.
        prompts: lengths of single prompts whose prefill is timed.
        context: see above.
        new_tokens: written by each sequence.
        head_bits: 8 also times the fused loop with the rows of the head rounded to 8 bits: see :func:`bitinfer.fuse`.
        cache_bits: 8 or 4 also times the fused loop with keys and values rounded to so many bits.
        dense: whether to run the dense model too.
        compiled: whether to run it with a static cache and ``torch.compile`` as well; that takes minutes.
        peers: whether to run llama.cpp, where it is installed, on a CPU and for a shape.
        threads: of torch and the kernels.
        progress: called with (done, total, what is next).

    Raises:
        ValueError: ``what`` is neither a shape nor a folder.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if what not in SHAPES and not Path(what).is_dir():
        raise ValueError(f"bench model: expected {', '.join(SHAPES)} or a packed folder, got {what!r}")
    machine: dict[str, Any] = describe_gpu() if device == "cuda" else dict(describe())
    report = ModelReport({**machine, "device": device}, what)
    plan = [(batch, context, True) for batch in batches] + [(1, length, False) for length in prompts]
    kinds = ["packed", "dense"] if dense else ["packed"]
    total, done = len(kinds) * len(plan), 0
    for kind in kinds:
        model = packed_model(what, device, dtype) if kind == "packed" else dense_model(what, device, dtype)
        for batch, length, decodes in plan:
            if progress is not None:
                progress(done, total, f"{kind}, {batch} x {length}")
            done += 1
            loops = list(_loops(model, kind, act_bits, dtype, head_bits, cache_bits, compiled))
            if length + new_tokens > model.config.max_position_embeddings:
                report.notes.append(f"prompts of {length} tokens are longer than the model reads: left out")
                continue
            found = [_measure(model, loop, batch, length, new_tokens if decodes else 0) for loop in loops]
            report.measurements += found
        del model
        gc.collect()
    if device == "cpu" and what in SHAPES and peers:
        _add_llama_cpp(report, what, plan, new_tokens, progress)
    return report


def _add_llama_cpp(
    report: ModelReport, shape: str, plan: list[tuple[int, int, bool]], new_tokens: int, progress: Progress | None
) -> None:
    reason = llama_cpp.missing()
    if reason is not None:
        report.notes.append(reason)
        return
    for done, kind in enumerate(llama_cpp.TYPES):
        if progress is not None:
            progress(done, len(llama_cpp.TYPES), f"llama.cpp, {kind}")
        try:
            for (batch, length, _), speeds, size in llama_cpp.measure(shape, kind, plan, new_tokens):
                about = (f"llama.cpp {kind}", "llama.cpp", "int8", batch, length)
                report.measurements.append(ModelMeasurement(*about, *speeds, None, size))
        except RuntimeError as error:
            report.notes.append(f"{kind}: {error}")


@dataclass
class _Loop:
    """A way to run a model: ``prepare`` puts it into that state."""

    model: str
    loop: str
    activations: str
    prepare: Callable[[Any], None]
    options: dict[str, Any] = field(default_factory=dict)


def _loops(
    model: Any,
    kind: str,
    act_bits: Sequence[int | None],
    dtype: torch.dtype,
    head_bits: int | None,
    cache_bits: int | None,
    compiled: bool,
) -> Iterator[_Loop]:
    floats = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    if kind == "dense":
        yield _Loop(kind, "transformers", floats, lambda model: None)
        if compiled:
            yield _Loop(kind, "transformers compiled", floats, lambda m: None, {"cache_implementation": "static"})
        return
    for bits in act_bits:

        def quantise(model: Any, bits: int | None = bits) -> None:
            for module in model.modules():
                if isinstance(module, BinaryLinear):
                    module.act_bits = bits

        def prepare_plain(model: Any, quantise: Callable[[Any], None] = quantise) -> None:
            unfuse(model)  # and with it what was captured for other activations
            quantise(model)

        def prepare_fused(model: Any, plain: Callable[[Any], None] = prepare_plain, **rounded: int) -> None:
            plain(model)
            fuse(model, **rounded)

        name = floats if bits is None else f"int{bits}"
        yield _Loop(kind, "fused", name, prepare_fused)
        if head_bits is not None:
            yield _Loop(kind, f"fused, {head_bits}-bit head", name, partial(prepare_fused, head_bits=head_bits))
        if cache_bits is not None:
            rounded = partial(prepare_fused, cache_bits=cache_bits)
            yield _Loop(kind, f"fused, {cache_bits}-bit cache", name, rounded)
        yield _Loop(kind, "transformers", name, prepare_plain)


def _measure(model: Any, loop: _Loop, batch: int, length: int, new_tokens: int) -> ModelMeasurement:
    loop.prepare(model)
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    ids = torch.randint(3, model.config.vocab_size, (batch, length), device=device)
    mask = torch.ones_like(ids)

    def seconds(count: int) -> float:
        options = {"max_new_tokens": count, "min_new_tokens": None, "do_sample": False, "eos_token_id": None}
        begun = time.perf_counter()
        model.generate(ids, attention_mask=mask, pad_token_id=0, repetition_penalty=1.0, **options, **loop.options)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds(1 + new_tokens)  # warms up, and captures what there is to capture
    first, more = [], []
    for _ in range(ROUNDS):
        first.append(seconds(1))
        if new_tokens:
            more.append(seconds(1 + new_tokens))
    to_first = statistics.median(first)
    decode = None
    if new_tokens:
        decode = batch * new_tokens / max(statistics.median(more) - to_first, 1e-9)
    return ModelMeasurement(
        loop.model,
        loop.loop,
        loop.activations,
        batch,
        length,
        decode,
        batch * length / to_first,
        to_first,
        torch.cuda.max_memory_allocated() if on_gpu else None,
        sum(p.numel() * p.element_size() for p in model.parameters()),
    )


def packed_model(what: str, device: str, dtype: torch.dtype) -> Any:
    """Return a packed folder's model, or one of FBI-LLM's shape with random signs and scales."""
    if what not in SHAPES:
        from bitinfer.load import load

        return load(what, dtype=dtype)[0].to(device)
    model = _skeleton(what)
    generator = torch.Generator(device).manual_seed(0)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            layer = BinaryLinear(
                linear.in_features, linear.out_features, bias=False, layout=FBI, device=device, dtype=dtype
            )
            words = layer.weight.detach().view(torch.int32)
            words.random_(-(1 << 31), 1 << 31, generator=generator)
            for scale, size in ((layer.in_scale, linear.in_features**-0.5), (layer.in_shift, 1e-4)):
                assert scale is not None
                scale.data.normal_(0, size, generator=generator)
            model.set_submodule(name, layer)
    return _filled(model, device, dtype, generator)


def dense_model(what: str, device: str, dtype: torch.dtype) -> Any:
    """Return the same model dense, dequantised or with random weights."""
    if what not in SHAPES:
        from bitinfer.formats import FORMATS
        from bitinfer.verify import load_reference

        return load_reference(what, FORMATS["packed"]).to(dtype).to(device)
    return _filled(_skeleton(what), device, dtype, torch.Generator(device).manual_seed(0))


def _skeleton(shape: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**llama_config(shape))).eval()


def _filled(model: Any, device: str, dtype: torch.dtype, generator: torch.Generator) -> Any:
    """Give every parameter that is still on the meta device random values, norms ones."""
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            values = torch.ones(parameter.shape, dtype=dtype, device=device)
            if parameter.dim() > 1:
                values.normal_(0, 0.02, generator=generator)
            module = model.get_submodule(name.rpartition(".")[0])
            setattr(module, name.rpartition(".")[2], nn.Parameter(values, requires_grad=False))
    rope = model.model.rotary_emb
    model.model.rotary_emb = type(rope)(model.config).to(device)
    return model
