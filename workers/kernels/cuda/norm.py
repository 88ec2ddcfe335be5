"""RMSNorm, alone and after a residual addition: one program a row, which stays in registers.

A sum that is stored in the model's dtype is rounded before it is normalised,
so that the residual stream and the norm of it agree.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rms_norm(
    x, residual, weight, out, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr, ADD: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, PADDED)
    here = column < WIDTH
    values = tl.load(x + row + column, mask=here, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + row + column, mask=here, other=0.0).to(tl.float32)
        rounded = values.to(residual.dtype.element_ty)
        tl.store(residual + row + column, rounded, mask=here)
        values = rounded.to(tl.float32)
    factor = tl.load(weight + column, mask=here, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / WIDTH + eps)
    result = values * scale * factor
    tl.store(out + row + column, result.to(out.dtype.element_ty), mask=here)


def rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """[T, hidden] -> [T, hidden]; adds x to `residual` first, in place, where given."""
    rows, width = x.shape
    out = torch.empty_like(x)
    if rows:
        padded = triton.next_power_of_2(width)
        _rms_norm[(rows,)](
            x,
            x if residual is None else residual,
            weight,
            out,
            eps,
            WIDTH=width,
            PADDED=padded,
            ADD=residual is not None,
            num_warps=min(max(padded // 512, 1), 16),
        )
    return out
