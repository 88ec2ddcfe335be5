"""How a process is harmed, and made well again if it lives on."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

_STARVED_S = 1.0
_SPARE_BYTES = 1 << 20
_SHM = "/dev/shm"
_MOST_TO_FILL = 1 << 30


def harm(pid: int, fault: str) -> Callable[[], None]:
    """Does it; returns what has to be called afterwards, when the process may live on."""
    return {
        "kill": _kill,
        "stop": _stop,
        "memory": _starve_memory,
        "files": _starve_files,
        "shm": _starve_shared_memory,
    }[fault](pid)


def _kill(pid: int) -> Callable[[], None]:
    os.kill(pid, signal.SIGKILL)
    return lambda: None


def _stop(pid: int) -> Callable[[], None]:
    os.kill(pid, signal.SIGSTOP)
    return lambda: None


def _starve_memory(pid: int) -> Callable[[], None]:
    """Its address space may not grow by more than a little: allocations fail."""
    size = psutil.Process(pid).memory_info().vms + _SPARE_BYTES
    return _limit(pid, resource.RLIMIT_AS, size)


def _starve_files(pid: int) -> Callable[[], None]:
    """It cannot open anything more, and accept nobody."""
    return _limit(pid, resource.RLIMIT_NOFILE, psutil.Process(pid).num_fds())


def _starve_shared_memory(pid: int) -> Callable[[], None]:
    """No file grows for it any more, of a memfd or on a disk; and /dev/shm is full for everybody,
    where it is small enough to be filled."""
    lift = _limit(pid, resource.RLIMIT_FSIZE, 0)
    left = os.statvfs(_SHM)
    free = left.f_bavail * left.f_frsize
    full = Path(_SHM) / f"chaos-{pid}"
    if free <= _MOST_TO_FILL:
        fd = os.open(full, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with contextlib.suppress(OSError):
            os.posix_fallocate(fd, 0, free)
        os.close(fd)

    def undo() -> None:
        lift()
        full.unlink(missing_ok=True)

    return undo


def _limit(pid: int, what: int, value: int) -> Callable[[], None]:
    _, hard = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (value, hard))
    until = time.monotonic() + _STARVED_S

    def lift() -> None:
        time.sleep(max(0.0, until - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, what, (hard, hard))

    return lift
