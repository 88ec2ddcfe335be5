"""Rotary position embeddings: the table of cosines and sines that kernels rotate by.

A head's pair of dimensions (i, i + head_dim/2) at position p turns by the angle
p * frequency[i].  The kinds differ in the frequencies alone, YaRN also in a
factor of cos and sin; they are computed as transformers does
(modeling_rope_utils.py), in float32 and in its order of operations: at position
100,000 the last bit of a frequency already moves the angle by 0.01.
"""

from __future__ import annotations

import math

import torch

from ..models.config import RopeConfig


def rope_table(rope: RopeConfig, head_dim: int, max_len: int) -> torch.Tensor:
    """[max_len, head_dim] float32: cos of the head_dim/2 angles, then sin."""
    angles = torch.outer(torch.arange(max_len).float(), frequencies(rope, head_dim))
    table = torch.empty(max_len, head_dim)
    torch.cos(angles, out=table[:, : head_dim // 2])
    torch.sin(angles, out=table[:, head_dim // 2 :])
    factor = _yarn_attention_factor(rope) if rope.kind == "yarn" else 1.0
    return table if factor == 1.0 else table.mul_(factor)


def frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians a position, [head_dim / 2] float32, fastest first."""
    wavelengths = rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    plain = 1.0 / wavelengths
    if rope.kind == "linear":
        scaled = plain / rope.factor
    elif rope.kind == "llama3":
        scaled = _llama3(plain, rope)
    elif rope.kind == "yarn":
        keep = 1 - _yarn_ramp(rope, head_dim)
        scaled = 1.0 / (rope.factor * wavelengths) * (1 - keep) + plain * keep
    else:
        scaled = plain
    if rope.frequency_factors:
        scaled = scaled / torch.tensor(rope.frequency_factors)
    return scaled


def _llama3(plain: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Llama 3.1: slow frequencies are divided, fast ones kept, those between are blended."""
    turns = rope.original_max_position_embeddings / (2 * math.pi / plain)
    span = rope.high_freq_factor - rope.low_freq_factor
    keep = ((turns - rope.low_freq_factor) / span).clamp(0, 1)
    return (1 - keep) * plain / rope.factor + keep * plain


def _yarn_ramp(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """YaRN (arXiv 2309.00071): how far each frequency is divided, 0 for fast to 1 for slow ones."""

    def dimension(turns: float) -> float:
        """Where a frequency makes that many turns over the original length."""
        length = rope.original_max_position_embeddings
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), head_dim - 1)
    width = high - low or 0.001
    return ((torch.arange(head_dim // 2).float() - low) / width).clamp(0, 1)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """The temperature of the softmax, put into q and k alike."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
