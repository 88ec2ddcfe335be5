"""How a process is harmed, and made well again if it lives on."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable

import psutil

from .full import Filled

STARVED_S = 1.0
_SPARE_BYTES = 1 << 20


def harm(pid: int, fault: str) -> Callable[[], None]:
    """Does it; returns what has to be called afterwards, when the process may live on: it waits
    until the harm has lasted long enough.

    Raises ProcessLookupError or psutil.NoSuchProcess when the process is not there.
    """
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
    """No file grows for it any more, of a memfd or on a disk; and /dev/shm, where the
    runtime directory is, is full for everybody, if it is this run's own."""
    lift = _limit(pid, resource.RLIMIT_FSIZE, 0)
    filled = Filled()

    def undo() -> None:
        lift()
        filled.empty()

    return undo


def _limit(pid: int, what: int, value: int) -> Callable[[], None]:
    _, hard = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (value, hard))
    until = time.monotonic() + STARVED_S

    def lift() -> None:
        time.sleep(max(0.0, until - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, what, (hard, hard))

    return lift
