"""A model in memory, ready for any rank of any group of the node.

The fork server loads it once; the worker processes inherit it and share its
pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..sampling.compiled import compile_all

if TYPE_CHECKING:
    from ..kernels.interface import Kernels
    from ..models.config import ModelConfig
    from ..models.llama import Model


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """ranks: for each degree of tensor parallelism in use, one Model a rank."""

    config: ModelConfig
    kernels: Kernels
    ranks: dict[int, list[Model]]

    def compile(self) -> None:
        """Makes the machine code of a step, so that a fork inherits it; starts no threads."""
        self.kernels.warm_up()
        compile_all(several_ranks=max(self.ranks) > 1)
