"""Linux futexes on words in shared memory: sleep until a word changes, wake who sleeps.

The rings and the ranks' barrier sleep here.  A futex word is the low half of a
64-bit counter (x86-64 is little-endian).  The caller checks the counter, then
calls futex_wait with the value it saw: the kernel compares again before it
puts the thread to sleep, so a store followed by futex_wake is never missed.
Futexes are shared between processes (not FUTEX_PRIVATE); the calls release
the GIL.
"""

from __future__ import annotations

import ctypes
import errno
import os

_SYS_FUTEX = 202  # x86-64; shared_memory.create and map_memory refuse other machines
_FUTEX_WAIT = 0
_FUTEX_WAKE = 1
_EVERYBODY = 2**31 - 1
_LOW_HALF = 0xFFFFFFFF


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


# Two function objects for one libc call: their argument types differ, and
# saving errno, which wake has no use for, costs time.
_wait = ctypes.CDLL(None, use_errno=True).syscall
_wait.restype = ctypes.c_long
_wait.argtypes = (
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.POINTER(_Timespec),
)
_wake = ctypes.CDLL(None).syscall
_wake.restype = ctypes.c_long
_wake.argtypes = (ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)


def futex_wait(address: int, seen: int, timeout_s: float) -> None:
    """Sleeps while the counter at `address` (its low 32 bits) is `seen`.

    Returns when woken, at once when the counter is another already, after
    `timeout_s`, and on a signal: the caller looks at the counter again and at
    its own deadline.
    """
    seconds = int(timeout_s)
    pause = _Timespec(seconds, int((timeout_s - seconds) * 1e9))
    if _wait(_SYS_FUTEX, address, _FUTEX_WAIT, seen & _LOW_HALF, ctypes.byref(pause)) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT):
        raise OSError(code, f"futex wait at {address:#x}: {os.strerror(code)}")


def futex_wake(address: int) -> None:
    """Wakes everybody who sleeps on the counter at `address`."""
    _wake(_SYS_FUTEX, address, _FUTEX_WAKE, _EVERYBODY)
