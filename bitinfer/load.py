"""load: open a packed folder as a transformers model with its tokenizer."""

import copy
import re
from pathlib import Path
from typing import Any

import torch

from bitinfer import huge_pages
from bitinfer.checkpoint import Checkpoint
from bitinfer.embedded import embedded_model
from bitinfer.errors import FormatError
from bitinfer.formats import detect
from bitinfer.formats.packed import QUANT_METHOD
from bitinfer.nn import BinaryLinear

STORED = "config"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_ARGUMENTS = (
    "revision",
    "token",
    "cache_dir",
    "force_download",
    "local_files_only",
    "subfolder",
    "trust_remote_code",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
# what transformers makes of these folders when it is called directly
TRAPS = {
    "fbi_llm": ", from which transformers alone builds a wrong model: it drops wscale and wbias",
    "onebit": ", which transformers alone cannot build, or builds wrong without the scales and norms of its layers",
}


def load(
    path: str | Path | None = None,
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
        path: a folder that ``bitinfer convert`` or ``save_pretrained`` wrote, or the name of such a model on the Hub;
            None for the small model that comes with bitinfer.
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

    path = embedded_model() if path is None else path
    folder = Path(path).expanduser()
    is_local = folder.is_dir()
    if is_local:
        path = folder
        _check_folder(folder)
    elif not HUB_NAME.fullmatch(str(path)) or folder.exists():
        raise FormatError(f"{path}: expected a model folder, got {'a file' if folder.exists() else 'no such folder'}")
    where: dict[str, Any] = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    if is_local:
        where["local_files_only"] = True
    config = copy.deepcopy(kwargs.pop("config", None)) or transformers.AutoConfig.from_pretrained(path, **where)
    stored = getattr(config, "quantization_config", None)
    stored = dict(stored) if stored is not None else {}
    if stored.get("quant_method") != QUANT_METHOD:
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
    huge_pages.move(module.weight for module in model.modules() if isinstance(module, BinaryLinear))
    return model, _tokenizer(path, folder if is_local else None, where)


def _check_folder(folder: Path) -> None:
    """Refuse a folder that is not packed, and say what it is."""
    checkpoint = Checkpoint(folder)
    advice = f"load() opens packed folders; run: bitinfer convert {folder} DST, and load DST"
    try:
        name = detect(checkpoint).name
    except FormatError as error:
        raise FormatError(f"{error}; {advice}") from None
    finally:
        checkpoint.close()
    if name != "packed":
        raise FormatError(f"{folder}: an unconverted {name} checkpoint{TRAPS.get(name, '')}; {advice}")


def _tokenizer(path: str | Path, folder: Path | None, where: dict[str, Any]) -> Any:
    """Return the tokenizer, or None where there are no files for one."""
    import transformers

    if folder is not None and not any((folder / mark).is_file() for mark in TOKENIZER_FILES):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(path, **where)
    except Exception as error:  # the libraries under it raise all kinds
        if folder is not None:
            raise FormatError(f"{folder}: the tokenizer does not load ({error}); copy its files again") from error
        if isinstance(error, (OSError, ValueError)):
            return None
        raise
