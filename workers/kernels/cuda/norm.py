"""RMSNorm, alone and around a residual addition: one program a row, which stays in registers.

A sum that is stored in the model's dtype is rounded before it is normalised,
so that the residual stream and the norm of it agree; so is a norm before it is
added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .overlap import come_up, overlapped, wait


@triton.jit
def _normalised(values, factor, eps, WIDTH: tl.constexpr):
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / WIDTH + eps)
    return values * scale * factor


@triton.jit
def finish_row(
    values, before, residual, inner, factor, out, column, eps,
    WIDTH: tl.constexpr, INNER: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """From what is added to a row, in float32 and zeros beyond WIDTH, to its norm.

    before: what the residual stream is, in float32, where it is to ADD.  residual, out: of
    the row.  inner: see rms_norm.  factor: the weight at `column`.
    """
    here = column < WIDTH
    dtype = out.dtype.element_ty
    if INNER:
        weight = tl.load(inner + column, mask=here, other=0.0).to(tl.float32)
        values = _normalised(values, weight, eps, WIDTH).to(dtype).to(tl.float32)
    if ADD:
        values += before
        rounded = values.to(dtype)
        tl.store(residual + column, rounded, mask=here)
        values = rounded.to(tl.float32)
    result = _normalised(values, factor, eps, WIDTH)
    tl.store(out + column, result.to(dtype), mask=here)


@triton.jit
def _rms_norm(
    x, residual, inner, weight, out, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, INNER: tl.constexpr, ADD: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    come_up(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, PADDED)
    here = column < WIDTH
    factor = tl.load(weight + column, mask=here, other=0.0).to(tl.float32)
    wait(OVERLAP)
    values = tl.load(x + row + column, mask=here, other=0.0).to(tl.float32)
    before = values
    if ADD:
        before = tl.load(residual + row + column, mask=here, other=0.0).to(tl.float32)
    finish_row(
        values, before, residual + row, inner, factor, out + row, column, eps, WIDTH, INNER, ADD
    )  # fmt: skip


def norm_warps(padded: int) -> int:
    """Warps of a program that has a row of `padded` values."""
    return min(max(padded // 512, 1), 16)


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
            num_warps=norm_warps(padded),
            **overlapped(x.device),
        )
    return out
