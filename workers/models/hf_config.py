"""A Hugging Face directory's config.json and generation_config.json -> ModelConfig.

Called by `load.read_config`.  Reads what transformers 4 and 5 write: rotary
settings in `rope_theta` and `rope_scaling`, or in `rope_parameters`.  A
setting that would change the model's output and that the layers do not have
is refused with a ModelError; nothing is guessed over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import ModelConfig, ModelError, RopeConfig

_FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_MISTRAL_DEFAULT_WINDOW = 4096  # what transformers takes where the key is absent
_QWEN3_DEFAULT_HEAD_DIM = 128
_ROPE_KINDS = ("default", "linear", "llama3", "yarn")


def read_hf_config(directory: Path) -> ModelConfig:
    """Raises ModelError when the directory holds no model that the layers can run."""
    path = directory / "config.json"
    settings = _Settings(path, _read_json(path))
    family, architecture = _family(settings)
    _refuse_unsupported(settings)
    heads = settings.count("num_attention_heads")
    hidden = settings.count("hidden_size")
    kv_heads = settings.count("num_key_value_heads", heads if family == "llama" else None)
    head_dim = settings.count("head_dim", _default_head_dim(family, hidden, heads))
    if heads % kv_heads or head_dim % 2:
        raise settings.error(
            f"{heads} attention heads of {head_dim} over {kv_heads} KV heads do not fit together"
        )
    biased = bool(settings.get("attention_bias", False)) and family in ("llama", "qwen3")
    rope = _rope(settings)
    return ModelConfig(
        family=family,
        architecture=architecture,
        vocab_size=settings.count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=settings.count("intermediate_size"),
        num_layers=settings.count("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=settings.number("rms_norm_eps", 1e-6),
        rope=rope,
        context_len=_context_len(settings, rope),
        tie_embeddings=bool(settings.get("tie_word_embeddings", False)),
        qkv_bias=biased or family == "qwen2",
        o_bias=biased,
        mlp_bias=bool(settings.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        sliding_window=_sliding_window(settings, family),
        eos_token_ids=_eos_token_ids(settings, directory),
        bos_token_id=settings.get("bos_token_id"),
    )


class _Settings:
    """config.json with typed access; errors name the file and the key."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self._values = values

    def get(self, key: str, default: Any = None) -> Any:
        value = self._values.get(key)
        return default if value is None else value

    def has(self, key: str) -> bool:
        return key in self._values

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(f"{key} is {value!r}, but has to be a whole number above 0")
        return value

    def number(self, key: str, default: float) -> float:
        return number_above_zero(self.path, key, self.get(key, default))

    def error(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: {what}")


def number_above_zero(path: Path, key: str, value: Any) -> float:
    """`value` as a float; ModelError unless it is a finite number above 0."""
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or value <= 0:
        raise ModelError(f"{path}: {key} is {value!r}, but has to be a number above 0")
    return float(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: a JSON object is expected, found {type(values).__name__}")
    return values


def _family(settings: _Settings) -> tuple[str, str]:
    names = settings.get("architectures", [])
    if isinstance(names, list):
        for name in names:
            if name in _FAMILIES:
                return _FAMILIES[name], name
    raise settings.error(
        f"architectures {names!r} (model_type {settings.get('model_type')!r}) is not supported; "
        f"supported are {', '.join(_FAMILIES)}"
    )


def _refuse_unsupported(settings: _Settings) -> None:
    activation = settings.get("hidden_act", "silu")
    if activation != "silu":
        raise settings.error(f"hidden_act {activation!r} is not supported, only 'silu' is")
    if settings.get("quantization_config"):
        method = settings.get("quantization_config").get("quant_method", "unknown")
        raise settings.error(
            f"weights quantised with {method!r} are not supported; use the bfloat16 original or "
            "a GGUF file"
        )


def _default_head_dim(family: str, hidden: int, heads: int) -> int:
    return _QWEN3_DEFAULT_HEAD_DIM if family == "qwen3" else hidden // heads


def _context_len(settings: _Settings, rope: RopeConfig) -> int:
    """YaRN stretches the original length; max_position_embeddings may be either."""
    length = settings.count("max_position_embeddings")
    if rope.kind == "yarn":
        length = max(length, int(rope.factor * rope.original_max_position_embeddings))
    return length


def _sliding_window(settings: _Settings, family: str) -> int:
    """The window of all layers, 0 for none; refuses models whose layers differ."""
    if family == "llama":
        return 0
    if family == "mistral":
        absent = 0 if settings.has("sliding_window") else _MISTRAL_DEFAULT_WINDOW
        window = settings.get("sliding_window", absent)
        layers_below = 0
    else:
        window = settings.get("sliding_window", 0) if settings.get("use_sliding_window") else 0
        layers_below = settings.get("max_window_layers", 28)
    if not window:
        return 0
    window = settings.count("sliding_window", window)
    layers = settings.count("num_hidden_layers")
    kinds = settings.get("layer_types") or [
        "sliding_attention" if layer >= layers_below else "full_attention"
        for layer in range(layers)
    ]
    if set(kinds) == {"full_attention"}:
        return 0
    if set(kinds) == {"sliding_attention"}:
        return window
    counts = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds)))
    raise settings.error(
        f"layers of different attention ({counts}) are not supported; set use_sliding_window to "
        "false, or layer_types all alike, if the model may run that way"
    )


def _rope(settings: _Settings) -> RopeConfig:
    given = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise settings.error("rotary settings that differ between layers are not supported")
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in _ROPE_KINDS:
        raise settings.error(
            f"rope type {kind!r} is not supported; supported are {', '.join(_ROPE_KINDS)}"
        )
    partial = given.get("partial_rotary_factor") or settings.get("partial_rotary_factor", 1.0)
    if partial != 1.0 or given.get("truncate") is False:
        raise settings.error(
            f"partial_rotary_factor {partial} with truncate {given.get('truncate', True)} is not "
            "supported; only 1.0 with true is"
        )

    def number(key: str, default: float | None = None) -> float:
        value = given.get(key)
        return number_above_zero(settings.path, key, default if value is None else value)

    theta = number("rope_theta", settings.number("rope_theta", 10000.0))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(kind=kind, theta=theta, factor=number("factor"))
    length = settings.count("max_position_embeddings")
    length = int(number("original_max_position_embeddings", length))
    original = settings.count("original_max_position_embeddings", length)
    if kind == "llama3":
        return RopeConfig(
            kind=kind,
            theta=theta,
            factor=number("factor"),
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
            original_max_position_embeddings=original,
        )
    implied = settings.count("max_position_embeddings") / original
    factor = number("factor", implied)
    return RopeConfig(
        kind=kind,
        theta=theta,
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        attention_factor=_attention_factor(given, factor),
    )


def _attention_factor(given: Mapping[str, Any], factor: float) -> float | None:
    """YaRN's factor of cos and sin where the file sets one; None = the paper's (layers/rope.py)."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    over, under = given.get("mscale"), given.get("mscale_all_dim")
    if not over or not under or factor <= 1:
        return None
    growth = 0.1 * math.log(factor)
    return float((over * growth + 1) / (under * growth + 1))


def _eos_token_ids(settings: _Settings, directory: Path) -> tuple[int, ...]:
    """End tokens of generation_config.json where it names some, else of config.json."""
    found = None
    path = directory / "generation_config.json"
    if path.exists():
        found = _read_json(path).get("eos_token_id")
    if found is None:
        found = settings.get("eos_token_id", [])
    ids = found if isinstance(found, list) else [found]
    if not all(isinstance(token, int) for token in ids):
        raise settings.error(f"eos_token_id {found!r} is neither a token id nor a list of them")
    return tuple(ids)
