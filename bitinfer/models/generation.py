"""The loop behind ``model.generate``: transformers prepares a call and we decode it, where we can."""

import threading
import warnings
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bitinfer.models.decoder import Decoder, obstacle
from bitinfer.models.sampling import Sampling, tokens_seen
from bitinfer.nn import BinaryLinear

Model = TypeVar("Model", bound=nn.Module)
LAG = 8  # steps that the device may be ahead of the host
_decoders: WeakKeyDictionary[nn.Module, Decoder] = WeakKeyDictionary()


class FusedGeneration:
    """What :func:`fuse` puts in front of a model's class."""

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        model: Any = self
        reason = "GPUs are synchronised" if synced_gpus else _beyond(model, input_ids, generation_config, model_kwargs)
        if reason is None and model not in _decoders:  # fuse() has looked at the others
            reason = obstacle(model)
        turn = _turns.setdefault(model, _Turn())
        if reason is None and turn.is_mine():
            reason = "it comes from within another call, whose cache is in use"
        if reason is not None:
            _leave_to_transformers(reason)
            return super()._sample(  # type: ignore[misc]
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
            )
        with turn:
            decoder = _decoders.get(model)
            if decoder is None:
                decoder = _decoders[model] = Decoder(model)
            padding = _padding(model_kwargs.get("attention_mask"))
            call = _Call(decoder, input_ids, padding, logits_processor, stopping_criteria, generation_config, streamer)
            ids = call.in_graphs() if call.fits_graphs() else call.step_by_step()
            if streamer is not None:
                streamer.end()
            return ids

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        _leave_to_transformers("it searches with beams")
        return super()._beam_search(*args, **kwargs)  # type: ignore[misc]

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        _leave_to_transformers("it is assisted")
        return super()._assisted_decoding(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # copies and pickles are of the plain model, whose class others can find
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (_plain(type(self)),), *reduced[2:])


def _new(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


class _Turn:
    """A lock that knows its owner: calls from several threads take turns, since a model has one cache."""

    def __init__(self) -> None:
        self._lock, self._owner = threading.Lock(), 0

    def is_mine(self) -> bool:
        return self._owner == threading.get_ident()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *error: object) -> None:
        self._owner = 0
        self._lock.release()


_turns: WeakKeyDictionary[nn.Module, _Turn] = WeakKeyDictionary()


def fuse(model: Model, *, head_bits: int | None = None, cache_bits: int | None = None) -> Model:
    """Have ``model.generate`` decode through bitinfer's own loop, and return the model.

    The loop holds keys and values in memory that is allocated once, reads the packed weights where they are, and on a
    GPU replays a whole step, sampling included, as one CUDA graph, without waiting for the host. Greedy decoding and
    sampling go through it, in batches padded on the left, with transformers' own streamers and stopping criteria; what
    it does not know (beams, returned scores, a cache that is handed in) transformers decodes as before, and a warning
    says so once. Calls from several threads take turns. ``forward``, ``state_dict`` and ``save_pretrained`` stay what
    they are; copies and pickles are of the plain model.

    Args:
        model: a causal model of transformers of the LLaMA or Qwen3 kind with packed layers, on one device.
        head_bits: 8 multiplies by a copy of the head whose rows are rounded to 8 bits, which in a small model is most
            of what a token reads; an approximation, which ``bitinfer verify --head-bits 8`` measures. On CPUs
            and NVIDIA GPUs, with the compiled kernels alone.
        cache_bits: 8 or 4 rounds keys and values, 32 numbers to a scale, which for a binary model are most of the
            memory at long contexts, and of what is read in large batches; an approximation, which ``bitinfer verify
            --cache-bits 8`` measures. On NVIDIA GPUs, with the compiled kernels alone.

    Raises:
        ValueError: it is of another kind, or has no packed layer, or cannot have such a head or cache; the message says
            what is in the way.
    """
    if isinstance(model, FusedGeneration):
        unfuse(model)
    reason = obstacle(model)
    if reason is None and not any(isinstance(m, BinaryLinear) for m in model.modules()):
        reason = "it has no packed layer: convert it, or bitinfer.replace_linear(model) first"
    if reason is not None:
        raise ValueError(f"fuse: this model cannot be fused: {reason}")
    decoder = Decoder(model, head_bits, cache_bits)
    if cache_bits is not None:
        decoder.reserve(1, 1)  # which says what is in the way
    _decoders[model] = decoder
    kind = type(model)
    model.__class__ = type(kind.__name__, (FusedGeneration, kind), {"__module__": kind.__module__})
    return model


def fuse_if_possible(model: Model) -> Model:
    """Do what :func:`fuse` does, and leave a model that it refuses as it is."""
    packed = any(isinstance(m, BinaryLinear) for m in model.modules())
    return fuse(model) if packed and obstacle(model) is None else model


def unfuse(model: Model) -> Model:
    """Undo :func:`fuse`, and free what its decoder holds."""
    if isinstance(model, FusedGeneration):
        model.__class__ = _plain(type(model))
        _decoders.pop(model, None)
    return model


def _plain(fused: type) -> type:
    return fused.__mro__[2]


@cache
def _leave_to_transformers(reason: str) -> None:
    """Say once for each reason why a call is not decoded here."""
    warnings.warn(f"transformers decodes this call itself, without bitinfer's loop: {reason}", stacklevel=5)


def _beyond(model: Any, ids: Tensor, config: Any, kwargs: dict[str, Any]) -> str | None:
    """Return what of a call the loop below does not do, None if it does all."""
    given = kwargs.get("cache", kwargs.get("past_key_values"))
    embeds = kwargs.get("inputs_embeds")
    asked = {
        "the model is in training mode": model.training,
        "use_cache is False": not config.use_cache,
        "return_dict_in_generate is set": config.return_dict_in_generate,
        "the model assists another": config.is_assistant,
        "it continues a cache that was handed in": given is not None and given.get_seq_length() > 0,
        "it starts from inputs_embeds": embeds is not None or ids.shape[1] == 0,
        "it has token_type_ids": kwargs.get("token_type_ids") is not None,
    }
    for reason, holds in asked.items():
        if holds:
            return reason
    mask = kwargs.get("attention_mask")
    if mask is not None:
        real = mask.bool()
        # padding on the left and nowhere else: zeros, then ones
        if mask.shape != ids.shape or not bool((real.cummax(1).values == real).all()) or not bool(real[:, -1].all()):
            return "attention_mask is not one of padding on the left alone"
    # all parameters would take milliseconds
    parts = (model.model.embed_tokens, model.model.layers[0], model.model.layers[-1], model.lm_head)
    devices = {str(next(part.parameters()).device) for part in parts}
    return None if len(devices) == 1 else f"it is spread over {', '.join(sorted(devices))}"


def _padding(mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    padding = (mask == 0).sum(1)
    return padding if bool(padding.any()) else None


class _Call:
    """One call of generate: prompts ``ids [B, T]``, and transformers' own objects."""

    def __init__(
        self,
        decoder: Decoder,
        ids: Tensor,
        padding: Tensor | None,
        processors: Any,
        criteria: Any,
        config: Any,
        streamer: Any,
    ) -> None:
        self.decoder, self.ids, self.padding, self.streamer = decoder, ids, padding, streamer
        self.processors, self.criteria = processors, criteria
        self.sample = bool(config.do_sample)
        self.pad = config._pad_token_tensor
        self.length = int(criteria.max_length or config.max_length)
        self.ends: Tensor | None = None
        for criterion in criteria:
            if hasattr(criterion, "eos_token_id"):
                self.ends = criterion.eos_token_id.to(ids.device)

    # where the host looks at each token

    def step_by_step(self) -> Tensor:
        """Decode with transformers' processors and criteria, whatever they are, and return prompts and answers."""
        ids = self.ids
        running = torch.ones(len(ids), dtype=torch.long, device=ids.device)
        self.decoder.reserve(len(ids), self.length)
        logits = self.decoder.prefill(ids, self.padding)
        while True:
            scores = self.processors(ids, logits.float())
            tokens = torch.multinomial(scores.softmax(-1), 1).squeeze(1) if self.sample else scores.argmax(-1)
            if self.ends is not None:
                tokens = tokens * running + self.pad.to(ids.device) * (1 - running)
            ids = torch.cat([ids, tokens.unsqueeze(1)], 1)
            if self.streamer is not None:
                self.streamer.put(tokens.cpu())
            running = running & ~self.criteria(ids, None)
            if not running.any():
                return ids
            logits = self.decoder.step(tokens, ids.shape[1] - 1, self.padding)

    # where the device runs ahead

    def fits_graphs(self) -> bool:
        """Return whether nothing but lengths and end tokens stops this call, and its sampling is known."""
        known = all(hasattr(c, "eos_token_id") or type(c).__name__ in ("MaxLengthCriteria",) for c in self.criteria)
        return self.ids.is_cuda and known and Sampling.of(self.processors, self.sample) is not None

    def in_graphs(self) -> Tensor:
        """Decode by replaying one graph per step; the host reads tokens up to LAG steps later."""
        sampling = Sampling.of(self.processors, self.sample)
        assert sampling is not None
        decoder, batch, prompt = self.decoder, len(self.ids), self.ids.shape[1]
        decoder.reserve(batch, self.length)
        logits = decoder.prefill(self.ids, self.padding)
        key = (decoder.cache, sampling, self.padding is None, None if self.ends is None else tuple(self.ends.tolist()))
        loop = decoder.loop
        if loop is None or loop.key != key:
            loop = decoder.loop = StepLoop(decoder, sampling, batch, logits.shape[1], key)
        loop.begin(logits, self.ids, self.padding, self.pad, self.processors)
        ends = set() if self.ends is None else set(self.ends.tolist())
        running = set(range(batch))
        out: list[Tensor] = []
        pending = deque([loop.read()])
        made = 1
        while pending:
            while len(pending) <= LAG and prompt + made < self.length:
                loop.step()
                pending.append(loop.read())
                made += 1
            tokens = pending.popleft()()
            out.append(tokens)
            if self.streamer is not None:
                self.streamer.put(tokens)
            if ends:
                running -= {i for i, token in enumerate(tokens.tolist()) if token in ends}
            if not running:
                break
        # one copy, at the end: each would wait for all steps under way
        return torch.cat([self.ids, torch.stack(out, 1).to(self.ids.device)], 1)


class StepLoop:
    """Steps of one token for a whole batch with nothing on the host: a CUDA graph where there is CUDA.

    Args:
        decoder: its cache is reserved.
        sampling: how tokens are chosen.
        batch, vocabulary: B and V.
        key: the cache, the sampling, whether there is no padding, and the tokens that end a sequence or None; a graph
            serves every call that has the same.
    """

    def __init__(self, decoder: Decoder, sampling: Sampling, batch: int, vocabulary: int, key: tuple[Any, ...]) -> None:
        self.decoder, self.sampling, self.key = decoder, sampling, key
        _, _, unpadded, ends = key
        device = decoder.device

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tokens, self.slot, self.pad = zeros(batch), zeros(1), zeros()
        self.finished = zeros(batch, dtype=torch.bool)
        self.padding = None if unpadded else zeros(batch)
        self.ends = None if ends is None else torch.tensor(ends, device=device)
        self.seen = zeros(batch, vocabulary, dtype=torch.bool) if sampling.repetition_penalty != 1 else None
        on_nvidia = device.type == "cuda" and hasattr(torch.ops.bitinfer_native, "choose_greedy")
        self.in_one_kernel = on_nvidia and not sampling.sample
        self.replay: Callable[[], None] = _Captured(self._step) if decoder.device.type == "cuda" else self._step
        self.landings = [_Landing(self.tokens) for _ in range(LAG + 1)] if device.type == "cuda" else []
        self.reads = 0

    def begin(self, logits: Tensor, ids: Tensor, padding: Tensor | None, pad: Tensor | None, processors: Any) -> None:
        """Choose the first tokens from the logits ``[B, V]`` behind the prompts ``ids [B, T]``."""
        self.slot.fill_(ids.shape[1])
        self.finished.zero_()
        if self.padding is not None and padding is not None:
            self.padding.copy_(padding)
        if pad is not None:
            self.pad.copy_(pad)
        if self.seen is not None:
            self.seen.copy_(tokens_seen(ids, self.seen.shape[1], processors))
        self._choose(logits)

    def step(self) -> None:
        """Run the tokens chosen last through the model and choose the next."""
        self.replay()

    def _step(self) -> None:
        logits = self.decoder.step_anywhere(self.tokens, self.slot, self.padding)
        if self.in_one_kernel:
            self._choose_greedy(logits, self.slot)
            return
        self.slot.add_(1)
        self._choose(logits)

    def _choose_greedy(self, logits: Tensor, slot: Tensor | None) -> None:
        """Do what :meth:`_choose` does without sampling, and advance ``slot``."""
        torch.ops.bitinfer_native.choose_greedy(
            logits,
            self.sampling.repetition_penalty,
            self.seen,
            self.finished,
            self.ends,
            self.pad,
            self.tokens,
            slot,
        )

    def _choose(self, logits: Tensor) -> None:
        if self.in_one_kernel:
            self._choose_greedy(logits, None)
            return
        tokens = self.sampling.choose(logits, self.seen)
        if self.ends is not None:
            tokens = torch.where(self.finished, self.pad, tokens)
            self.finished.logical_or_(torch.isin(tokens, self.ends))
        if self.seen is not None:
            self.seen.scatter_(1, tokens.unsqueeze(1), True)
        self.tokens.copy_(tokens)

    def read(self) -> Callable[[], Tensor]:
        """Have the tokens chosen last copied to the host, and return what waits for them: LAG + 1 may be under way."""
        if not self.landings:
            tokens = self.tokens.clone()
            return lambda: tokens
        self.reads += 1
        return self.landings[self.reads % len(self.landings)].start()


class _Landing:
    """Pinned memory for the tokens of one step, and an event behind their copy; allocating these takes time."""

    def __init__(self, tokens: Tensor) -> None:
        self.source, self.event = tokens, torch.cuda.Event()
        self.tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)

    def start(self) -> Callable[[], Tensor]:
        self.tokens.copy_(self.source, non_blocking=True)
        self.event.record()
        return self.wait

    def wait(self) -> Tensor:
        self.event.synchronize()
        return self.tokens.clone()


class _Captured:
    """A step that runs as it is once, which warms it up, and from then on as the CUDA graph of itself."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.step, self.warm = step, False
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if not self.warm:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.step()
            torch.cuda.current_stream().wait_stream(stream)
            self.warm = True
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records and does not run
                self.step()
        self.graph.replay()
