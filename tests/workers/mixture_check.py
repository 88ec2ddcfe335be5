"""What must hold of Kernels.experts, whatever the device."""

from __future__ import annotations

import torch

from albireo.workers.kernels.interface import Kernels

from .reference_kernels import ReferenceKernels

_ROWS = 100
_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}


class MixtureCheck:
    """Random experts and rows; every second row picks like the one before, so groups differ."""

    def __init__(
        self, kernels: Kernels, experts: int, chosen: int, hidden: int, size: int, seed: int
    ) -> None:
        torch.manual_seed(seed)
        dtype = kernels.dtype
        self.kernels, self.chosen = kernels, chosen
        self.x = torch.randn(_ROWS, hidden).to(dtype)
        self.scores = 2 * torch.randn(_ROWS, experts)
        self.scores[1::2] = self.scores[::2]
        self.scores[6] = 0.0  # equals: the first are taken
        self.weights = [
            [(torch.randn(n, k) / k**0.5).to(dtype) for _ in range(experts)]
            for n, k in ((2 * size, hidden), (hidden, size))
        ]
        self.packed = [kernels.pack_experts(iter(weights), experts) for weights in self.weights]
        reference = ReferenceKernels()
        self._reference = [reference.pack_experts(weights, experts) for weights in self.weights]

    def run(
        self,
        rows: int | slice,
        normalise: bool,
        kernels: Kernels | None = None,
        compare: bool = True,
    ) -> torch.Tensor:
        """The result of the first `rows` rows, or of some; equal to the reference's."""
        part = rows if isinstance(rows, slice) else slice(rows)
        x, scores = self.x[part], self.scores[part]
        there = kernels or self.kernels
        got = there.experts(
            x.to(there.device), scores.to(there.device), *self.packed, self.chosen, normalise
        ).cpu()
        assert got.shape == x.shape and got.dtype == x.dtype
        if compare:
            expected = ReferenceKernels().experts(
                x, scores, *self._reference, self.chosen, normalise
            )
            error = (got.double() - expected.double()).norm() / expected.double().norm()
            assert error < _TOLERANCE[x.dtype]
        return got
