"""load: open a packed folder as a transformers model with its tokenizer."""

from pathlib import Path
from typing import Any

import torch

from bitinfer.checkpoint import Checkpoint
from bitinfer.errors import FormatError
from bitinfer.formats import detect
from bitinfer.formats.packed import quantization

STORED = "config"
TOKENIZER_MARKS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    act_bits: int | str | None = STORED,
    act_block: int | str = STORED,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Load a packed model and its tokenizer; a local folder needs no network.

    It is ``AutoModelForCausalLM.from_pretrained`` behind a check that the folder is a packed one: transformers alone
    builds a model from an unconverted FBI-LLM or OneBit folder too, and its answers are wrong.

    Args:
        path: a folder that ``bitinfer convert`` or ``save_pretrained`` wrote, or the name of such a model on the Hub.
        dtype: of the scales and the dense layers: float32, float16, bfloat16, or "auto" for that of the folder.
        device_map: as transformers takes it; None for the CPU.
        act_bits, act_block: see :class:`bitinfer.BinaryLinear`; "config" for what the folder says.
        **kwargs: passed to ``from_pretrained``.

    Returns:
        The model in evaluation mode, and the tokenizer, or None where the folder has none.

    Raises:
        FormatError: not a packed folder, or a damaged one. The message says what it is and what to do.
        ValueError: ``act_bits`` or ``act_block`` is not one that there is.
    """
    import transformers

    from bitinfer.integrations.transformers import BitinferConfig

    folder = Path(path)
    is_local = folder.is_dir()
    if is_local:
        _check_folder(folder)
    elif folder.exists() or folder.is_absolute() or len(folder.parts) > 2 or str(path).startswith((".", "~")):
        raise FormatError(f"{path}: expected a model folder, but there is {'a file' if folder.exists() else 'none'}")
    where: dict[str, Any] = {k: kwargs[k] for k in HUB_ARGUMENTS if k in kwargs}
    if is_local:
        where["local_files_only"] = True
    config = kwargs.pop("config", None) or transformers.AutoConfig.from_pretrained(path, **where)
    stored = getattr(config, "quantization_config", None)
    if quantization({"quantization_config": stored}).get("quant_method") != "bitinfer":
        raise FormatError(
            f"{path}: not packed by bitinfer; download the model, pack it and load the result: "
            f"hf download {path} --local-dir SRC; bitinfer convert SRC DST"
        )
    given = {k: v for k, v in (("act_bits", act_bits), ("act_block", act_block)) if v != STORED}
    # from here on the configuration says it, and transformers has nothing to merge and to warn of
    config.quantization_config = BitinferConfig(**{**stored, **given}).to_dict()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=dtype, device_map=device_map, **{**kwargs, **where}
    )
    return model, _tokenizer(path, folder if is_local else None, where)


HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only", "subfolder", "trust_remote_code")


def _check_folder(folder: Path) -> None:
    """Refuse a folder that is not packed, and say what it is."""
    checkpoint = Checkpoint(folder)
    name = detect(checkpoint).name
    checkpoint.close()
    if name == "packed":
        return
    trap = {
        "fbi_llm": "; transformers alone would load the latent weights, drop wscale and wbias and build a wrong model",
        "onebit": "; transformers alone has no such model, or builds a wrong one without input_factor and weight_scale",
    }.get(name, "")
    raise FormatError(
        f"{folder}: an unconverted {name} checkpoint{trap}; run: bitinfer convert {folder} DST, and load DST"
    )


def _tokenizer(path: str | Path, folder: Path | None, where: dict[str, Any]) -> Any:
    """Return the tokenizer, or None where there are no files for one."""
    import transformers

    if folder is not None and not any((folder / mark).is_file() for mark in TOKENIZER_MARKS):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(path, **where)
    except (OSError, ValueError):
        if folder is not None:
            raise  # the files are there, and damaged
        return None
