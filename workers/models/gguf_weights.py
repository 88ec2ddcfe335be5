"""The weights of a GGUF file, dequantised; a WeightSource (weights.py).

llama.cpp rotates neighbouring pairs, Hugging Face the two halves of a head.
For architecture "llama" its converters therefore interleave the rows of the q
and k projections; here the rows are put back, while still quantised.  Qwen
files keep Hugging Face's order.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from . import dequantize
from .config import ModelConfig, ModelError
from .gguf_file import GGUFFile, GGUFTensor


class GGUFWeights:
    """`config` is that of the same file; tensors go by the file's own names (gguf_names.py)."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self._file = GGUFFile(path)
        self._interleaved_heads: dict[str, int] = {}
        if self._file.get("general.architecture") == "llama":
            self._interleaved_heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
        # All sizes are checked first: a file cut short is refused before it is half loaded.
        self._raw_rows = {name: self._rows(info) for name, info in self._file.tensors.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self._file.tensors.items()}

    def place(self, name: str) -> str:
        return f"{self._file.path}: {name}"

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        info = self._file.tensors[name]
        raw = self._raw_rows[name]
        heads = self._interleaved_heads.get(name.split(".")[-2])
        if heads is not None:
            pairs = info.shape[0] // heads // 2
            raw = raw.reshape(heads, pairs, 2, -1).transpose(1, 2).reshape(raw.shape)
        columns = info.shape[-1] if len(info.shape) > 1 else 1
        try:
            return dequantize.dequantize(raw, info.type, columns, dtype).view(info.shape)
        except NotImplementedError as error:
            raise ModelError(f"{self.place(name)}: {error}") from error

    def _rows(self, info: GGUFTensor) -> torch.Tensor:
        """A tensor's bytes, mapped: uint8 [rows, bytes]; a vector has rows of one weight."""
        *rows, columns = info.shape if len(info.shape) > 1 else (*info.shape, 1)
        count = math.prod(rows)
        try:
            nbytes = dequantize.row_bytes(info.type, columns)
        except ValueError as error:
            raise ModelError(f"{self._file.path}: tensor {info.name}: {error}") from error
        return torch.from_numpy(self._file.data(info, count * nbytes)).view(count, nbytes)
