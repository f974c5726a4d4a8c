"""Tiny model folders in every source format, with a tokenizer, for tests that go from a checkpoint to text."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "The lamp is lit at dusk. The wind comes from the west, and the sea is calm. " * 12
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
)
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_tokenizer(folder: Path, chat: bool = False) -> int:
    """Write a byte-level tokenizer trained on TEXT; return the size of its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return len(fast)


def dense(folder: Path, tokenizer: bool = True, chat: bool = False) -> Path:
    """Write a dense Llama with random weights in float32."""
    folder.mkdir(parents=True)
    vocabulary = save_tokenizer(folder, chat) if tokenizer else 300
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, std=0.2)  # far from zero: logits that differ, and no ties
    model.save_pretrained(folder)
    return folder


def fbi(folder: Path, tokenizer: bool = True) -> Path:
    """Write an FBI-LLM checkpoint: latent weights with ``wscale`` and ``wbias``, in a pickle."""
    state = _state_of(dense(folder, tokenizer))
    for name in [key for key in state if key.split(".")[-2] in LINEARS]:
        columns = state[name].shape[1]
        state[name.replace(".weight", ".wscale")] = torch.randn(1, columns) * 0.2
        state[name.replace(".weight", ".wbias")] = torch.randn(1, columns) * 0.02
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def onebit(folder: Path) -> Path:
    """Write a packed OneBit checkpoint: int8 signs, ``weight_scale`` and ``input_factor``, under ``bitllama``."""
    state = _state_of(dense(folder))
    for name in [key for key in state if key.split(".")[-2] in LINEARS]:
        weight = state[name]
        bits = (weight < 0).to(torch.uint8).unflatten(1, (-1, 8)) << torch.arange(8, dtype=torch.uint8)
        state[name] = bits.sum(-1, dtype=torch.uint8).view(torch.int8)
        state[name.replace(".weight", ".weight_scale")] = torch.rand(weight.shape[0]) + 0.5
        state[name.replace(".weight", ".input_factor")] = torch.rand(weight.shape[1]) + 0.5
    torch.save(state, folder / "pytorch_model.bin")
    config = folder / "config.json"
    text = config.read_text().replace('"model_type": "llama"', '"model_type": "bitllama"')
    config.write_text(text.replace("LlamaForCausalLM", "BitLlamaForCausalLMInf"))
    return folder


def _state_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return state
