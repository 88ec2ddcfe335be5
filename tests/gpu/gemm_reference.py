"""Layers in float64, and random numbers, for the tests of GEMMs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

DEVICE = torch.device("cuda", 0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def expected(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    """activation: of a gated layer, "silu" or "gelu"."""
    y = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if activation is None:
        return y
    gate, up = y.chunk(2, 1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
