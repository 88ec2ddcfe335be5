"""What is Gemma 3's own in a Hugging Face config.json.

Called by hf_config.py.  Its files lean on transformers' defaults, and those of
checkpoints that also see images keep the language model below `text_config`;
images themselves are not supported.
"""

from __future__ import annotations

from typing import Any

from .config import RopeConfig
from .hf_rope import given_rope, rope_config
from .hf_settings import Settings

FAMILY = "gemma3_text"

_THETA, _LOCAL_THETA = 1000000.0, 10000.0
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_OF_THE_WHOLE = (
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "quantization_config",
    "tie_word_embeddings",
)
"""Keys that stand beside `text_config`."""


def gemma3_settings(settings: Settings) -> Settings:
    """The language model's settings, with defaults where there are none and a kind for each layer.

    Raises ModelError for settings that the layers do not have.
    """
    given = settings.values
    if isinstance(given.get("text_config"), dict):
        whole = {key: given[key] for key in _OF_THE_WHOLE if given.get(key) is not None}
        given = {**given["text_config"], **whole}
    text = Settings(settings.path, {**_DEFAULTS, **given})
    if text.get("layer_types") is None:
        period = text.count("sliding_window_pattern")
        kinds = [
            "sliding_attention" if (layer + 1) % period else "full_attention"
            for layer in range(text.count("num_hidden_layers"))
        ]
        text = Settings(settings.path, {**text.values, "layer_types": kinds})
    _refuse_unsupported(text)
    return text


def gemma3_fields(settings: Settings, head_dim: int) -> dict[str, Any]:
    """The fields of a ModelConfig that only Gemma 3 has; `settings` as gemma3_settings gives them.

    Rows of the embedding are scaled so that they are of the residual stream's size.
    """
    rope, local_rope = _ropes(settings, head_dim)
    return {
        "rope": rope,
        "local_rope": local_rope,
        "query_pre_attn_scalar": settings.number("query_pre_attn_scalar", head_dim),
        "activation": "gelu",
        "embedding_scale": settings.count("hidden_size") ** 0.5,
        "output_norms": True,
    }


def _refuse_unsupported(settings: Settings) -> None:
    activation = settings.get("hidden_activation")
    if activation != "gelu_pytorch_tanh":
        raise settings.error(
            f"hidden_activation {activation!r} is not supported, only 'gelu_pytorch_tanh' is"
        )
    for key in (
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "use_bidirectional_attention",
    ):
        if settings.get(key):
            raise settings.error(f"{key} {settings.get(key)!r} is not supported")


def _ropes(settings: Settings, head_dim: int) -> tuple[RopeConfig, RopeConfig]:
    """Of layers that see everything, and of those with a window.

    transformers 4 scales the former alone; 5 writes one object for each.
    """
    everywhere = given_rope(settings)
    local: dict[str, Any] = {}
    if any(isinstance(value, dict) for value in everywhere.values()):
        local = everywhere.get("sliding_attention") or {}
        everywhere = everywhere.get("full_attention") or {}
    theta = settings.number("rope_theta", _THETA)
    local_theta = settings.number("rope_local_base_freq", _LOCAL_THETA)
    return (
        rope_config(settings, FAMILY, head_dim, everywhere, theta),
        rope_config(settings, FAMILY, head_dim, local, local_theta),
    )
