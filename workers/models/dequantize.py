"""GGUF's blocks of quantised weights -> tensors in the model's dtype.

Called by gguf_weights.py, one tensor at a time.  The types of plain files
(Q4_0, Q4_1, Q8_0, F16, BF16, F32) are done with a few PyTorch operations on
pieces that stay in the cache, about 2 ns a weight; the others by the gguf
package, about 10 ns.  Both compute in float32 and give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as dequantize_by_package

_BLOCK = 32
"""Weights of a block, in the types done here."""
_PIECE_BLOCKS = 8192

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def row_bytes(kind: int, columns: int) -> int:
    """Bytes of a row of `columns` weights; ValueError for an unknown type or a bad width."""
    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if columns % block:
        raise ValueError(f"{columns} columns are not whole blocks of {block}")
    return columns // block * nbytes


def dequantize(raw: torch.Tensor, kind: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [rows, row_bytes(kind, columns)] -> [rows, columns] in `dtype`.

    A view of `raw` where that is what it holds.  Raises NotImplementedError
    for a type the gguf package does not know either.
    """
    quantization = GGMLQuantizationType(kind)
    if quantization in _PLAIN:
        return raw.view(_PLAIN[quantization]).to(dtype)
    out = torch.empty(len(raw), columns, dtype=dtype)
    decode = _DECODERS.get(quantization)
    if decode is None:
        rows = max(1, _PIECE_BLOCKS * _BLOCK // columns)
        for at in range(0, len(raw), rows):
            piece = dequantize_by_package(raw[at : at + rows].numpy(), quantization)
            out[at : at + rows] = torch.from_numpy(piece)
        return out
    blocks = raw.view(-1, GGML_QUANT_SIZES[quantization][1])
    weights = out.view(-1, _BLOCK)
    for at in range(0, len(blocks), _PIECE_BLOCKS):
        weights[at : at + _PIECE_BLOCKS] = decode(blocks[at : at + _PIECE_BLOCKS])
    return out


def _halves(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """The float16 numbers at the head of each block, [n, count] float32."""
    return blocks[:, : 2 * count].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[n, 16] bytes -> [n, 32] float32: the low halves, then the high ones."""
    weights = torch.empty(len(packed), _BLOCK)
    weights[:, :16] = packed & 15
    weights[:, 16:] = packed >> 4
    return weights


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    """float16 scale, 16 bytes of nibbles biased by 8."""
    return _nibbles(blocks[:, 2:]).sub_(8).mul_(_halves(blocks, 1))


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    """float16 scale and minimum, 16 bytes of nibbles."""
    halves = _halves(blocks, 2)
    return _nibbles(blocks[:, 4:]).mul_(halves[:, :1]).add_(halves[:, 1:])


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    """float16 scale, 32 signed bytes."""
    return blocks[:, 2:].view(torch.int8).float().mul_(_halves(blocks, 1))


_DECODERS: dict[GGMLQuantizationType, Callable[[torch.Tensor], torch.Tensor]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q8_0: _q8_0,
}
