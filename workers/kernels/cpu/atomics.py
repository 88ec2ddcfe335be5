"""Words shared by threads, and what a thread does while it waits for one.

Intrinsics for numba code; every access is sequentially consistent.  Words are
int64 at 8-byte aligned addresses; the futex looks at the low half of a word.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba.core import types

from .simd import I32, I64, intrinsic, pointer

_FUTEX_CALL = {"x86_64": 202, "aarch64": 98}
_FUTEX_WAIT_PRIVATE = 128
_FUTEX_WAKE_PRIVATE = 129
_IS_X86 = platform.machine() == "x86_64"


@intrinsic
def atomic_load(_context: Any, _address: Any) -> Any:
    """The word at an address."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        return builder.load_atomic(pointer(builder, args[0], I64), "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def atomic_store(_context: Any, _address: Any, _value: Any) -> Any:
    """Writes the word at an address."""

    def generate(context: Any, builder: Any, _s: Any, args: Any) -> Any:
        builder.store_atomic(args[1], pointer(builder, args[0], I64), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def atomic_add(_context: Any, _address: Any, _value: Any) -> Any:
    """Adds to the word at an address and returns what it was before."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", pointer(builder, args[0], I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def relax(_context: Any) -> Any:
    """Tells the core that this is a spin loop."""

    def generate(context: Any, builder: Any, _s: Any, _args: Any) -> Any:
        if _IS_X86:
            nothing = ir.FunctionType(ir.VoidType(), [])
            pause = builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), nothing)
            builder.call(pause, [])
        return context.get_dummy_value()

    return types.void(), generate


def _libc(builder: Any, name: str, kind: ir.FunctionType) -> Any:
    """A function of the C library, found in the process when the code is loaded."""
    known = builder.module.globals.get(name)
    return known if known is not None else ir.Function(builder.module, kind, name)


def _futex(builder: Any, address: Any, operation: int, value: Any) -> None:
    number = _FUTEX_CALL.get(platform.machine())
    if number is None:
        raise NotImplementedError(f"futex on {platform.machine()!r} is not known")
    call = _libc(builder, "syscall", ir.FunctionType(I64, [I64], var_arg=True))
    low = builder.and_(value, I64(0xFFFFFFFF))
    builder.call(call, [I64(number), address, I64(operation), low, I64(0), I64(0), I64(0)])


@intrinsic
def futex_wait(_context: Any, _address: Any, _expected: Any) -> Any:
    """Sleeps until woken, unless the word has changed from `expected`; may wake for nothing."""

    def generate(context: Any, builder: Any, _s: Any, args: Any) -> Any:
        _futex(builder, args[0], _FUTEX_WAIT_PRIVATE, args[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def futex_wake(_context: Any, _address: Any, _count: Any) -> Any:
    """Wakes up to `count` sleepers on the word."""

    def generate(context: Any, builder: Any, _s: Any, args: Any) -> Any:
        _futex(builder, args[0], _FUTEX_WAKE_PRIVATE, args[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def yield_core(_context: Any) -> Any:
    """Lets another thread have this core."""

    def generate(context: Any, builder: Any, _s: Any, _args: Any) -> Any:
        builder.call(_libc(builder, "sched_yield", ir.FunctionType(I32, [])), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def call_item(_context: Any, _function: Any, _params: Any, _item: Any, _scratch: Any) -> Any:
    """Calls the item function at an address: void(params, item, scratch)."""

    def generate(context: Any, builder: Any, _s: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64, I64, I64])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate
