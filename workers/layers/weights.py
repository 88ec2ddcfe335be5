"""What a layer is built from: tensors by their name within the layer."""

from __future__ import annotations

from typing import Protocol

import torch


class Weights(Protocol):
    """The weights of one module; models/weights.py implements it over files.

    Tensors are whole (all ranks'), in the model's dtype unless another is asked
    for, and may be views of a mapped file: a layer copies, or packs, what it keeps.
    """

    def at(self, module: str) -> Weights:
        """The weights of a module below this one."""
        ...

    def find(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        """A tensor, or None where the model's config has none of that name."""
        ...

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor; KeyError where the model's config has none of that name."""
        ...
