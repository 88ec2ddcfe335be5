"""Rotary position embeddings: the table of cosines and sines that kernels rotate by.

A head's pair of dimensions (i, i + head_dim/2) at position p turns by the angle
p * frequency[i].  Where a model rotates only the first of its dimensions, the
rows of q and k are put in another order (RotaryOrder), and the other pairs turn
by 0.  The kinds differ in the frequencies alone, YaRN and LongRoPE also in a
factor of cos and sin; they are computed as transformers does
(modeling_rope_utils.py), in float32 and in its order of operations: at position
100,000 the last bit of a frequency already moves the angle by 0.01.
"""

from __future__ import annotations

import math

import torch

from ..models.config import RopeConfig
from .weights import Weights


def rope_table(rope: RopeConfig, head_dim: int, max_len: int) -> torch.Tensor:
    """[max_len, head_dim] float32: cos of the head_dim/2 angles, then sin."""
    rotary_dim = rope.rotary_dim or head_dim
    angles = torch.outer(torch.arange(max_len).float(), frequencies(rope, rotary_dim))
    table = torch.zeros(max_len, 2, head_dim // 2)
    table[:, 0] = 1.0
    turning = table[:, :, : rotary_dim // 2]
    turning[:, 0], turning[:, 1] = angles.cos(), angles.sin()
    turning *= _attention_factor(rope)
    return table.view(max_len, head_dim)


def frequencies(rope: RopeConfig, rotary_dim: int) -> torch.Tensor:
    """Radians a position, [rotary_dim / 2] float32, fastest first."""
    wavelengths = rope.theta ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim)
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.frequency_factors) * wavelengths)
    plain = 1.0 / wavelengths
    if rope.kind == "linear":
        scaled = plain / rope.factor
    elif rope.kind == "llama3":
        scaled = _llama3(plain, rope)
    elif rope.kind == "yarn":
        keep = 1 - _yarn_ramp(rope, rotary_dim)
        scaled = 1.0 / (rope.factor * wavelengths) * (1 - keep) + plain * keep
    else:
        scaled = plain
    if rope.frequency_factors:
        scaled = scaled / torch.tensor(rope.frequency_factors)
    return scaled


class RotaryOrder:
    """Weights of an attention layer with the rows of each head of q and k in the kernels' order.

    Kernels rotate pairs (i, i + head_dim/2), files pair (i, i + rotary_dim/2) and
    keep the rest. Scores do not change, for q and k are put in order alike:

        file     first second rest              (rotary_dim/2 each, then what is left)
        kernels  first rest' second rest''      (rest' and rest'' are the halves of the rest)
    """

    def __init__(self, weights: Weights, head_dim: int, rotary_dim: int) -> None:
        self._weights = weights
        self._head_dim = head_dim
        half, middle = rotary_dim // 2, (head_dim + rotary_dim) // 2
        parts = ((0, half), (rotary_dim, middle), (half, rotary_dim), (middle, head_dim))
        self._order = torch.cat([torch.arange(*part) for part in parts])

    def at(self, module: str) -> Weights:
        return self._weights.at(module)

    def find(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        found = self._weights.find(name, dtype)
        if found is None or name.split("_")[0] not in ("q", "k"):
            return found
        heads = found.view(-1, self._head_dim, *found.shape[1:])
        return heads[:, self._order.to(found.device)].view(found.shape)

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self.find(name)
        return self._weights[name] if found is None else found


def _llama3(plain: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Llama 3.1: slow frequencies are divided, fast ones kept, those between are blended."""
    turns = rope.original_max_position_embeddings / (2 * math.pi / plain)
    span = rope.high_freq_factor - rope.low_freq_factor
    keep = ((turns - rope.low_freq_factor) / span).clamp(0, 1)
    return (1 - keep) * plain / rope.factor + keep * plain


def _yarn_ramp(rope: RopeConfig, rotary_dim: int) -> torch.Tensor:
    """YaRN (arXiv 2309.00071): how far each frequency is divided, 0 for fast to 1 for slow ones."""

    def dimension(turns: float) -> float:
        """Where a frequency makes that many turns over the original length."""
        length = rope.original_max_position_embeddings
        return rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), rotary_dim - 1)
    width = high - low or 0.001
    return ((torch.arange(rotary_dim // 2).float() - low) / width).clamp(0, 1)


def _attention_factor(rope: RopeConfig) -> float:
    """The temperature of the softmax, put into q and k alike."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 0.1 * math.log(rope.factor) + 1.0 if rope.kind == "yarn" and rope.factor > 1 else 1.0
