"""What the GEMMs on Hopper share (hopper_tiles.cu): what a program has, and how it is compiled.

    grid  (rows / tile, n / outputs, splits); a program has some outputs of a tile's rows, and a
          share of k

One warp of a program copies weights, the first before the kernel before it has ended
(overlap.py), which cuBLAS's kernels cannot, and one x, which every program reads from the L2
cache: each as far ahead as what it copies needs.  The others multiply what is there (wgmma;
PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions").  Where there are fewer tiles than
multiprocessors, k is shared out in a cluster, whose programs add up each other's sums from
shared memory, in the order of k.

With a gate the layer's two halves come in turns of eight outputs, so that a thread has a gate
and what it lets through, and applies the activation before anything is written.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .needs import COLUMNS, MULTIPROCESSORS
from .nvrtc import TensorMap, available, instructions

BLOCK = 64
"""Outputs of a warpgroup."""
PROGRAMS = {1: MULTIPROCESSORS, 2: MULTIPROCESSORS, 3: 126}
"""That an H100 or H200 has room for at once, by how many make a cluster."""
_GATES = {None: 0, "silu": 1, "gelu": 2}
_ALIGNMENT = 1024
"""Of a program's first stage, which its memory may not have."""
_BARRIERS_BYTES = 16
"""Of a stage."""
_MOST_STAGES = 16
_SHARED_BYTES = 227 << 10
"""Of a program."""
_WIDEST_INSTRUCTION = 192
"""Rows of one instruction for which the registers at a program's start are enough."""
_REGISTERS = {1: (0, 0), 2: (232, 40), 3: (160, 32), 4: (112, 32)}
"""Of a thread that multiplies and of one that copies, by warpgroups that multiply; 0: as it has."""
_MOST_ROWS = {1: 256, 2: 256, 3: 256, 4: 128}
"""Of a tile, by warpgroups, for sums that fit into the registers."""
_INPUT_BYTES = {1: 128 << 10, 2: 96 << 10, 3: 96 << 10, 4: 96 << 10}
"""Of x that can be on their way, by warpgroups: the fewer, the more of x comes for each weight."""
_FEW_ROWS = 64
"""Of a tile, for whose sums any program has registers."""
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
        return BLOCK * self.groups

    def grid(self, rows: int, n: int) -> tuple[int, int, int]:
        """For a layer [n, k] of so many rows."""
        return -(-rows // self.rows), -(-n // self.outputs), self.splits

    def filled(self, n: int) -> float:
        """Work of a tile's programs over what all multiprocessors could do in their rounds."""
        rounds = -(-(-(-n // self.outputs) * self.splits) // MULTIPROCESSORS)
        return n * self.splits / (rounds * MULTIPROCESSORS * self.outputs)

    def busy(self, rows: int, n: int) -> float:
        """Share that is wanted of what all multiprocessors compute, in whole rounds of programs."""
        tiles, outputs, _ = self.grid(rows, n)
        rounds = -(-tiles * outputs // MULTIPROCESSORS)
        return n * rows / (rounds * MULTIPROCESSORS * self.outputs * self.rows)


def fitting(n: int, k: int, rows: int) -> Iterator[HopperTiling]:
    """For a layer [n, k] in one tile of so many rows, all whose programs are on the GPU at once."""
    for splits, programs in PROGRAMS.items():
        for groups, most_rows in _MOST_ROWS.items():
            tiling = HopperTiling(rows, groups, splits)
            fits = -(-n // tiling.outputs) * splits <= programs and k // COLUMNS >= splits
            if fits and rows <= most_rows:
                yield tiling


class Stages(NamedTuple):
    """Of a program's two rings, and the shared memory that they take with their barriers."""

    weights: int
    inputs: int
    shared_bytes: int


def stages(tiling: HopperTiling, block_bytes: int) -> Stages:
    """block_bytes: of a warpgroup's weights in a stage.

    Weights have the rest of a program's memory.
    """
    weight = tiling.groups * block_bytes + _BARRIERS_BYTES
    one = tiling.rows * COLUMNS * 2
    inputs = min(_MOST_STAGES, _INPUT_BYTES[tiling.groups] // one)
    taken = _ALIGNMENT + inputs * (one + _BARRIERS_BYTES)
    weights = min(_MOST_STAGES, (_SHARED_BYTES - taken) // weight)
    return Stages(weights, inputs, taken + weights * weight)


def gemm(
    path: Path, tiling: HopperTiling, weights: str, block_bytes: int, activation: str | None,
    defines: dict[str, int],
) -> tuple[str, list[str], str, int, int, tuple[int, int, int]]:  # fmt: skip
    """A CompiledKernel's arguments, for the kernel of `path`, which bears its name.

    weights: how wgmma takes them, "descriptor" or "registers".
    """
    rows, groups, splits = tiling
    parts = 1 if rows <= _WIDEST_INSTRUCTION or groups == 1 else 2
    multiplying, copying = _REGISTERS[groups] if rows > _FEW_ROWS else (0, 0)
    room = stages(tiling, block_bytes)
    tiles = Path(__file__).with_name("hopper_tiles.cu").read_text()
    defines = {
        **defines, "ROWS": rows, "PARTS": parts, "GROUPS": groups, "SPLITS": splits,
        "BLOCK_BYTES": block_bytes, "WEIGHT_STAGES": room.weights, "INPUT_STAGES": room.inputs,
        "GATE": _GATES[activation],
        "MULTIPLYING_REGISTERS": multiplying, "COPYING_REGISTERS": copying,
    }  # fmt: skip
    return (
        instructions() + _multiply(rows // parts, weights) + tiles + path.read_text(),
        [f"{name}={value}" for name, value in defines.items()],
        path.stem,
        128 * (groups + 1),
        room.shared_bytes,
        (1, 1, splits),
    )


def _multiply(rows: int, weights: str) -> str:
    """The instruction whose text depends on its number of registers."""
    count = rows // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    sums = ", ".join(f'"+f"(sum[{i}])' for i in range(count))
    if weights == "descriptor":
        parameter, text, values, flags = "u64 a", f"%{count}", '"l"(a)', "0, 0"
    else:
        parameter, flags = "const u32 (&a)[4]", "0"
        text = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
        values = ", ".join(f'"r"(a[{i}])' for i in range(4))
    place = count + (1 if weights == "descriptor" else 4)
    return f"""
__device__ __forceinline__ void multiply(float* sum, {parameter}, u64 inputs) {{
    asm volatile("wgmma.mma_async.sync.aligned.m64n{rows}k16.f32.bf16.bf16 "
                 "{{{registers}}}, {text}, %{place}, 1, 1, 1, {flags};"
                 : {sums} : {values}, "l"(inputs));
}}
"""


@functools.lru_cache(maxsize=4096)
def tensor_map(
    address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> TensorMap:
    """It says nothing of the tensor but this, so it is as good for the next one there."""
    return TensorMap(address, sizes, strides, box)


def works(device: torch.device, what: str, trial: Callable[[], float]) -> bool:
    """Whether the device has as many multiprocessors as all of this is cut up for, and it works.

    Compiler, driver and bindings are of several makers' releases, hence a trial, which returns
    the relative error of a small layer.  What is in the way is logged; what: is then so.
    """
    if not available(device):
        return False
    count = torch.cuda.get_device_properties(device).multi_processor_count
    if count < MULTIPROCESSORS:
        logging.warning("%s: %d multiprocessors, and not %d", what, count, MULTIPROCESSORS)
        return False
    try:
        error = trial()
        if not error < _TRIAL_ERROR:
            raise RuntimeError(f"the results of a trial are off by {error:.3g} of their size")
    except (ImportError, OSError, RuntimeError, ValueError) as failure:
        logging.warning(
            "%s: %s (cuda-bindings has to be of the major version of PyTorch's CUDA, %s)",
            what, failure, torch.version.cuda,
        )  # fmt: skip
        return False
    return True
