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

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .hopper import BLOCK
from .needs import COLUMNS, can_be_e4m7

BLOCK_BYTES = BLOCK * COLUMNS * 12 // 8
_MANTISSA_BITS = 7
_LARGEST = 15
"""Exponent of the largest weight of a row."""
_BIAS = 127
_LEAST = 32
"""Exponent of a row's largest weight: with 2^-95 all that is computed here is a normal number."""
TOO_SMALL = 112
"""Power of two that a bfloat16 lacks whose exponent has only these four bits."""
_MOST = 2 * _BIAS - TOO_SMALL
"""Exponent of the largest weights whose scale is a float's: they are below 2^16."""
_SIGN = 11
_AT_ONCE = 1 << 24
"""Weights, when packing: some twenty bytes of each are needed meanwhile."""
_STEPS, _THREADS = COLUMNS // 16, 128


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
    """A weight that fits, on its device.  None where one is 2^16 or more, or not a number."""
    n, k = weight.shape
    device = weight.device
    blocks = torch.empty(
        -(-n // BLOCK), k // COLUMNS, BLOCK_BYTES, dtype=torch.uint8, device=device
    )
    largest = _largest(weight)
    if (largest > _MOST).any():
        return None
    order = _order(n, gated).to(device)
    at_once = max(1, _AT_ONCE // (k * BLOCK)) * BLOCK
    for begin in range(0, n, at_once):
        rows = order[begin : begin + at_once]
        some = _pack(weight[rows], largest[rows])
        blocks[begin // BLOCK : begin // BLOCK + len(some)] = some
    scales = torch.ldexp(torch.ones(n, device=device), largest.view(-1).int() - _BIAS + TOO_SMALL)
    return E4M7(blocks, scales, n, k, gated)


def unpack(packed: E4M7) -> torch.Tensor:
    """float32 [n, k]."""
    shape = (*packed.blocks.shape[:2], _STEPS * _THREADS, 2, 4)
    low, high = packed.blocks.split((_STEPS * _THREADS * 8, _STEPS * _THREADS * 4), -1)
    low, high = low.reshape(shape).int(), high.reshape(*shape[:3], 4).int()
    sign = torch.stack([high >> 7, high.roll(-1, -1) >> 3 & 1], -2)
    exponent = torch.stack([high & 7, high >> 4 & 7], -2) << 1 | low >> _MANTISSA_BITS
    value = (low & 127) + ((exponent > 0).int() << _MANTISSA_BITS)
    value = torch.ldexp(value.float(), exponent.clamp(min=1) - _LARGEST - _MANTISSA_BITS)
    value = torch.where(sign > 0, -value, value)
    rows = value.view(-1, packed.k // COLUMNS, _STEPS, 4, 8, 4, 2, 2, 2)
    weight = rows.permute(0, 3, 7, 4, 1, 2, 6, 5, 8).reshape(-1, packed.k)[: packed.n]
    order = _order(packed.n, packed.gated).to(weight.device)
    return weight[torch.argsort(order)] * (packed.scales[:, None] * 2.0**-TOO_SMALL)


def _order(n: int, gated: bool) -> torch.Tensor:
    """Which output of the weight each of the packed ones is."""
    order = torch.arange(n)
    return order.view(2, n // 16, 8).transpose(0, 1).reshape(-1) if gated else order


def _largest(weight: torch.Tensor) -> torch.Tensor:
    """int16 [n, 1]: of each row's exponents, but not below _LEAST."""
    parts = weight.split(max(1, _AT_ONCE // weight.shape[1]))
    largest = [_exponents(part).amax(1, keepdim=True) for part in parts]
    return torch.cat(largest).clamp_(min=_LEAST)


def _exponents(weight: torch.Tensor) -> torch.Tensor:
    """bfloat16's own, int16."""
    return (weight.view(torch.int16) >> _MANTISSA_BITS).bitwise_and_(255)


def _pack(weight: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Blocks of some rows, with rows of zeros up to a whole block."""
    bits = weight.view(torch.int16)
    exponents = _exponents(weight).sub_(largest).add_(_LARGEST)
    # What rounds up to 128 is the smallest number with an exponent.
    unit = _BIAS - 1 + _LARGEST + _MANTISSA_BITS - largest.int()
    small = torch.ldexp(weight.float().abs_(), unit).round_().to(torch.int16)
    values = torch.where(exponents > 0, exponents << _MANTISSA_BITS | bits & 127, small)
    values |= (bits >> 4) & 1 << _SIGN
    values = F.pad(values, (0, 0, 0, -len(values) % BLOCK))
    registers = _as_registers(values)
    fours = registers >> 8 & 7 | registers >> _SIGN - 7 & 1 << 7
    low, first, second = registers & 255, fours[..., 0, :], fours[..., 1, :]
    high = first | (second & 7) << 4 | (second >> 4 & 8).roll(1, -1)
    parts = (part.to(torch.uint8).reshape(*registers.shape[:2], -1) for part in (low, high))
    return torch.cat(tuple(parts), -1)


def _as_registers(x: torch.Tensor) -> torch.Tensor:
    """[rows, k] -> [block, block of k, step and thread, pair of registers, place in it]."""
    rows, k = x.shape
    parts = x.view(-1, 4, 2, 8, k // COLUMNS, _STEPS, 2, 4, 2)
    #         block, warp, +8, row, block of k, step, +8 columns, pair of columns, column
    order = parts.permute(0, 4, 5, 1, 3, 7, 6, 2, 8)
    return order.reshape(rows // BLOCK, k // COLUMNS, _STEPS * _THREADS, 2, 4)
