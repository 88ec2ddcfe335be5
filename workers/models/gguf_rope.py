"""The rotary settings of a GGUF file -> RopeConfig.  Called by gguf_config.py."""

from __future__ import annotations

import math

import numpy as np

from .config import ModelError, RopeConfig
from .gguf_fields import Fields
from .gguf_file import GGUFFile

_F32 = 0


def read_gguf_rope(fields: Fields, rotary_dim: int) -> RopeConfig:
    """Raises ModelError for rotary settings that the layers do not have."""
    theta = fields.number("rope.freq_base", 10000.0)
    kind, factor = _scaling(fields)
    short = _frequency_factors(fields.file, "rope_factors_short.weight", rotary_dim)
    if short:
        context_len = fields.count("context_length")
        return RopeConfig(
            kind="longrope",
            theta=theta,
            original_max_position_embeddings=fields.count(
                "rope.scaling.original_context_length", context_len
            ),
            attention_factor=fields.number("rope.scaling.attn_factor", 1.0),
            frequency_factors=short,
        )
    factors = _frequency_factors(fields.file, "rope_freqs.weight", rotary_dim)
    if kind == "none":
        return RopeConfig(theta=theta, frequency_factors=factors)
    if kind == "linear":
        return RopeConfig(kind=kind, theta=theta, factor=factor, frequency_factors=factors)
    if kind != "yarn":
        raise fields.error("rope.scaling.type", "supported are none, linear and yarn")
    if fields.get("rope.scaling.yarn_log_multiplier", 0.0):
        raise fields.error("rope.scaling.yarn_log_multiplier", "is not supported")
    context_len = fields.count("context_length")
    attention_factor = fields.number("rope.scaling.attn_factor", 1.0)
    return RopeConfig(
        kind=kind,
        theta=theta,
        factor=factor,
        original_max_position_embeddings=fields.count(
            "rope.scaling.original_context_length", context_len
        ),
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
        # ggml multiplies the paper's factor by the file's.
        attention_factor=attention_factor * (0.1 * math.log(max(factor, 1.0)) + 1),
        frequency_factors=factors,
    )


def _scaling(fields: Fields) -> tuple[str, float]:
    """Kind and factor.  A factor alone, under its old key too, means linear scaling; 0 is none."""
    keys = ("rope.scaling.factor", "rope.scale_linear")
    factor = next((fields.number(key, 1.0) for key in keys if fields.get(key)), 1.0)
    return fields.get("rope.scaling.type", "none" if factor == 1.0 else "linear"), factor


def _frequency_factors(file: GGUFFile, name: str, rotary_dim: int) -> tuple[float, ...]:
    """The divisors of the rotary frequencies in tensor `name`, none without it.

    Llama 3.1 and later have "rope_freqs.weight", Phi-3 "rope_factors_short.weight".
    """
    tensor = file.tensors.get(name)
    if tensor is None:
        return ()
    if tensor.shape != (rotary_dim // 2,) or tensor.type != _F32:
        raise ModelError(
            f"{file.path}: tensor {name} has shape {tensor.shape} and type "
            f"{tensor.type}; ({rotary_dim // 2},) and type {_F32} (F32) are expected"
        )
    return tuple(file.data(tensor, rotary_dim // 2 * 4).view(np.float32).tolist())
