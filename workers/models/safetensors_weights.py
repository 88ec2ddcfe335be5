"""The weights of a Hugging Face directory: model.safetensors, or shards and their index.

A WeightSource (weights.py).  The safetensors package reads the tensors; the
headers are read here first, all of them, so that a missing or truncated shard
is named with its sizes before a byte of weights is loaded.  Pickle formats
(pytorch_model.bin) run code when they are opened: they are never read.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .config import ModelError

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class _Entry:
    """shard: file name; dtype: as safetensors spells it."""

    shard: str
    dtype: str
    shape: tuple[int, ...]


class SafetensorsWeights:
    """Raises ModelError when a file is missing, truncated or damaged."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._shards = _shards(directory)
        self._entries: dict[str, _Entry] = {}
        self._open: dict[str, Any] = {}
        for shard in self._shards:
            for name, entry in _read_header(directory / shard).items():
                self._entries[name] = _Entry(shard, entry["dtype"], tuple(entry["shape"]))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    def place(self, name: str) -> str:
        if name in self._entries:
            return f"{self._directory / self._entries[name].shard}: {name}"
        files = self._shards[0] if len(self._shards) == 1 else f"{len(self._shards)} shards"
        return f"{self._directory} ({files}): {name}"

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        entry = self._entries[name]
        if entry.dtype not in _DTYPES:
            raise ModelError(
                f"{self.place(name)}: weights of type {entry.dtype} are not supported, only "
                f"{', '.join(_DTYPES)}; use the bfloat16 original or a GGUF file"
            )
        if entry.shard not in self._open:
            self._open[entry.shard] = safe_open(self._directory / entry.shard, framework="pt")
        stored: torch.Tensor = self._open[entry.shard].get_tensor(name)
        return stored.to(dtype)


def _shards(directory: Path) -> list[str]:
    """File names of the weights, all of which exist."""
    if (directory / _WHOLE).is_file():
        return [_WHOLE]
    index = directory / _INDEX
    if not index.is_file():
        raise ModelError(
            f"{directory}: has neither {_WHOLE} nor {_INDEX}{_other_formats(directory)}; fetch the "
            "safetensors files of the model"
        )
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index}: cannot be read: {error!r}; fetch the file again") from error
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise ModelError(
            f"{directory}: {len(missing)} of {len(shards)} shards named in {_INDEX} are missing: "
            f"{', '.join(missing)}; fetch them"
        )
    return shards


def _other_formats(directory: Path) -> str:
    others = sorted(
        path.name for path in directory.iterdir() if path.suffix in (".bin", ".pth", ".pt")
    )
    if not others:
        return ""
    return f" (only {others[0]}, and pickle files are not read: they run code when opened)"


def _read_header(path: Path) -> dict[str, Any]:
    """The header's entries by tensor name.

    A safetensors file is the header's length (u64), the header (JSON), and the
    data, to which each entry's data_offsets [begin, end] refer.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= size - 8:
            raise ModelError(
                f"{path}: is no whole safetensors file: {size} bytes, with a header said to be of "
                f"{length}; fetch the file again"
            )
        header = file.read(length)
    try:
        entries: dict[str, Any] = json.loads(header)
        entries.pop("__metadata__", None)
        expected = 8 + length + max((e["data_offsets"][1] for e in entries.values()), default=0)
        shaped = all(isinstance(e["shape"], list) and e["dtype"] for e in entries.values())
    except (ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise ModelError(f"{path}: its header is damaged: {error!r}; fetch it again") from error
    if size < expected or not shaped:
        raise ModelError(
            f"{path}: is truncated: its header describes {expected} bytes, but the file has "
            f"{size}; fetch the file again"
        )
    return entries
