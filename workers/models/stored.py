"""Where a model's tensors are in its files: under other names, or as rows of fused ones.

load.py reads tensors by the names of ModelConfig.tensor_shapes; a file says what
it calls them: Hugging Face directories here, GGUF files in gguf_names.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .config import ModelConfig

_LAYERS = "model.layers."
_FUSED = {
    "phi3": {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    }
}
"""By family: projections that its files keep as one, and what they are made of, row upon row."""

_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""What the files of Mixtral call the projections of an expert."""

_GEMMA = {
    "attention_output_norm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
"""What the files of Gemma call the norms of a layer."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor, or `rows` of its rows from `first` on; shape: of the whole one in the file.

    plus: what the file leaves out of every number.
    """

    name: str
    shape: tuple[int, ...]
    first: int = 0
    rows: int | None = None
    plus: float = 0.0


def own_tensors(config: ModelConfig) -> dict[str, Stored]:
    """The tensors of config.tensor_shapes() under their own names, fused as the family's are."""
    return fuse(config.tensor_shapes(), _FUSED.get(config.family, {}))


def hf_tensors(config: ModelConfig) -> dict[str, Stored]:
    """Where a Hugging Face directory keeps the tensors of config.tensor_shapes()."""
    tensors = own_tensors(config)
    if config.family == "mixtral":
        for name, stored in tensors.items():
            tensors[name] = replace(stored, name=_mixtral_name(name))
    elif config.family == "gemma3_text":
        sees_images = config.architecture == "Gemma3ForConditionalGeneration"
        prefix = "language_model." if sees_images else ""
        for name, stored in tensors.items():
            plus = 1.0 if name.endswith("norm.weight") else 0.0
            tensors[name] = replace(stored, name=prefix + _gemma_name(name), plus=plus)
    return tensors


def _mixtral_name(name: str) -> str:
    """ "mlp.experts.0.up_proj.weight" -> "block_sparse_moe.experts.0.w3.weight"."""
    block, module, kind = split_name(name)
    parent, _, projection = module.rpartition(".")
    projection = _MIXTRAL.get(projection, projection) if parent.startswith("mlp.") else projection
    module = f"{parent}.{projection}" if parent else projection
    return f"{block}{module.replace('mlp.', 'block_sparse_moe.')}.{kind}"


def _gemma_name(name: str) -> str:
    block, module, kind = split_name(name)
    return f"{block}{_GEMMA.get(module, module)}.{kind}"


def fuse(
    shapes: Mapping[str, tuple[int, ...]], fused: Mapping[str, tuple[str, ...]]
) -> dict[str, Stored]:
    """All tensors under their own names, but those that are parts of fused ones."""
    stored = {name: Stored(name, shape) for name, shape in shapes.items()}
    whole_of = {part: whole for whole, parts in fused.items() for part in parts}
    for name, shape in shapes.items():
        block, module, kind = split_name(name)
        whole = whole_of.get(module)
        if whole is not None:
            rows = [shapes[f"{block}{part}.{kind}"][0] for part in fused[whole]]
            at = fused[whole].index(module)
            whole_shape = (sum(rows), *shape[1:])
            stored[name] = Stored(f"{block}{whole}.{kind}", whole_shape, sum(rows[:at]), rows[at])
    return stored


def split_name(name: str) -> tuple[str, str, str]:
    """ "model.layers.0.mlp.up_proj.weight" -> ("model.layers.0.", "mlp.up_proj", "weight")."""
    block = ""
    if name.startswith(_LAYERS):
        layer, name = name.removeprefix(_LAYERS).split(".", 1)
        block = f"{_LAYERS}{layer}."
    module, kind = name.rsplit(".", 1)
    return block, module, kind
