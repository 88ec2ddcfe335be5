"""RMSNorm, alone and around a residual addition: one program a row, which stays in registers.

A sum that is stored in the model's dtype is rounded before it is normalised,
so that the residual stream and the norm of it agree; so is a norm before it is
added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _normalised(values, weight, column, here, eps, WIDTH: tl.constexpr):
    factor = tl.load(weight + column, mask=here, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / WIDTH + eps)
    return values * scale * factor


@triton.jit
def _rms_norm(
    x, residual, inner, weight, out, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, INNER: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, PADDED)
    here = column < WIDTH
    values = tl.load(x + row + column, mask=here, other=0.0).to(tl.float32)
    if INNER:
        values = _normalised(values, inner, column, here, eps, WIDTH)
        values = values.to(x.dtype.element_ty).to(tl.float32)
    if ADD:
        values += tl.load(residual + row + column, mask=here, other=0.0).to(tl.float32)
        rounded = values.to(residual.dtype.element_ty)
        tl.store(residual + row + column, rounded, mask=here)
        values = rounded.to(tl.float32)
    result = _normalised(values, weight, column, here, eps, WIDTH)
    tl.store(out + row + column, result.to(out.dtype.element_ty), mask=here)


def rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    inner: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, hidden] -> [T, hidden]; adds x to `residual` first, in place, where given.

    inner: weight of a norm of x before.
    """
    rows, width = x.shape
    out = torch.empty_like(x)
    if rows:
        padded = triton.next_power_of_2(width)
        _rms_norm[(rows,)](
            x,
            x if residual is None else residual,
            weight if inner is None else inner,
            weight,
            out,
            eps,
            WIDTH=width,
            PADDED=padded,
            INNER=inner is not None,
            ADD=residual is not None,
            num_warps=min(max(padded // 512, 1), 16),
        )
    return out
