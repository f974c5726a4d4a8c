"""What surrounds a call of generate on a fused model: threads, interruptions, copies, calls that it leaves alone."""

import copy
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
from packed_models import llama, pack
from transformers.generation.streamers import BaseStreamer

from bitinfer import WeightLayout
from bitinfer.models import fuse
from bitinfer.models import generation as loop

OPTIONS: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def model() -> Any:
    loop._leave_to_transformers.cache_clear()
    return pack(llama(), WeightLayout(tensors=("in_scale", "in_shift")))


def prompt(seed: int) -> torch.Tensor:
    return torch.randint(3, 80, (1, 7), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**OPTIONS, **options})


def test_threads_take_turns(model):
    prompts = [prompt(seed) for seed in range(4)]
    expected = [generate(model, ids) for ids in prompts]
    assert not torch.equal(expected[0][:, 7:], expected[1][:, 7:])
    fuse(model)
    answers: list[Any] = [None] * len(prompts)

    def run(i: int) -> None:
        answers[i] = generate(model, prompts[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(answer, ids) for answer, ids in zip(answers, expected, strict=True))


class Streamer(BaseStreamer):
    """Calls a function at the third token."""

    def __init__(self, at_third: Any) -> None:
        self.seen, self.at_third = 0, at_third

    def put(self, value: torch.Tensor) -> None:
        self.seen += 1
        if self.seen == 3:
            self.at_third()

    def end(self) -> None:
        pass


@pytest.mark.parametrize("static", [False, True])
def test_an_interrupted_stream_leaves_the_model_usable(model, static, monkeypatch):
    monkeypatch.setattr(loop._Call, "fits_graphs", lambda call: static)
    expected = generate(model, prompt(1))

    def stop() -> None:
        raise KeyboardInterrupt

    fuse(model)
    with pytest.raises(KeyboardInterrupt):
        generate(model, prompt(0), streamer=Streamer(stop))
    assert torch.equal(generate(model, prompt(1)), expected)


def test_a_call_from_within_a_call(model):
    outer, inner = generate(model, prompt(0)), generate(model, prompt(1))
    fuse(model)
    answers: list[torch.Tensor] = []
    with pytest.warns(UserWarning, match="from within another call"):
        got = generate(model, prompt(0), streamer=Streamer(lambda: answers.append(generate(model, prompt(1)))))
    assert torch.equal(got, outer) and torch.equal(answers[0], inner)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_copies_are_plain_models(model, copied):
    kind, expected = type(model), generate(model, prompt(0))
    again = copied(fuse(model))
    assert type(again) is kind and isinstance(model, loop.FusedGeneration)
    assert torch.equal(generate(again, prompt(0)), expected)
    assert torch.equal(generate(fuse(again), prompt(0)), expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "it searches with beams"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate is set"),
        ({"use_cache": False}, "use_cache is False"),
        ({"prompt_lookup_num_tokens": 3}, "it is assisted"),
    ],
    ids=str,
)
def test_a_call_that_goes_to_transformers_says_so_once(model, options, reason):
    fuse(model)
    with pytest.warns(UserWarning, match=f"transformers decodes this call itself.*{reason}"):
        generate(model, prompt(0), **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="transformers decodes")
        generate(model, prompt(0), **options)
        generate(model, prompt(0))
