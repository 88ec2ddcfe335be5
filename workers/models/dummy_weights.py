"""Random weights made from the config alone (load_format "dummy"); a WeightSource (weights.py).

For benchmarks and tests without files.  Deterministic: a tensor depends on its
name and the seed only.  Normal numbers are drawn once, into a pool; a tensor
is a stretch of the repeated pool from an offset of its own, which is as fast
as copying memory.  The pool's prime length keeps rows from repeating.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch

from .config import ModelConfig

_POOL = 1048573  # a prime below 2**20
_STD = 0.02


class DummyWeights:
    """Norms are 1; everything else is normal with a standard deviation of 0.02.

    device: where the tensors are made; their values do not depend on it.
    shapes: of the tensors by their names, where they are not the config's.
    """

    def __init__(
        self,
        config: ModelConfig,
        seed: int = 0,
        device: torch.device | str = "cpu",
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self._shapes = config.tensor_shapes() if shapes is None else shapes
        self._seed = seed
        generator = torch.Generator().manual_seed(seed)
        self._pool = (torch.randn(_POOL, generator=generator) * _STD).to(device)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def place(self, name: str) -> str:
        return f"dummy weights: {name}"

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype, device=self._pool.device)
        pool = self._pool = self._pool.to(dtype)
        out = torch.empty(shape, dtype=dtype, device=pool.device)
        flat = out.view(-1)
        start = zlib.crc32(f"{self._seed} {name}".encode()) % _POOL
        at = 0
        while at < len(flat):
            stretch = min(_POOL - start, len(flat) - at)
            flat[at : at + stretch] = pool[start : start + stretch]
            at, start = at + stretch, 0
        return out
