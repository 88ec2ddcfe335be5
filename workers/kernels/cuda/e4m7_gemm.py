"""A linear layer on Hopper (hopper.py) whose weights have 12 bits (e4m7.py), of any rows.

A quarter of the weights' bytes is not read, which is what a step of few rows consists of.  A
warpgroup unpacks its weights from shared memory into the registers that wgmma takes them
from, while it multiplies those before.  With more rows arithmetic costs more than bytes, and
the instructions that unpack come on top; for how many rows this is faster than bfloat16
is in `faster`.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .e4m7 import BLOCK_BYTES, E4M7, pack
from .hopper import HopperTiling, fitting, gemm, tensor_map, works
from .needs import COLUMNS
from .nvrtc import CompiledKernel

_SOURCE = Path(__file__).with_suffix(".cu")
_TILE_ROWS = (8, 16, 32, 64, 128, 192, 256)
_FEW_ROWS = 128
"""Up to here weights cost more than arithmetic: the more warpgroups the faster."""
_STEPS = 4
"""Of 16 columns, in a stage."""
_ONE_STEP = (192, 3)
"""Of more rows with so many warpgroups sums leave no registers for the weights of a stage."""
_SEVERAL_TILES = {(256, 2): 1.0, (192, 2): 0.87, (128, 3): 0.82, (128, 2): 0.74, (256, 1): 0.73}
"""Rows and warpgroups of tiles where there are several, and how fast they are."""
_FASTER = (
    (1, 16 << 20, 0.0), (64, 8 << 20, 0.0), (112, 16 << 20, 0.0), (128, 40 << 20, 0.0),
    (192, 40 << 20, 0.84), (256, 40 << 20, 0.95),
)  # fmt: skip
"""Up to so many rows, with so many weights, and such a share of the GPU filled: a start and an end
cost more here, and with many rows arithmetic does."""
_MEASURED = {256: ((3, 1), (1, 2))}
"""Up to so many rows only tiles of these warpgroups and splits are known to be: of Qwen3-8B."""


@functools.cache
def supported(device: torch.device) -> bool:
    """See hopper.works; where it does not, weights stay bfloat16."""
    return works(device, "weights stay bfloat16", lambda: _trial(device))


def _trial(device: torch.device) -> float:
    """A small layer, against PyTorch's: the relative error."""
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (
        torch.randn(rows, 4 * COLUMNS, generator=generator, device=device).bfloat16()
        for rows in (13, 144)
    )
    packed = pack(weight)
    assert packed is not None
    torch.cuda.synchronize(device)  # The weights are there before it comes up early.
    got = e4m7_gemm(x, packed, None, HopperTiling(16, 1, 2)).float()
    wanted = F.linear(x, weight).float()
    return float((got - wanted).norm() / wanted.norm())


@functools.cache
def faster(n: int, k: int, rows: int) -> bool:
    """Whether it is, for a weight [n, k], than what there is for bfloat16.

    Measured on an H100 in whole layers of Qwen3-8B, half of it, Llama-3.1-8B, Phi-3-mini and
    Qwen3-0.6B, at 1 to 256 rows.
    """
    for most, weights, filled in _FASTER:
        if rows <= most:
            tiling, known = e4m7_tiling(n, k, rows), _MEASURED.get(most)
            if known and (tiling.groups, tiling.splits) not in known:
                return False
            return n * k >= weights and tiling.filled(n) >= filled
    return False


def ever_faster(n: int, k: int) -> bool:
    """Whether it is for any number of rows."""
    return n * k >= min(weights for _, weights, _ in _FASTER)


@functools.cache
def e4m7_tiling(n: int, k: int, rows: int) -> HopperTiling:
    """For a weight [n, k] and so many rows; measured as `faster`."""
    if rows > _TILE_ROWS[-1]:
        several = (HopperTiling(*tile, 1) for tile in _SEVERAL_TILES)
        return max(several, key=lambda t: t.busy(rows, n) * _SEVERAL_TILES[t.rows, t.groups])
    tile = min(size for size in _TILE_ROWS if size >= rows)
    at_once = list(fitting(n, k, tile))
    if not at_once:  # What is larger than the GPU goes in rounds.
        return HopperTiling(tile, 3, 1)
    if rows > _FEW_ROWS:
        return max(at_once, key=lambda tiling: (tiling.filled(n), -tiling.splits))
    return max(at_once, key=lambda tiling: (tiling.splits, -tiling.groups))


def e4m7_gemm(
    x: torch.Tensor,
    weight: E4M7,
    bias: torch.Tensor | None,
    tiling: HopperTiling,
    activation: str | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """[T, k] -> [T, n] in bfloat16 or float32; with an activation, for a weight that is gated,
    [T, n / 2] in bfloat16: f(first half) * second half.

    x contiguous.
    """
    if weight.gated != bool(activation):
        raise ValueError("a layer's halves come in turns for an activation, and only for it")
    rows, n, k = len(x), weight.n, weight.k
    width = n // 2 if activation else n
    y = x.new_empty(rows, width, dtype=out_dtype)
    if not rows:
        return y
    _kernel(x.device, tiling, activation, out_dtype).launch(
        tiling.grid(rows, n),
        ctypes.c_void_p(weight.blocks.data_ptr()),
        tensor_map(x.data_ptr(), (k, rows), (2 * k,), (COLUMNS, tiling.rows)),
        ctypes.c_void_p(y.data_ptr()),
        ctypes.c_void_p(weight.scales.data_ptr()),
        ctypes.c_void_p(0 if bias is None else bias.data_ptr()),
        ctypes.c_int(rows),
        ctypes.c_int(width),
        ctypes.c_int(k),
        ctypes.c_int(len(weight.blocks)),
    )
    return y


@functools.cache
def _kernel(
    device: torch.device, tiling: HopperTiling, activation: str | None, out_dtype: torch.dtype
) -> CompiledKernel:
    """On the device, which is the current one."""
    return CompiledKernel(*kernel_arguments(tiling, activation, out_dtype))


def kernel_arguments(
    tiling: HopperTiling, activation: str | None, out_dtype: torch.dtype
) -> tuple[Any, ...]:
    """See hopper.gemm."""
    rows, groups = _ONE_STEP
    ahead = 1 if tiling.rows > rows and tiling.groups == groups else _STEPS
    return gemm(
        _SOURCE, tiling, "registers", BLOCK_BYTES, activation,
        {"WIDE": int(out_dtype == torch.float32), "AHEAD": ahead},
    )  # fmt: skip
