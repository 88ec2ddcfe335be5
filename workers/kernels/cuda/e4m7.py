"""Weights in 12 bits: bfloat16's sign and mantissa, and an exponent of four bits.

Weights of an output differ little in size, so of the eight bits of their exponents nearly all
are the same.  Here the largest weight of a row has exponent 15, what is 2^14 times smaller is
below 1 and loses mantissa as a float's subnormal numbers do:

    weight = scale of the row x (-1)^sign x   2^(exponent - 15) x (1 + mantissa / 128)
                                              2^-14 x mantissa / 128, where exponent is 0

All weights above 2^-14 of their row's largest are exact, smaller ones to half of 2^-21 of it.
In a bfloat16 whose first four bits of exponent are zero that is the weight, 2^112 times too small,
also where exponent is 0.  So the low byte is stored as it is (exponent's last bit, mantissa), and
of the high one sign and three bits: unpacking only moves bits, and the scale has the 2^112.
That lossless weights need 11 bits, 2.6 of them for the exponent, is from "70% Size, 100% Accuracy"
(Zhang et al., 2025); a fixed width needs no tables and no search where a row begins.

Memory has them as the tensor cores' registers do (PTX ISA, "Register Fragments for
wgmma.mma_async.m64nNk16", matrix A), so that a thread reads and unpacks its own:

    blocks  uint8 [n / 64, k / 64, 6144]: of a block of 64 outputs and 64 columns
            [step of 16 columns][thread of 128][8]            low bytes
            [step of 16 columns][thread of 128][4]            high ones, of weights i and 4 + i:
                    sign of i (bit 7), exponent of 4 + i (6 to 4),
                    sign of 4 + (i - 1) % 4 (3), exponent of i (2 to 0)
    scales  float32 [n], powers of two, times 2^112

The last byte is such that all bits of 4 + i are in their places when a word turns by four bits.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from .hopper import BLOCK
from .needs import COLUMNS, can_be_e4m7
from .nvrtc import CompiledKernel, instructions

BLOCK_BYTES = BLOCK * COLUMNS * 12 // 8
TOO_SMALL = 112
"""Power of two that a bfloat16 lacks whose exponent has only these four bits."""
_SOURCE = Path(__file__).with_name("e4m7_pack.cu")
_THREADS = 512
_SHARED_BYTES = 4 * BLOCK


@dataclass(frozen=True, slots=True)
class E4M7:
    """A weight [n, k]; n a multiple of 16, k of 64.

    gated: its two halves come in turns of eight outputs; scales have the weight's order, and are
    for sums of unpacked weights.
    """

    blocks: torch.Tensor
    scales: torch.Tensor
    n: int
    k: int
    gated: bool


def fits(weight: torch.Tensor) -> bool:
    """Whether it is of a type and shape that can be packed."""
    return weight.dtype == torch.bfloat16 and can_be_e4m7(*weight.shape)


def pack(weight: torch.Tensor, gated: bool = False) -> E4M7 | None:
    """A weight that fits, contiguous, on its device, by e4m7_pack.cu.

    None where one is 2^16 or more, or not a number.  Waits for the GPU.
    """
    n, k = weight.shape
    blocks = weight.new_empty(-(-n // BLOCK), k // COLUMNS, BLOCK_BYTES, dtype=torch.uint8)
    scales = weight.new_empty(n, dtype=torch.float32)
    _kernel(weight.device).launch(
        (len(blocks), 1, 1),
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_void_p(blocks.data_ptr()),
        ctypes.c_void_p(scales.data_ptr()),
        ctypes.c_int(n),
        ctypes.c_int(k),
        ctypes.c_int(gated),
    )
    return E4M7(blocks, scales, n, k, gated) if scales.isfinite().all() else None


@functools.cache
def _kernel(device: torch.device) -> CompiledKernel:
    """On the device, which is the current one."""
    defines = {"OUTPUTS": BLOCK, "COLUMNS": COLUMNS, "THREADS": _THREADS, "TOO_SMALL": TOO_SMALL}
    return CompiledKernel(
        instructions() + _SOURCE.read_text(),
        [f"{name}={value}" for name, value in defines.items()],
        _SOURCE.stem, _THREADS, _SHARED_BYTES, (1, 1, 1),
    )  # fmt: skip
