"""Vec: sixteen float32 in a register, loaded, computed with and stored by numba code.

Intrinsics, as in simd.py; LLVM splits a Vec on machines with narrower
registers.  Reductions fold the lanes in a fixed order.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from .simd import (
    F32X16,
    I16X16,
    I32,
    I32X16,
    LANES,
    constant,
    fma,
    intrinsic,
    pointer,
    round_bf16_vector,
    splat,
    vec,
)


@intrinsic
def vec_load(_context: Any, _address: Any) -> Any:
    """Sixteen float32 at an address."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        return builder.load(pointer(builder, args[0], F32X16), align=4)

    return vec(types.int64), generate


@intrinsic
def vec_store(_context: Any, _address: Any, _value: Any) -> Any:
    """Sixteen float32 to an address."""

    def generate(context: Any, builder: Any, _s: Any, args: Any) -> Any:
        builder.store(args[1], pointer(builder, args[0], F32X16), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, vec), generate


@intrinsic
def vec_store_bf16(_context: Any, _address: Any, _value: Any) -> Any:
    """A Vec as sixteen bfloat16 to an address."""

    def generate(context: Any, builder: Any, _s: Any, args: Any) -> Any:
        halves = round_bf16_vector(builder, args[1])
        builder.store(halves, pointer(builder, args[0], I16X16), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, vec), generate


@intrinsic
def vec_splat(_context: Any, _value: Any) -> Any:
    """A Vec of one float32 sixteen times."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        return splat(builder, args[0])

    return vec(types.float32), generate


def _binary(operation: Any) -> Any:
    @intrinsic
    def apply(_context: Any, _a: Any, _b: Any) -> Any:
        def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
            return operation(builder, args[0], args[1])

        return vec(vec, vec), generate

    return apply


vec_add = _binary(lambda builder, a, b: builder.fadd(a, b))
"""vec_add(a, b) -> Vec."""
vec_mul = _binary(lambda builder, a, b: builder.fmul(a, b))
"""vec_mul(a, b) -> Vec."""
vec_div = _binary(lambda builder, a, b: builder.fdiv(a, b))
"""vec_div(a, b) -> Vec."""
vec_max = _binary(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))
"""vec_max(a, b) -> Vec: lane by lane a where a > b, else b."""


@intrinsic
def vec_fma(_context: Any, _a: Any, _b: Any, _c: Any) -> Any:
    """a * b + c of three Vecs."""

    def generate(_ctx: Any, builder: Any, _s: Any, args: Any) -> Any:
        return fma(builder, *args)

    return vec(vec, vec, vec), generate


@intrinsic
def vec_keep(_context: Any, _value: Any, _begin: Any, _end: Any) -> Any:
    """Lanes begin .. end-1 of a Vec, -infinity in the others."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        value, begin, end = args
        lanes = ir.Constant(I32X16, list(range(LANES)))
        begin, end = (splat(builder, builder.trunc(x, I32)) for x in (begin, end))
        inside = builder.and_(
            builder.icmp_signed(">=", lanes, begin), builder.icmp_signed("<", lanes, end)
        )
        return builder.select(inside, value, constant(F32X16, float("-inf")))

    return vec(vec, types.int64, types.int64), generate


@intrinsic
def vec_sum(_context: Any, _value: Any) -> Any:
    """The sum of a Vec's lanes, always added in the same (pairwise) order."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        return _reduce(builder, args[0], lambda a, b: builder.fadd(a, b))

    return types.float32(vec), generate


@intrinsic
def vec_top(_context: Any, _value: Any) -> Any:
    """The largest lane of a Vec; NaN lanes may be passed over."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        return _reduce(
            builder,
            args[0],
            lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b),
        )

    return types.float32(vec), generate


def _reduce(builder: Any, value: Any, combine: Any) -> Any:
    """Folds the upper half of the lanes onto the lower half until one is left."""
    half = LANES // 2
    while half:
        order = [(lane + half) % LANES for lane in range(LANES)]
        other = builder.shuffle_vector(value, value, ir.Constant(I32X16, order))
        value = combine(value, other)
        half //= 2
    return builder.extract_element(value, I32(0))
