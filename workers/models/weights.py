"""Where weights come from, and how layers get at them while a model is built.

A WeightSource is one kind of file (safetensors_weights.py, gguf_weights.py) or
none (dummy_weights.py), under the names of that file; stored.py says which of
them a model's tensors are.  `check_source` holds it against the shapes that the
config asks for before anything is read.  LoadingWeights is what layers see:
tensors by their name within the layer, each read once for all ranks and
forgotten when the layer is done, so that at most one layer is in memory twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from .config import ModelError
from .stored import Stored

_NAMED_IN_ERRORS = 3


class WeightSource(Protocol):
    """Tensors by the names of the file."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """What there is."""
        ...

    def place(self, name: str) -> str:
        """Where a tensor is, or should be: the file, and its name there. For errors."""
        ...

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The whole tensor in `dtype`; may be a view of a mapped file, so copy what you keep."""
        ...


def check_source(source: WeightSource, tensors: Mapping[str, Stored]) -> None:
    """Raises ModelError unless the source has all of `tensors` in their shapes."""
    found = source.shapes()
    expected = {stored.name: stored.shape for stored in tensors.values()}
    missing = [name for name in expected if name not in found]
    if missing:
        raise ModelError(
            f"{source.place(missing[0])}: the tensor is missing{_and_others(missing)}; the "
            "files are incomplete or do not belong to this config: fetch the model again"
        )
    wrong = [name for name, shape in expected.items() if found[name] != shape]
    if wrong:
        name = wrong[0]
        raise ModelError(
            f"{source.place(name)}: has shape {list(found[name])}, but the config asks for "
            f"{list(expected[name])}{_and_others(wrong)}; the files do not belong to this "
            "config: fetch the model again"
        )


def _and_others(names: list[str]) -> str:
    if len(names) == 1:
        return ""
    named = ", ".join(names[1:_NAMED_IN_ERRORS])
    more = ", ..." if len(names) > _NAMED_IN_ERRORS else ""
    return f" (and {len(names) - 1} others: {named}{more})"


class LoadingWeights:
    """A source as layers see it, from one point of the tree of names; see layers/weights.py.

    tensors: where the source has each of the model's tensors.
    """

    def __init__(
        self,
        source: WeightSource,
        tensors: Mapping[str, Stored],
        dtype: torch.dtype,
        prefix: str = "",
        read: dict[tuple[str, torch.dtype], torch.Tensor] | None = None,
    ) -> None:
        self._source = source
        self._tensors = tensors
        self._dtype = dtype
        self._prefix = prefix
        self._read: dict[tuple[str, torch.dtype], torch.Tensor] = {} if read is None else read

    def at(self, module: str) -> LoadingWeights:
        """The weights of a module below this one."""
        prefix = f"{self._prefix}{module}."
        return LoadingWeights(self._source, self._tensors, self._dtype, prefix, self._read)

    def find(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        """A tensor, or None where the model's config has none of that name."""
        stored = self._tensors.get(self._prefix + name)
        if stored is None:
            return None
        key = stored.name, dtype or self._dtype
        if key not in self._read:
            self._read[key] = self._source.tensor(*key)
        whole = self._read[key]
        if stored.rows is not None:
            whole = whole.view(-1, whole.shape[-1])[stored.first : stored.first + stored.rows]
        return whole + stored.plus if stored.plus else whole

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self.find(name)
        if found is None:
            raise KeyError(self._prefix + name)
        return found

    def forget(self) -> None:
        """Drops everything that was read; what layers keep they have copied."""
        self._read.clear()
