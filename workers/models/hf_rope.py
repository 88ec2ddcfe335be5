"""The rotary settings of a Hugging Face config.json -> RopeConfig.

Reads what transformers 4 and 5 write: `rope_theta` and `rope_scaling`, or
`rope_parameters`.  Called by hf_config.py and hf_gemma3.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .config import RopeConfig
from .hf_settings import Settings, number_above_zero

_KINDS = ("default", "linear", "llama3", "yarn")
_PHI3_KINDS = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}
_PHI3_ORIGINAL_LENGTH = 4096  # what transformers takes where the key is absent


def read_rope(settings: Settings, family: str, head_dim: int) -> RopeConfig:
    """The one of all layers.  Raises ModelError for rotary settings that the layers do not have."""
    given = given_rope(settings)
    if any(isinstance(value, dict) for value in given.values()):
        raise settings.error("rotary settings that differ between layers are not supported")
    theta = settings.number("rope_theta", 10000.0)
    return rope_config(settings, family, head_dim, given, theta)


def given_rope(settings: Settings) -> dict[str, Any]:
    """The object with the rotary settings, empty without one."""
    given = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise settings.error(f"rotary settings are {given!r}, but have to be an object")
    return given


def rope_config(
    settings: Settings, family: str, head_dim: int, given: Mapping[str, Any], theta: float
) -> RopeConfig:
    """`given`: the rotary settings of the layers in question; theta: where it has none.

    Raises ModelError as read_rope does.
    """
    kinds = _PHI3_KINDS if family == "phi3" else dict(zip(_KINDS, _KINDS, strict=True))
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in kinds:
        raise settings.error(
            f"rope type {kind!r} is not supported; supported are {', '.join(kinds)}"
        )
    kind = kinds[kind]
    rotary_dim = _rotary_dim(settings, family, given, head_dim)
    number = _Numbers(settings, given)
    theta = number("rope_theta", theta)
    if kind == "default":
        return RopeConfig(theta=theta, rotary_dim=rotary_dim)
    if kind == "linear":
        return RopeConfig(kind=kind, theta=theta, factor=number("factor"))
    if kind == "longrope":
        return _longrope(settings, given, theta, rotary_dim, head_dim)
    original = _original_length(settings, given, settings.count("max_position_embeddings"))
    if kind == "llama3":
        return RopeConfig(
            kind=kind,
            theta=theta,
            factor=number("factor"),
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
            original_max_position_embeddings=original,
        )
    factor = number("factor", settings.count("max_position_embeddings") / original)
    return RopeConfig(
        kind=kind,
        theta=theta,
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        attention_factor=_attention_factor(given, factor),
    )


class _Numbers:
    """Numbers above 0 among the rotary settings, by their key."""

    def __init__(self, settings: Settings, given: Mapping[str, Any]) -> None:
        self._settings = settings
        self._given = given

    def __call__(self, key: str, default: float | None = None) -> float:
        value = self._given.get(key)
        return number_above_zero(self._settings.path, key, default if value is None else value)


def _original_length(settings: Settings, given: Mapping[str, Any], default: int) -> int:
    """Tokens of the context that the model was trained with before it was stretched."""
    length = _Numbers(settings, given)("original_max_position_embeddings", default)
    return settings.count("original_max_position_embeddings", int(length))


def _rotary_dim(settings: Settings, family: str, given: Mapping[str, Any], head_dim: int) -> int:
    """Dimensions of a head that rotate, 0 for all of them; only Phi-3 leaves some as they are."""
    partial = given.get("partial_rotary_factor") or settings.get("partial_rotary_factor", 1.0)
    number_above_zero(settings.path, "partial_rotary_factor", partial)
    if given.get("truncate") is False or (partial != 1.0 and family != "phi3"):
        raise settings.error(
            f"partial_rotary_factor {partial} with truncate {given.get('truncate', True)} is not "
            "supported; only 1.0 with true is"
        )
    rotary_dim = int(head_dim * partial)
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise settings.error(
            f"partial_rotary_factor {partial} rotates {rotary_dim} of a head's {head_dim} "
            "dimensions; an even number of at most all of them is needed"
        )
    return 0 if rotary_dim == head_dim else rotary_dim


def _longrope(
    settings: Settings, given: Mapping[str, Any], theta: float, rotary_dim: int, head_dim: int
) -> RopeConfig:
    """The factors for sequences of up to the original length; see hf_config._context_len."""
    original = _original_length(settings, given, _PHI3_ORIGINAL_LENGTH)
    implied = settings.count("max_position_embeddings") / original
    factor = _Numbers(settings, given)("factor", implied)
    factors = given.get("short_factor")
    wanted = (rotary_dim or head_dim) // 2
    if not isinstance(factors, list) or len(factors) != wanted:
        raise settings.error(
            f"short_factor is {factors!r}, but has to be a list of {wanted} numbers"
        )
    divisors = tuple(number_above_zero(settings.path, "short_factor", f) for f in factors)
    attention_factor = given.get("attention_factor")
    if attention_factor is None:
        growth = math.log(factor) / math.log(original) if factor > 1 else 0.0
        attention_factor = math.sqrt(1 + growth)
    return RopeConfig(
        kind="longrope",
        theta=theta,
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=float(attention_factor),
        rotary_dim=rotary_dim,
        frequency_factors=divisors,
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
