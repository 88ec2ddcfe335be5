"""Layers in float64, and random numbers, for the tests of GEMMs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from albireo.workers.kernels.cuda.norm import rms_norm

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


def differences(got: torch.Tensor, before: torch.Tensor) -> str:
    """Which elements of two runs have other bits, and how far they are apart; "" for none."""
    rows, columns = torch.nonzero(got != before, as_tuple=True)
    if not len(rows):
        return ""
    apart = (got.double() - before.double())[rows, columns].abs().max()
    return (
        f"{len(rows)} of {got.numel()} differ by up to {float(apart):.3g}, in rows "
        f"{int(rows.min())} to {int(rows.max())} and columns {int(columns.min())} to "
        f"{int(columns.max())}"
    )


def check_in_a_graph(
    layer: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor, rows: int
) -> None:
    """layer: gated by SiLU, of weight [2048, 1024]; norms write what it reads."""
    norm, x = torch.ones(1024, device=DEVICE), random(rows, 1024)

    def run() -> torch.Tensor:
        y = rms_norm(x, None, norm, 1e-6)
        for _ in range(3):
            y = rms_norm(layer(y), None, norm, 1e-6)
        return y

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(20):
        x.normal_()
        y = F.rms_norm(x.float(), (1024,), eps=1e-6)
        for _ in range(3):
            wide = expected(y.bfloat16(), weight, None, "silu")
            y = F.rms_norm(wide.float(), (1024,), eps=1e-6)
        graph.replay()
        assert (captured.float() - y).norm() < 0.02 * y.norm()
