"""A checkpoint of random weights, for benches of how it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from albireo.workers.models.dummy_weights import DummyWeights
from albireo.workers.models.load import read_config
from albireo.workers.models.stored import hf_tensors

_SHARD_BYTES = 4 << 30


def write_checkpoint(directory: Path) -> int:
    """Beside the config.json in `directory`: bfloat16 safetensors shards and their index, under the
    names of a Hugging Face directory.  Returns their bytes."""
    config = read_config(directory)
    stored = {each.name: each.shape for each in hf_tensors(config).values()}
    weights = DummyWeights(config, shapes=stored)
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    size = total = written = 0

    def write() -> None:
        nonlocal written
        written += 1
        name = f"model-{written:05}.safetensors"
        save_file(shard, directory / name, {"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for name in stored:
        tensor = weights.tensor(name, torch.bfloat16)
        if shard and size + tensor.nbytes > _SHARD_BYTES:
            write()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    write()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total
