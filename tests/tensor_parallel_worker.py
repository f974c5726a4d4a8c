"""One process of a tensor parallel run: load folders split over all processes, and report what came of each.

Usage: torchrun --nproc-per-node N tensor_parallel_worker.py OUT FOLDER...
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from packed_models import IDS, logits
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from bitinfer import BitinferConfig


def run(folder: Path, out: Path, size: int) -> None:
    """Write ``OUT/<name>.pt`` and the model saved again, or ``OUT/<name>-<rank>.txt`` if it was refused."""
    arguments: dict[str, Any] = {"distributed_config": DistributedConfig(tp_size=size)}
    if folder.name == "dense":
        arguments["quantization_config"] = BitinferConfig()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    except ValueError as error:
        (out / f"{folder.name}-{dist.get_rank()}.txt").write_text(str(error))
        return
    up = model.model.layers[0].mlp.up_proj.weight
    down = model.model.layers[0].mlp.down_proj
    result = {
        "logits": logits(model),
        "tokens": model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0),
        "up": tuple(up.to_local().shape),
        "down": tuple(down.weight.to_local().shape),
        "in_features": down.in_features,
    }
    if dist.get_rank() == 0:
        torch.save(result, out / f"{folder.name}.pt")
    model.save_pretrained(out / folder.name)
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for argument in sys.argv[2:]:
        run(Path(argument), Path(sys.argv[1]), dist.get_world_size())
    dist.destroy_process_group()
