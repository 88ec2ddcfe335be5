"""A linear layer on Hopper (hopper.py): of 65 to 256 rows, where weights and arithmetic cost about
the same, and of more with a gate, whose halves then need not be written.

Up to 256 rows are one tile, so that the weights are read once; programs of the same weights
come one after the other.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .hopper import BLOCK, HopperTiling, fitting, gemm, tensor_map, works
from .needs import COLUMNS
from .nvrtc import CompiledKernel

MAX_ROWS = 256
"""Of one tile."""
MAX_GATED_ROWS = 2048

_SOURCE = Path(__file__).with_suffix(".cu")
_TILE_ROWS = 64
"""Tiles of so many rows, twice as many, ..."""
_FEWER_ROWS = 128
"""Of more, arithmetic costs as much as the weights, and too many sums of a k that is shared out
too much."""
_LEAST_FILLED, _LEAST_FILLED_MANY = 0.7, 0.8
"""Share of the GPU that must have work for this to be faster than cuBLAS ..."""
_LEAST_WEIGHTS, _LEAST_WEIGHTS_FULL = 40 << 20, 16 << 20
"""... and how many weights there must be: the start and the end of a program cost more here.
The second where a tile of _FEWER_ROWS has many of them."""
_MANY_OF_FEWER_ROWS = 97
_TILES_OF_MANY = (256, 192)
"""Rows of a tile of 192 outputs where there are several, ..."""
_LEAST_BUSY = 0.93
"""... and the share of what the GPU computes meanwhile that has to be wanted: with 0.97 it takes
0.93 to 0.96 of cuBLAS's time and the activation's, with 0.91 as long, with 0.76 more."""


@functools.cache
def supported(device: torch.device) -> bool:
    """See hopper.works; where it does not, cuBLAS does the work."""
    what = f"cuBLAS does the linear layers of 65 to {MAX_ROWS} rows"
    return works(device, what, lambda: _trial(device))


def _trial(device: torch.device) -> float:
    """A small layer, against PyTorch's: the relative error."""
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (
        torch.randn(rows, 2 * COLUMNS, generator=generator, device=device).bfloat16()
        for rows in (70, 384)
    )
    torch.cuda.synchronize(device)  # The weights are there before it comes up early.
    got = hopper_gemm(x, weight, None, HopperTiling(128, 3, 1), "silu").float()
    gate, up = F.linear(x, weight).float().chunk(2, 1)
    wanted = F.silu(gate) * up
    return float((got - wanted).norm() / wanted.norm())


@functools.cache
def hopper_tiling(n: int, k: int, rows: int, gated: bool = False) -> HopperTiling | None:
    """For a weight [n, k] of bfloat16; None where cuBLAS is faster, or has to do it.

    gated: with an activation.  Measured on an H100 (tools/gpu_kernel_bench.py --tune-linear, and
    whole layers) for Qwen3-8B, half of it, Llama-3.1-8B and Qwen3-0.6B, at 72 to 256 rows, and
    at 384 to 2,048 gated ones.
    """
    full_tile = _MANY_OF_FEWER_ROWS <= rows <= _FEWER_ROWS
    least_weights = _LEAST_WEIGHTS_FULL if full_tile else _LEAST_WEIGHTS
    if n % 16 or k % COLUMNS or n * k < least_weights:
        return None
    if rows > MAX_ROWS:
        return _several_tiles(n, rows) if gated and rows <= MAX_GATED_ROWS else None
    tilings = (
        tiling
        for tiling in fitting(n, k, -(-rows // _TILE_ROWS) * _TILE_ROWS)
        if tiling.splits == 1 or tiling.groups == 1 or tiling.rows <= _FEWER_ROWS
    )
    fullest = max(tilings, key=lambda tiling: tiling.filled(n), default=None)
    least = _LEAST_FILLED if rows <= _FEWER_ROWS else _LEAST_FILLED_MANY
    return fullest if fullest and fullest.filled(n) >= least else None


def _several_tiles(n: int, rows: int) -> HopperTiling | None:
    """The tiles that leave least of the GPU idle, or at work on rows that are not there."""
    best = max((HopperTiling(tile, 3, 1) for tile in _TILES_OF_MANY), key=lambda t: t.busy(rows, n))
    return best if best.busy(rows, n) >= _LEAST_BUSY else None


def hopper_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tiling: HopperTiling,
    activation: str | None = None,
) -> torch.Tensor:
    """[T, k] -> [T, n] in bfloat16; with an activation [T, n / 2]: f(first half) * second half.

    x and weight contiguous.
    """
    rows, (n, k) = len(x), weight.shape
    width = n // 2 if activation else n
    y = x.new_empty(rows, width)
    kernel = _kernel(x.device, tiling, activation)
    line = 2 * k
    if activation:
        weights = tensor_map(
            weight.data_ptr(), (k, 8, 2, width // 8), (line, width * line, 8 * line),
            (COLUMNS, 8, 2, tiling.outputs // 16),
        )  # fmt: skip
    else:
        weights = tensor_map(weight.data_ptr(), (k, n), (line,), (COLUMNS, tiling.outputs))
    kernel.launch(
        tiling.grid(rows, n),
        weights,
        tensor_map(x.data_ptr(), (k, rows), (line,), (COLUMNS, tiling.rows)),
        ctypes.c_void_p(y.data_ptr()),
        ctypes.c_void_p(0 if bias is None else bias.data_ptr()),
        ctypes.c_int(rows),
        ctypes.c_int(width),
        ctypes.c_int(k),
    )
    return y


@functools.cache
def _kernel(device: torch.device, tiling: HopperTiling, activation: str | None) -> CompiledKernel:
    """On the device, which is the current one."""
    return CompiledKernel(*kernel_arguments(tiling, activation))


def kernel_arguments(tiling: HopperTiling, activation: str | None) -> tuple[Any, ...]:
    """See hopper.gemm."""
    return gemm(
        _SOURCE, tiling, "descriptor", BLOCK * COLUMNS * 2, activation,
        {"WIDE": 0},
    )  # fmt: skip
