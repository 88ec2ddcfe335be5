"""Raw memory, bfloat16 and the parts of 16-lane float32 vectors for numba code.

Everything here is an intrinsic: it becomes a few LLVM instructions where it
is used.  A Vec is <16 x float>; LLVM splits it on machines with narrower
registers.  No instruction carries a fast-math flag, so NaN and infinity pass
through as IEEE 754 says; addresses are int64 and nothing is bounds-checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import binding, ir
from numba import extending
from numba.core import cgutils as _cgutils
from numba.core import types
from numba.core.datamodel import models

cgutils: Any = _cgutils


def intrinsic(generator: Callable[..., Any]) -> Callable[..., Any]:
    """numba's decorator, typed as what it makes: a function without the typing context."""
    made: Callable[..., Any] = extending.intrinsic(generator)
    return made


LANES = 16
VEC_BYTES = 64

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32, F64 = ir.FloatType(), ir.DoubleType()
F32X16, I32X16 = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
I16X16 = ir.VectorType(I16, LANES)

# What code may use: the host's features, unless numba is told to compile for another machine.
_CONFIG: Any = numba.config
_IS_HOST = not _CONFIG.CPU_NAME and not _CONFIG.CPU_FEATURES
_FEATURES = binding.get_host_cpu_features() if _IS_HOST else {}
HAS_AVX512 = bool(_FEATURES.get("avx512f"))
HAS_BF16_DOT = bool(_FEATURES.get("avx512bf16"))


class BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no class for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


class VecType(types.Type):
    """Sixteen float32 in a register."""

    def __init__(self) -> None:
        super().__init__(name="Vec")


vec = VecType()


@extending.register_model(VecType)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: types.Type) -> None:
        super().__init__(dmm, fe_type, F32X16)  # type: ignore[no-untyped-call, unused-ignore]


# -- IR helpers, shared with products.py ---------------------------------------------------


def pointer(builder: Any, address: Any, to: ir.Type, offset: Any = 0) -> Any:
    """The address plus `offset` bytes (an int or an i64 value) as a pointer to `to`."""
    if not isinstance(offset, int):
        address = builder.add(address, offset)
    elif offset:
        address = builder.add(address, I64(offset))
    return builder.inttoptr(address, to.as_pointer())


def splat(builder: Any, value: Any) -> Any:
    """A vector with `value` in all lanes."""
    kind = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
    lanes = ir.Constant(I32X16, [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), lanes)


def prefetch(builder: Any, address: Any) -> None:
    """Asks for the cache line at an address; any address will do."""
    bytes_ = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [bytes_, I32, I32, I32])
    hint = builder.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
    builder.call(hint, [builder.inttoptr(address, bytes_), I32(0), I32(3), I32(1)])


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once; scalars or vectors."""
    name = "llvm.fma.v16f32" if isinstance(a.type, ir.VectorType) else "llvm.fma.f32"
    kind = ir.FunctionType(a.type, [a.type] * 3)
    return builder.call(builder.module.declare_intrinsic(name, (), kind), [a, b, c])


def constant(like: ir.Type, value: float | int) -> ir.Constant:
    """`value` as a constant of a scalar or vector type."""
    if isinstance(like, ir.VectorType):
        return ir.Constant(like, [value] * like.count)
    return ir.Constant(like, value)


def _integers(like: ir.Type) -> ir.Type:
    return I32X16 if isinstance(like, ir.VectorType) else I32


_EXP2_COEFFICIENTS = (
    1.535336188319500e-4,
    1.339887440266574e-3,
    9.618437357674640e-3,
    5.550332471162809e-2,
    2.402264791363012e-1,
    6.931472028550421e-1,
    1.0,
)
_ROUND = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer held in the low bits


def _exp2(builder: Any, x: Any) -> Any:
    """2**x within 2 ulp; exactly 1 for 0, 0 below -126.5, infinity from 128, NaN for NaN."""
    kind, ints = x.type, _integers(x.type)
    for bound, compare in ((-127.0, "<"), (128.0, ">")):
        limit = constant(kind, bound)
        x = builder.select(builder.fcmp_ordered(compare, x, limit), limit, x)
    shifted = builder.fadd(x, constant(kind, _ROUND))
    fraction = builder.fsub(x, builder.fsub(shifted, constant(kind, _ROUND)))
    value = constant(kind, _EXP2_COEFFICIENTS[0])
    for coefficient in _EXP2_COEFFICIENTS[1:]:
        value = fma(builder, value, fraction, constant(kind, coefficient))
    exponent = builder.shl(builder.bitcast(shifted, ints), constant(ints, 23))
    power = builder.bitcast(builder.add(exponent, constant(ints, 127 << 23)), kind)
    return builder.fmul(value, power)


def _round_bf16(builder: Any, x: Any) -> Any:
    """float32 -> the bits of the nearest bfloat16 (ties to even), as i16; NaN stays NaN."""
    ints = _integers(x.type)
    bits = builder.bitcast(x, ints)
    high = builder.lshr(bits, constant(ints, 16))
    odd = builder.and_(high, constant(ints, 1))
    rounded = builder.add(builder.add(bits, constant(ints, 0x7FFF)), odd)
    rounded = builder.lshr(rounded, constant(ints, 16))
    quiet = builder.or_(high, constant(ints, 0x40))
    chosen = builder.select(builder.fcmp_unordered("uno", x, x), quiet, rounded)
    return builder.trunc(chosen, I16X16 if isinstance(x.type, ir.VectorType) else I16)


def round_bf16_vector(builder: Any, x: Any) -> Any:
    """_round_bf16 for a Vec, by the machine's own instruction where it has one."""
    if not HAS_BF16_DOT:
        return _round_bf16(builder, x)
    halves = ir.VectorType(BFloat(), LANES)
    convert = builder.module.declare_intrinsic(
        "llvm.x86.avx512bf16.cvtneps2bf16.512", (), ir.FunctionType(halves, [F32X16])
    )
    return builder.bitcast(builder.call(convert, [x]), I16X16)


def _widen_bf16(builder: Any, bits: Any) -> Any:
    """i16 bits of bfloat16 -> float32, exactly."""
    many = isinstance(bits.type, ir.VectorType)
    wide = builder.zext(bits, I32X16 if many else I32)
    return builder.bitcast(builder.shl(wide, constant(wide.type, 16)), F32X16 if many else F32)


# -- scalars and memory --------------------------------------------------------------------


def _loader(numba_type: Any, ir_type: ir.Type, size: int) -> Any:
    @intrinsic
    def load(_context: Any, address: Any) -> Any:
        def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
            return builder.load(pointer(builder, args[0], ir_type), align=size)

        return numba_type(types.int64), generate

    return load


load_i64 = _loader(types.int64, I64, 8)
"""load_i64(address) -> int64."""
load_f64 = _loader(types.float64, F64, 8)
"""load_f64(address) -> float64."""


def _storer(numba_type: Any, ir_type: ir.Type, size: int) -> Any:
    @intrinsic
    def store(_context: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, _s: Any, args: Any) -> Any:
            builder.store(args[1], pointer(builder, args[0], ir_type), align=size)
            return context.get_dummy_value()

        return types.void(types.int64, numba_type), generate

    return store


store_i64 = _storer(types.int64, I64, 8)
"""store_i64(address, value)."""


def _pointer_to(numba_type: Any) -> Any:
    @intrinsic
    def cast(_context: Any, address: Any) -> Any:
        result = types.CPointer(numba_type)  # type: ignore[no-untyped-call]

        def generate(context: Any, builder: Any, _s: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(result))

        return result(types.int64), generate

    return cast


pointer_f32 = _pointer_to(types.float32)
"""pointer_f32(address): p[i] are float32."""
pointer_u16 = _pointer_to(types.uint16)
"""pointer_u16(address): p[i] are uint16, e.g. the bits of bfloat16."""
pointer_i32 = _pointer_to(types.int32)
"""pointer_i32(address): p[i] are int32."""


@intrinsic
def widen(_context: Any, _bits: Any) -> Any:
    """Bits of a bfloat16 (uint16) -> float32."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        return _widen_bf16(builder, args[0])

    return types.float32(types.uint16), generate


@intrinsic
def narrow(_context: Any, _value: Any) -> Any:
    """float32 -> bits of the nearest bfloat16 (uint16)."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        return _round_bf16(builder, args[0])

    return types.uint16(types.float32), generate


@intrinsic
def exp2(_context: Any, _value: Any) -> Any:
    """2**x of a float32 or a Vec."""
    kind = vec if isinstance(_value, VecType) else types.float32

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        return _exp2(builder, args[0])

    return kind(kind), generate


@intrinsic
def fetch(_context: Any, _address: Any, _count: Any) -> Any:
    """Asks for `_count` bytes at an address to be brought into the cache."""

    def generate(context: Any, builder: Any, _s: Any, args: Any) -> Any:
        lines = builder.udiv(args[1], I64(VEC_BYTES))
        with cgutils.for_range(builder, lines, intp=I64) as line:
            prefetch(builder, builder.add(args[0], builder.mul(line.index, I64(VEC_BYTES))))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate
