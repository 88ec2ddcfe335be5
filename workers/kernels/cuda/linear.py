"""Linear layers: cuBLAS, or, where rows must not see each other, one Triton GEMM.

cuBLAS chooses its algorithm by the number of rows, so the bits of a row's
result depend on the batch.  The Triton GEMM has one tile shape and one order
of summation for all batches; it is what `--batch-invariant` pays for.

Where the weights' bytes decide, cuBLAS reads them at three quarters of the memory's
speed: a single row has a kernel of its own (gemv.py), and so have some (few_rows.py),
and a large layer of a decode batch (hopper_gemm.py), its activation included, which is what
it does for a prompt's rows, too.  On Hopper weights may have 12 bits besides, or only
(e4m7.py): then e4m7_gemm.py does what it is faster at, or all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .activation import gated
from .e4m7 import E4M7, fits, pack
from .e4m7_gemm import e4m7_gemm, e4m7_tiling, ever_faster, faster
from .e4m7_gemm import supported as e4m7_supported
from .few_rows import MAX_ROWS, counters, few_rows, few_rows_tiling
from .gemv import gemv, gemv_tiling
from .hopper import HopperTiling
from .hopper_gemm import hopper_gemm, hopper_tiling, supported
from .overlap import can_overlap


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """weight [n, k] and bias [n] on the device, row-major; out_dtype: of the result.

    narrow: the weight in 12 bits.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    out_dtype: torch.dtype
    narrow: E4M7 | None = None


@dataclass(frozen=True, slots=True)
class NarrowLinear:
    """A PackedLinear whose weight there is in 12 bits only."""

    narrow: E4M7
    bias: torch.Tensor | None
    out_dtype: torch.dtype


def pack_linear(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    device: torch.device,
    e4m7: str = "off",
    gated: bool = False,
) -> PackedLinear | NarrowLinear:
    """A copy on the device.  e4m7: "beside", "only" or "off", see EngineConfig.e4m7_weights.

    gated: it is for gated_linear.  Raises RuntimeError for "only" where that does not work.
    """
    if weight.stride() != (weight.shape[1], 1):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} that is not contiguous")
    weight = weight.to(device, copy=True)
    counters(weight.device)
    bias = None if bias is None else bias.to(device, copy=True)
    out_dtype = out_dtype or weight.dtype
    narrow = None
    if fits(weight) and (e4m7 == "only" or (e4m7 == "beside" and ever_faster(*weight.shape))):
        if e4m7_supported(weight.device):
            narrow = pack(weight, gated)
        elif e4m7 == "only":
            raise RuntimeError(
                "--e4m7-weights only: this GPU's kernels for weights of 12 bits do not work, the "
                "log says why; leave the option out"
            )
    if narrow and e4m7 == "only":
        return NarrowLinear(narrow, bias, out_dtype)
    return PackedLinear(weight, bias, out_dtype, narrow)


def linear(x: torch.Tensor, packed: PackedLinear | NarrowLinear) -> torch.Tensor:
    """[T, k] -> [T, n] by cuBLAS, or by kernels of our own where they are faster."""
    rows, k = x.shape
    narrow = _narrow(packed, rows)
    if narrow:
        tiling = e4m7_tiling(narrow.n, k, rows)
        return e4m7_gemm(x, narrow, packed.bias, tiling, None, packed.out_dtype)
    assert isinstance(packed, PackedLinear)
    if x.dtype != torch.bfloat16:
        return cublas(x, packed)
    if rows > MAX_ROWS:
        many = _hopper_tiling(x, packed)
        return hopper_gemm(x, packed.weight, packed.bias, many) if many else cublas(x, packed)
    if rows == 1:
        return gemv(x, packed.weight, packed.bias, packed.out_dtype, gemv_tiling(k))
    few = few_rows_tiling(len(packed.weight), k, rows) if can_overlap(x.device) else None
    if few is None:
        return cublas(x, packed)
    return few_rows(x, packed.weight, packed.bias, packed.out_dtype, few)


def gated_linear(
    x: torch.Tensor, packed: PackedLinear | NarrowLinear, activation: str
) -> torch.Tensor:
    """[T, k] -> [T, n / 2]: f(first half of linear(x)) * second half, in one kernel if there is."""
    narrow = _narrow(packed, len(x))
    if narrow:
        tiling = e4m7_tiling(narrow.n, narrow.k, len(x))
        return e4m7_gemm(x, narrow, packed.bias, tiling, activation)
    assert isinstance(packed, PackedLinear)
    many = _hopper_tiling(x, packed, gated=True) if len(x) > MAX_ROWS else None
    if many:
        return hopper_gemm(x, packed.weight, packed.bias, many, activation)
    return gated(linear(x, packed), activation)


def _narrow(packed: PackedLinear | NarrowLinear, rows: int) -> E4M7 | None:
    """The weight in 12 bits, where that is the one to take."""
    narrow = packed.narrow
    if narrow is None or isinstance(packed, NarrowLinear) or faster(narrow.n, narrow.k, rows):
        return narrow
    return None


def weight_of(packed: PackedLinear | NarrowLinear, rows: int) -> torch.Tensor:
    """What is read for so many rows: [n, k], or a row for each block of outputs and columns."""
    narrow = _narrow(packed, rows)
    if narrow:
        return narrow.blocks.flatten(0, 1)
    assert isinstance(packed, PackedLinear)
    return packed.weight


def _hopper_tiling(
    x: torch.Tensor, packed: PackedLinear, gated: bool = False
) -> HopperTiling | None:
    """None where cuBLAS is faster, or has to do it."""
    if not x.dtype == packed.out_dtype == torch.bfloat16 or not supported(x.device):
        return None
    n, k = packed.weight.shape
    return hopper_tiling(n, k, len(x), gated)


def cublas(x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    """The same by cuBLAS, for any number of rows."""
    weight, bias = packed.weight, packed.bias
    if packed.out_dtype == x.dtype:
        return F.linear(x, weight, bias)
    if x.is_cuda and packed.out_dtype == torch.float32:
        y = torch.mm(x, weight.t(), out_dtype=torch.float32)
        return y if bias is None else y.add_(bias)
    wide = None if bias is None else bias.float()
    return F.linear(x.float(), weight.float(), wide).to(packed.out_dtype)


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x, weight, bias, y, rows, N: tl.constexpr, K: tl.constexpr, WITH_BIAS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    column = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    i = tl.arange(0, TILE_K)
    a = x + row.to(tl.int64)[:, None] * K + i[None, :]
    b = weight + column.to(tl.int64)[None, :] * K + i[:, None]
    total = tl.zeros([TILE_M, TILE_N], tl.float32)
    for start in range(0, K, TILE_K):
        inside = i < K - start
        some = tl.load(a + start, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        other = tl.load(b + start, mask=(column < N)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(some, other, total, input_precision="ieee")
    if WITH_BIAS:
        total += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    target = y + row.to(tl.int64)[:, None] * N + column[None, :]
    here = (row < rows)[:, None] & (column < N)[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=here)


def invariant_linear(x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    """[T, k] -> [T, n]: a row's result does not depend on T or on the other rows."""
    rows, (n, k) = x.shape[0], packed.weight.shape
    y = x.new_empty(rows, n, dtype=packed.out_dtype)
    tile = 64 if x.dtype == torch.bfloat16 else 32
    if rows:
        _linear[(triton.cdiv(n, tile), triton.cdiv(rows, tile))](
            x,
            packed.weight,
            packed.weight if packed.bias is None else packed.bias,
            y,
            rows,
            N=n,
            K=k,
            WITH_BIAS=packed.bias is not None,
            TILE_M=tile,
            TILE_N=tile,
            TILE_K=tile,
            num_warps=4,
        )
    return y
