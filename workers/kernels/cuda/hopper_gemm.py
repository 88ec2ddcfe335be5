"""A linear layer on Hopper: of 65 to 256 rows, where weights and arithmetic cost about the same,
and of more with a gate, whose halves then need not be written.

    grid  (rows / tile, n / outputs, splits); a program has some outputs of a tile's rows, and a
          share of k

Up to 256 rows are one tile, so that the weights are read once; programs of the same weights
come one after the other.  One warp of a program copies
weights, the first before the kernel before it has ended (overlap.py), which cuBLAS's kernels
cannot, and one x, which every program reads from the L2 cache: each as far ahead as what it
copies needs.  The others multiply what is there (wgmma; PTX ISA, "Asynchronous Warpgroup
Level Matrix Instructions").  Where there are fewer tiles than multiprocessors, k is
shared out in a cluster, whose programs add up each other's sums from shared memory, in
the order of k.

With a gate the layer's two halves come in turns of eight outputs, so that a thread has a gate
and what it lets through, and applies the activation before anything is written.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .nvrtc import CompiledKernel, TensorMap, available

MAX_ROWS = 256
"""Of one tile."""
MAX_GATED_ROWS = 2048

_SOURCE = Path(__file__).with_suffix(".cu")
_GATES = {None: 0, "silu": 1, "gelu": 2}
_TILE_ROWS = 64
"""Tiles of so many rows, twice as many, ..."""
_COLUMNS = 64
"""Of k in a stage."""
_PROGRAMS = {1: 132, 2: 132, 3: 126}
"""That an H100 or H200 has room for at once, by how many make a cluster."""
_SHARED_BYTES = 227 << 10
"""Of a program."""
_BARRIERS_BYTES, _ALIGNMENT = 16, 1024
_INPUT_BYTES = {1: 128 << 10, 2: 96 << 10, 3: 96 << 10, 4: 96 << 10}
"""Of x that can be on their way, by warpgroups: the fewer, the more of x comes for each weight."""
_MOST_STAGES = 16
_WIDEST_INSTRUCTION = 192
"""Rows of one instruction for which the registers at a program's start are enough."""
_REGISTERS = {1: (0, 0), 2: (232, 40), 3: (160, 32), 4: (112, 32)}
"""Of a thread that multiplies and of one that copies, by warpgroups that multiply; 0: as it has."""
_MOST_ROWS = {1: 256, 2: 256, 3: 256, 4: 128}
"""Of a tile, for sums that fit into these registers."""
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

_TRIAL_ERROR = 0.02
"""Several times what bfloat16 rounds."""


class HopperTiling(NamedTuple):
    """rows: of a tile.  groups: warpgroups that multiply, 64 outputs each.

    splits: programs that share k.
    """

    rows: int
    groups: int
    splits: int

    @property
    def outputs(self) -> int:
        return 64 * self.groups

    @property
    def _weight_bytes(self) -> int:
        """Of a stage, with its barriers."""
        return self.outputs * _COLUMNS * 2 + _BARRIERS_BYTES

    @property
    def _input_bytes(self) -> int:
        return self.rows * _COLUMNS * 2 + _BARRIERS_BYTES

    @property
    def input_stages(self) -> int:
        return _INPUT_BYTES[self.groups] // (self.rows * _COLUMNS * 2)

    @property
    def weight_stages(self) -> int:
        """That a program's shared memory has room for beside those of x."""
        room = _SHARED_BYTES - _ALIGNMENT - self.input_stages * self._input_bytes
        return min(_MOST_STAGES, room // self._weight_bytes)

    @property
    def shared_bytes(self) -> int:
        stages = self.weight_stages * self._weight_bytes + self.input_stages * self._input_bytes
        return stages + _ALIGNMENT


@functools.cache
def supported(device: torch.device) -> bool:
    """Whether the device has as many multiprocessors as all of this is cut up for, and it works.

    Compiler, driver and bindings are of several makers' releases: the first answer for a
    device is that of a trial.  What is in the way is logged, and cuBLAS does the work.
    """
    if not available(device):
        return False
    if torch.cuda.get_device_properties(device).multi_processor_count < _PROGRAMS[1]:
        return False
    try:
        return _tried(device)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        logging.warning(
            "cuBLAS does the linear layers of 65 to %d rows: %s (cuda-bindings has to be of the "
            "major version of PyTorch's CUDA, %s)", MAX_ROWS, error, torch.version.cuda,
        )  # fmt: skip
        return False


def _tried(device: torch.device) -> bool:
    """A small layer, against PyTorch's.  Raises RuntimeError, also where they differ."""
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (
        torch.randn(rows, 2 * _COLUMNS, generator=generator, device=device).bfloat16()
        for rows in (70, 384)
    )
    torch.cuda.synchronize(device)  # The weights are there before it comes up early.
    got = hopper_gemm(x, weight, None, HopperTiling(128, 3, 1), "silu").float()
    gate, up = F.linear(x, weight).float().chunk(2, 1)
    wanted = F.silu(gate) * up
    error = ((got - wanted).norm() / wanted.norm()).item()
    if not error < _TRIAL_ERROR:
        raise RuntimeError(f"the results of a trial are off by {error:.3g} of their size")
    return True


@functools.cache
def hopper_tiling(n: int, k: int, rows: int, gated: bool = False) -> HopperTiling | None:
    """For a weight [n, k] of bfloat16; None where cuBLAS is faster, or has to do it.

    gated: with an activation.  Measured on an H100 (tools/gpu_kernel_bench.py --tune-linear, and
    whole layers) for Qwen3-8B, half of it, Llama-3.1-8B and Qwen3-0.6B, at 72 to 256 rows, and
    at 384 to 2,048 gated ones.
    """
    full_tile = _MANY_OF_FEWER_ROWS <= rows <= _FEWER_ROWS
    least_weights = _LEAST_WEIGHTS_FULL if full_tile else _LEAST_WEIGHTS
    if n % 16 or k % _COLUMNS or n * k < least_weights:
        return None
    if rows > MAX_ROWS:
        return _several_tiles(n, rows) if gated and rows <= MAX_GATED_ROWS else None
    tilings = _tilings(n, k, -(-rows // _TILE_ROWS) * _TILE_ROWS)
    fullest = max(tilings, key=lambda tiling: _filled(n, tiling), default=None)
    least = _LEAST_FILLED if rows <= _FEWER_ROWS else _LEAST_FILLED_MANY
    return fullest if fullest and _filled(n, fullest) >= least else None


def _several_tiles(n: int, rows: int) -> HopperTiling | None:
    """The tiles that leave least of the GPU idle, or at work on rows that are not there."""

    def busy(tiling: HopperTiling) -> float:
        programs = -(-rows // tiling.rows) * -(-n // tiling.outputs)
        at_once = _PROGRAMS[1]
        rounds = -(-programs // at_once)
        return n * rows / (rounds * at_once * tiling.outputs * tiling.rows)

    best = max((HopperTiling(tile, 3, 1) for tile in _TILES_OF_MANY), key=busy)
    return best if busy(best) >= _LEAST_BUSY else None


def _tilings(n: int, k: int, rows: int) -> Iterator[HopperTiling]:
    """All whose programs are on the GPU at once."""
    for splits, programs in _PROGRAMS.items():
        for groups, most_rows in _MOST_ROWS.items():
            tiling = HopperTiling(rows, groups, splits)
            fits = -(-n // tiling.outputs) * splits <= programs and k // _COLUMNS >= splits
            few_sums = splits == 1 or groups == 1 or rows <= _FEWER_ROWS
            if fits and few_sums and rows <= most_rows:
                yield tiling


def _filled(n: int, tiling: HopperTiling) -> float:
    """Work of all programs over what as many as there are multiprocessors could do."""
    return n * tiling.splits / (_PROGRAMS[1] * tiling.outputs)


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
    kernel = _kernel(x.device, tiling, _GATES[activation])
    line = 2 * k
    if activation:
        sizes, strides = (k, 8, 2, width // 8), (line, width * line, 8 * line)
        weights = _map(weight.data_ptr(), sizes, strides, (_COLUMNS, 8, 2, tiling.outputs // 16))
    else:
        weights = _map(weight.data_ptr(), (k, n), (line,), (_COLUMNS, tiling.outputs))
    kernel.launch(
        (-(-rows // tiling.rows), -(-n // tiling.outputs), tiling.splits),
        weights,
        _map(x.data_ptr(), (k, rows), (line,), (_COLUMNS, tiling.rows)),
        ctypes.c_void_p(y.data_ptr()),
        ctypes.c_void_p(0 if bias is None else bias.data_ptr()),
        ctypes.c_int(rows),
        ctypes.c_int(width),
        ctypes.c_int(k),
    )
    return y


@functools.lru_cache(maxsize=4096)
def _map(
    address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> TensorMap:
    """It says nothing of the tensor but this, so it is as good for the next one there."""
    return TensorMap(address, sizes, strides, box)


@functools.cache
def _kernel(device: torch.device, tiling: HopperTiling, gate: int) -> CompiledKernel:
    """On the device, which is the current one."""
    parts = 1 if tiling.rows <= _WIDEST_INSTRUCTION or tiling.groups == 1 else 2
    multiplying, copying = _REGISTERS[tiling.groups]
    return CompiledKernel(
        _multiply(tiling.rows // parts) + _SOURCE.read_text(),
        [
            f"ROWS={tiling.rows}",
            f"PARTS={parts}",
            f"GROUPS={tiling.groups}",
            f"WEIGHT_STAGES={tiling.weight_stages}",
            f"INPUT_STAGES={tiling.input_stages}",
            f"SPLITS={tiling.splits}",
            f"GATE={gate}",
            f"MULTIPLYING_REGISTERS={multiplying}",
            f"COPYING_REGISTERS={copying}",
        ],
        "hopper_gemm",
        128 * (tiling.groups + 1),
        tiling.shared_bytes,
        (1, 1, tiling.splits),
    )


def _multiply(rows: int) -> str:
    """The instruction whose text depends on its number of registers."""
    count = rows // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    sums = ", ".join(f'"+f"(sum[{i}])' for i in range(count))
    return f"""
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
__device__ __forceinline__ void multiply(float* sum, u64 weights, u64 inputs) {{
    asm volatile("wgmma.mma_async.sync.aligned.m64n{rows}k16.f32.bf16.bf16 "
                 "{{{registers}}}, %{count}, %{count + 1}, 1, 1, 1, 0, 0;"
                 : {sums} : "l"(weights), "l"(inputs));
}}
"""
