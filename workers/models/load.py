"""The entrances to models: `read_config`, and `load_model` or `load_rank` for weights.

Called by the fork server, which has one thread and keeps it: nothing here
starts any.  For a GPU each worker calls `load_rank` for itself, and there kernels
may (`Kernels.loading`).  PyTorch is imported with the weights only, because the
`sim` device needs a model's config and no more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .config import ModelConfig, ModelError
from .gguf_config import read_gguf_config
from .gguf_names import gguf_tensors
from .hf_config import read_hf_config
from .stored import Stored, fuse, hf_tensors

if TYPE_CHECKING:
    import torch

    from ..kernels.interface import Kernels
    from .llama import Model
    from .weights import WeightSource

_PROGRESS_INTERVAL_S = 0.5


def read_config(path: str | Path) -> ModelConfig:
    """The config of a Hugging Face directory, or of a GGUF file whatever its name.

    Raises ModelError when there is no model at `path` that the layers can run.
    """
    path = Path(path)
    if path.is_file():
        return read_gguf_config(path)
    if not path.is_dir():
        raise ModelError(f"{path}: no such file or directory; give a model directory or GGUF file")
    if not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        hint = f"; to run a GGUF file, name it: {files[0]}" if files else ""
        raise ModelError(f"{path}: is no model directory: it has no config.json{hint}")
    return read_hf_config(path)


def load_model(
    path: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    load_format: str,
    tp: int,
    kernels: Kernels,
    progress: Callable[[str], object],
) -> list[Model]:
    """One Model for each of `tp` ranks, in their order; weights sharded and packed by `kernels`.

    load_format: "auto" reads the files at `path`; "dummy" makes random weights
    and reads none.  progress gets a line now and then.  With tp > 1 the models
    need their communicators set before they run.  Raises ModelError when files
    are missing, damaged or do not fit `config`, or `tp` does not divide it.
    """
    return _load(Path(path), config, dtype, load_format, tp, range(tp), kernels, progress, 1)


def load_rank(
    path: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    load_format: str,
    tp: int,
    rank: int,
    kernels: Kernels,
    progress: Callable[[str], object],
    threads: int = 1,
) -> Model:
    """As load_model, but one rank's Model alone: on a GPU each rank loads its own share.

    threads: to copy with meanwhile.
    """
    ranks = range(rank, rank + 1)
    (model,) = _load(Path(path), config, dtype, load_format, tp, ranks, kernels, progress, threads)
    return model


def _load(
    path: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    load_format: str,
    tp: int,
    ranks: Sequence[int],
    kernels: Kernels,
    progress: Callable[[str], object],
    threads: int,
) -> list[Model]:
    from ..layers.rank import Rank
    from ..layers.rope import rope_table
    from .llama import Model
    from .weights import LoadingWeights, check_source

    check_degree(config, tp)
    source, tensors = _source(path, config, load_format, kernels.device)
    check_source(source, tensors)
    weights = LoadingWeights(source, tensors, dtype)
    ropes = {
        rope: rope_table(rope, config.head_dim, config.context_len).to(kernels.device)
        for rope in {config.rope_of(layer) for layer in range(config.num_layers)}
    }
    with kernels.loading(threads):
        models = [Model(config, weights, ropes, Rank(index, tp, kernels)) for index in ranks]
        weights.forget()
        said = time.monotonic()
        for layer in range(config.num_layers):
            if time.monotonic() - said >= _PROGRESS_INTERVAL_S:
                said = time.monotonic()
                progress(f"loading the weights: layer {layer} of {config.num_layers}")
            for model in models:
                model.add_layer(weights.at(f"model.layers.{layer}"))
            weights.forget()
    return models


def check_degree(config: ModelConfig, tp: int) -> None:
    degrees = config.tp_degrees()
    if tp not in degrees:
        mlps = ", ".join(f"{kind} of {size}" for kind, size in config.mlp_sizes().items())
        raise ModelError(
            f"{config.architecture} does not divide into {tp} ranks: it has {config.num_heads} "
            f"heads, {config.num_kv_heads} KV heads, {mlps} and a vocabulary of "
            f"{config.vocab_size}; degrees that divide all of them: "
            f"{', '.join(map(str, degrees))}"
        )


def _source(
    path: Path, config: ModelConfig, load_format: str, device: torch.device
) -> tuple[WeightSource, dict[str, Stored]]:
    """What to read from, and where it has each of the model's tensors."""
    if load_format == "dummy":
        from .dummy_weights import DummyWeights

        return DummyWeights(config, device=device), fuse(config.tensor_shapes(), {})
    if load_format != "auto":
        raise ModelError(f"load_format {load_format!r} is unknown; it is 'auto' or 'dummy'")
    if path.is_file():
        from .gguf_weights import GGUFWeights

        return GGUFWeights(path, config), gguf_tensors(config)
    from .safetensors_weights import SafetensorsWeights

    return SafetensorsWeights(path), hf_tensors(config)
