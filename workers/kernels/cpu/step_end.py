"""The end of a GPU's step in machine code: the wait for it, its times, and its rows.

What is done between a step's last kernel and its tokens in the ring makes them late.  In Python
it takes several times as long there as in a loop, for nobody has done it for a step's time, and
first it wants the interpreter's lock.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types

from ....ipc.plan import Int32Array
from ...machine_code import native
from .simd import I32, I64, intrinsic

Float32Array = npt.NDArray[np.float32]
GAP, FORWARD, SAMPLE = 0, 1, 2
"""Times: behind the step before, of the forward pass, and of the rest.  Milliseconds."""


class EventCalls:
    """CUDA's functions for events, by their addresses.

    synchronize: int(event), waits.  elapsed: int(float *milliseconds, event, event).  Both return 0
    or an error's number.
    """

    def __init__(self, synchronize: Any, elapsed: Any) -> None:
        self._kept: Final = (synchronize, elapsed)
        self.synchronize = _address(synchronize)
        self.elapsed = _address(elapsed)


def _address(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


@intrinsic
def _call(_context: Any, _function: Any, _first: Any, _second: Any, _third: Any) -> Any:
    """Calls int(int64, int64, int64), or one of fewer arguments, at an address."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        kind = ir.FunctionType(I32, [I64, I64, I64])
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.int32(types.int64, types.int64, types.int64, types.int64), generate


@native("int32(int64, int64, int64, int64, int64, int64, int64, float32[::1])")
def wait_for_step(
    synchronize: int,
    elapsed: int,
    before: int,
    begun: int,
    forwarded: int,
    sampled: int,
    done: int,
    times: Float32Array,
) -> int:
    """Waits for `done` and fills times [3]; returns 0 or an error's number.

    The first two are EventCalls'; before: `sampled` of the step before, or 0.
    """
    status: int = _call(synchronize, done, 0, 0)
    address = times.ctypes.data
    if status == 0 and before != 0:
        status = _call(elapsed, address + 4 * GAP, before, begun)
    if status == 0:
        status = _call(elapsed, address + 4 * FORWARD, begun, forwarded)
    if status == 0:
        status = _call(elapsed, address + 4 * SAMPLE, forwarded, sampled)
    return status


@native("void(int32[::1], int32[:, ::1], int64)")
def fill_rows(ids: Int32Array, rows: Int32Array, count: int) -> None:
    """Into the first rows [n, 3] what was sampled: (., count, token), as in ipc/plan.py."""
    for row in range(count):
        token = ids[row]
        rows[row, 1] = token >= 0
        rows[row, 2] = token ^ (token >> 31)
