"""The activations of the gated MLP: gate / (1 + exp(-t)) * up.

t is the gate for SiLU; for GELU it is twice the argument of its tanh, since
(1 + tanh(t / 2)) / 2 = 1 / (1 + exp(-t)).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .overlap import come_up, overlapped, wait

_COLUMNS = 1024
_LINEAR = tl.constexpr(math.sqrt(8 / math.pi))
_CUBIC = tl.constexpr(0.044715 * math.sqrt(8 / math.pi))


@triton.jit
def _gated(
    gate_up, out,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, GELU: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    come_up(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < WIDTH
    pair = gate_up + row * (2 * WIDTH) + column
    wait(OVERLAP)
    gate = tl.load(pair, mask=here, other=0.0).to(tl.float32)
    up = tl.load(pair + WIDTH, mask=here, other=0.0).to(tl.float32)
    t = gate
    if GELU:
        t = gate * (_LINEAR + _CUBIC * gate * gate)
    result = gate / (1.0 + tl.exp(-t)) * up
    tl.store(out + row * WIDTH + column, result.to(out.dtype.element_ty), mask=here)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2m] = gate | up -> silu(gate) * up [T, m]."""
    return _launch(gate_up, False)


def gelu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2m] = gate | up -> gelu(gate) * up [T, m], approximated by tanh."""
    return _launch(gate_up, True)


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """One of the two, by its name: "silu" or "gelu"."""
    return {"silu": silu_mul, "gelu": gelu_mul}[activation](gate_up)


def _launch(gate_up: torch.Tensor, gelu: bool) -> torch.Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if rows:
        _gated[(rows, triton.cdiv(width, _COLUMNS))](
            gate_up, out, WIDTH=width, COLUMNS=_COLUMNS, GELU=gelu, num_warps=4,
            **overlapped(gate_up.device),
        )  # fmt: skip
    return out
