"""Weights in 12 bits by PyTorch, on any device: what e4m7_pack.cu makes, and back again."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from albireo.workers.kernels.cuda.e4m7 import E4M7, TOO_SMALL
from albireo.workers.kernels.cuda.hopper import BLOCK
from albireo.workers.kernels.cuda.needs import COLUMNS

_MANTISSA_BITS = 7
_LARGEST = 15
"""Exponent of the largest weight of a row."""
_BIAS = 127
_LEAST = 32
"""Exponent of a row's largest weight: with 2^-95 all that is computed here is a normal number."""
_MOST = 2 * _BIAS - TOO_SMALL
"""Exponent of the largest weights whose scale is a float's: they are below 2^16."""
_SIGN = 11
_STEPS, _THREADS = COLUMNS // 16, 128


def pack(weight: torch.Tensor, gated: bool = False) -> E4M7 | None:
    """See e4m7.pack."""
    n, k = weight.shape
    largest = _exponents(weight).amax(1, keepdim=True).clamp(min=_LEAST)
    if (largest > _MOST).any():
        return None
    order = _order(n, gated).to(weight.device)
    scales = torch.ldexp(torch.ones(n).to(largest.device), largest[:, 0] - _BIAS + TOO_SMALL)
    return E4M7(_blocks(weight[order], largest[order]), scales, n, k, gated)


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


def _exponents(weight: torch.Tensor) -> torch.Tensor:
    """bfloat16's own."""
    return weight.view(torch.int16).int() >> _MANTISSA_BITS & 255


def _blocks(weight: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
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
