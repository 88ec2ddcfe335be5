"""What is Gemma 3's own in a GGUF file's metadata.

Called by gguf_config.py.  The format leaves to the reader what all models of a
size have in common; where it does, the values are those of llama.cpp.
"""

from __future__ import annotations

from typing import Any

from .config import RopeConfig
from .gguf_fields import Fields

_PERIOD = 6
_LOCAL_THETA = 10000.0
_LAYERS_OF_27B = 62


def gemma3_fields(
    fields: Fields, layers: int, hidden: int, heads: int, head_dim: int
) -> dict[str, Any]:
    """The fields of a ModelConfig that only Gemma 3 has, and its windows.

    The norms' weights have their 1 already.  Raises ModelError for settings that
    the layers do not have.
    """
    if fields.get("final_logit_softcapping", 0.0):
        raise fields.error("final_logit_softcapping", "is not supported")
    is_27b = layers == _LAYERS_OF_27B
    return {
        "query_pre_attn_scalar": float(hidden // heads if is_27b else head_dim),
        "activation": "gelu",
        "embedding_scale": hidden**0.5,
        "output_norms": True,
        "full_layers": _full_layers(fields, layers),
        "local_rope": RopeConfig(theta=fields.number("rope.freq_base_swa", _LOCAL_THETA)),
    }


def _full_layers(fields: Fields, layers: int) -> frozenset[int]:
    """Layers that see everything; a file without a window has no others."""
    key = "attention.sliding_window_pattern"
    if not fields.get("attention.sliding_window", 0):
        return frozenset()
    if isinstance(is_sliding := fields.get(key), list):
        if len(is_sliding) != layers:
            raise fields.error(key, f"{layers} entries are needed, one for each layer")
        return frozenset(layer for layer in range(layers) if not is_sliding[layer])
    period = fields.count(key, _PERIOD)
    return frozenset(range(period - 1, layers, period))
