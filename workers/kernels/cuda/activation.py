"""The activation of the gated MLP."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_COLUMNS = 1024


@triton.jit
def _silu_mul(gate_up, out, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < WIDTH
    pair = gate_up + row * (2 * WIDTH) + column
    gate = tl.load(pair, mask=here, other=0.0).to(tl.float32)
    up = tl.load(pair + WIDTH, mask=here, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * WIDTH + column, result.to(out.dtype.element_ty), mask=here)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2m] = gate | up -> silu(gate) * up [T, m]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if rows:
        _silu_mul[(rows, triton.cdiv(width, _COLUMNS))](
            gate_up, out, WIDTH=width, COLUMNS=_COLUMNS, num_warps=4
        )
    return out
