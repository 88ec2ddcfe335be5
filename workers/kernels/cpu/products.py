"""The register-blocked matrix product behind linear layers and attention.

    c[r, 0:16 V] = init[r] + sum over segments and steps of a[r, step] x b[step, 0:16 V]

for up to MAX_ROWS rows and V vectors of 16 columns.  One step is one float32
of a row, or a pair of bfloat16 (4 bytes either way); b holds, for each step
and column, the matching float32 or pair:

    float32    b[step][column]              bfloat16   b[step][column][2]

so a vector of b is 64 bytes in both.  A result element is one chain of
multiply-adds in the order of the steps, so it does not depend on how many
rows or vectors are computed beside it: batch invariance rests on this.

Pairs are multiplied by the avx512_bf16 instruction where there is one, else
widened to float32 and multiplied in two steps.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from ...machine_code import part
from .simd import (
    F32X16,
    HAS_AVX512,
    HAS_BF16_DOT,
    I32,
    I32X16,
    I64,
    LANES,
    VEC_BYTES,
    BFloat,
    cgutils,
    fma,
    intrinsic,
    pointer,
    prefetch,
    splat,
)

MAX_ROWS = 6 if HAS_AVX512 else 1
"""Rows computed together: 6 rows x 4 vectors fill the 32 registers of AVX-512."""
WIDE = 4
"""Vectors of a wide product; a narrow one has a single vector."""


def _multiply_f32(builder: Any, accumulator: Any, a: Any, b: Any) -> Any:
    return fma(builder, builder.bitcast(a, F32X16), builder.bitcast(b, F32X16), accumulator)


def _multiply_pairs(builder: Any, accumulator: Any, a: Any, b: Any) -> Any:
    pairs = ir.VectorType(BFloat(), 2 * LANES)
    dot = builder.module.declare_intrinsic(
        "llvm.x86.avx512bf16.dpbf16ps.512", (), ir.FunctionType(F32X16, [F32X16, pairs, pairs])
    )
    a, b = builder.bitcast(a, pairs), builder.bitcast(b, pairs)
    return builder.call(dot, [accumulator, a, b])


def _multiply_pairs_widened(builder: Any, accumulator: Any, a: Any, b: Any) -> Any:
    high = ir.Constant(I32X16, [0xFFFF0000] * LANES)
    sixteen = ir.Constant(I32X16, [16] * LANES)
    odd_a, odd_b = builder.and_(a, high), builder.and_(b, high)
    accumulator = _multiply_f32(builder, accumulator, odd_a, odd_b)
    even_a, even_b = builder.shl(a, sixteen), builder.shl(b, sixteen)
    return _multiply_f32(builder, accumulator, even_a, even_b)


def _block(multiply: Any, rows: int, vectors: int, split_table: bool) -> Any:
    """The product for a fixed number of rows and vectors, as an intrinsic.

    Arguments, all int64: a, bytes from row to row of a; table: address of the
    base addresses of b, one for each segment, or (split_table) one for each
    vector and a single segment; ahead: a second such table, of memory that is
    fetched into the cache meanwhile; segments, steps in each, bytes from step
    to step of b; init, bytes from row to row of init; c, bytes from row to
    row.  The rows of a go on from segment to segment.
    """

    @intrinsic
    def block(_context, a, a_row, table, ahead, segments, steps, b_step, init, init_row, c, c_row):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, _s: Any, args: Any) -> Any:
            a, a_row, table, ahead, segments, steps, b_step, init, init_row, c, c_row = args

            def tile(base: Any, row_bytes: Any) -> list[Any]:
                return [
                    pointer(
                        builder,
                        builder.add(base, builder.mul(row_bytes, I64(row))),
                        F32X16,
                        vector * VEC_BYTES,
                    )
                    for row in range(rows)
                    for vector in range(vectors)
                ]

            def bases(addresses: Any, segment: Any) -> list[Any]:
                if split_table:
                    return [
                        builder.load(pointer(builder, addresses, I64, 8 * v), align=8)
                        for v in range(vectors)
                    ]
                entry = pointer(builder, addresses, I64, builder.mul(segment, I64(8)))
                start = builder.load(entry, align=8)
                return [builder.add(start, I64(v * VEC_BYTES)) for v in range(vectors)]

            sums = [
                cgutils.alloca_once_value(builder, builder.load(at, align=4))
                for at in tile(init, init_row)
            ]
            position = cgutils.alloca_once_value(builder, a)
            with cgutils.for_range(builder, segments, intp=I64) as segment:
                starts = bases(table, segment.index)
                next_starts = bases(ahead, segment.index)
                with cgutils.for_range(builder, steps, intp=I64) as step:
                    offset = builder.mul(step.index, b_step)
                    b = [builder.load(pointer(builder, s, I32X16, offset), align=4) for s in starts]
                    for s in next_starts:
                        prefetch(builder, builder.add(s, offset))
                    here = builder.load(position)
                    for row in range(rows):
                        at = pointer(builder, here, I32, builder.mul(a_row, I64(row)))
                        value = splat(builder, builder.load(at, align=4))
                        for vector in range(vectors):
                            slot = sums[row * vectors + vector]
                            new = multiply(builder, builder.load(slot), value, b[vector])
                            builder.store(new, slot)
                    builder.store(builder.add(here, I64(4)), position)
            for slot, at in zip(sums, tile(c, c_row), strict=True):
                builder.store(builder.load(slot), at, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), generate

    return block


def _product(name: str, multiply: Any, vectors: int, split_table: bool) -> Any:
    """The product for 1 .. MAX_ROWS rows: picks the block made for that number."""
    one, two, three, four, five, six = (
        _block(multiply, min(rows, MAX_ROWS), vectors, split_table) for rows in range(1, 7)
    )

    @part(name)
    def product(rows, a, a_row, table, ahead, segments, steps, b_step, init, init_row, c, c_row):  # type: ignore[no-untyped-def]
        if rows == 1 or MAX_ROWS == 1:
            one(a, a_row, table, ahead, segments, steps, b_step, init, init_row, c, c_row)
        elif rows == 2:
            two(a, a_row, table, ahead, segments, steps, b_step, init, init_row, c, c_row)
        elif rows == 3:
            three(a, a_row, table, ahead, segments, steps, b_step, init, init_row, c, c_row)
        elif rows == 4:
            four(a, a_row, table, ahead, segments, steps, b_step, init, init_row, c, c_row)
        elif rows == 5:
            five(a, a_row, table, ahead, segments, steps, b_step, init, init_row, c, c_row)
        else:
            six(a, a_row, table, ahead, segments, steps, b_step, init, init_row, c, c_row)

    return product


_multiply_bf16 = _multiply_pairs if HAS_BF16_DOT else _multiply_pairs_widened

wide_bf16 = _product("wide_bf16", _multiply_bf16, WIDE, False)
"""64 columns, b's vectors side by side."""
narrow_bf16 = _product("narrow_bf16", _multiply_bf16, 1, False)
"""16 columns."""
split_bf16 = _product("split_bf16", _multiply_bf16, WIDE, True)
"""64 columns, each 16 of them at a base address of its own."""
wide_f32 = _product("wide_f32", _multiply_f32, WIDE, False)
narrow_f32 = _product("narrow_f32", _multiply_f32, 1, False)
split_f32 = _product("split_f32", _multiply_f32, WIDE, True)
