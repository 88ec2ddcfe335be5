"""A small file system of this run's own, which can be filled to the last byte.

In a user and mount namespace /dev/shm is a tmpfs of a MiB, and the nodes' runtime directories are
in it.  Where the kernel does not allow that, what is full is one process's limit alone.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

SHM = Path("/dev/shm")
_MARK = "CHAOS_SMALL_SHM"
_RUNTIME = SHM / "albireo"
_MOUNT = f"mount -t tmpfs -o size=1m,nr_inodes=512 chaos {SHM} && mkdir -m 700 {_RUNTIME}"
_UNSHARE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
_BLOCK = b"\0" * 4096


def enter() -> None:
    """Starts this program again with a small /dev/shm, where that is allowed."""
    if is_small():
        return
    try:
        allowed = subprocess.run([*_UNSHARE, _MOUNT], capture_output=True).returncode == 0
    except OSError:
        allowed = False
    if allowed:
        os.environ |= {_MARK: "1", "ALBIREO_RUNTIME_DIR": str(_RUNTIME)}
        program = [sys.executable, *sys.orig_argv[1:]]
        os.execvp(_UNSHARE[0], [*_UNSHARE, f'{_MOUNT} && exec "$@"', "sh", *program])


def is_small() -> bool:
    """Whether /dev/shm is this run's own."""
    return _MARK in os.environ


class Filled:
    """/dev/shm is full, of bytes and of files, until empty() is called; where it is ours."""

    def __init__(self) -> None:
        self._left: list[Path] = []
        if is_small():
            with contextlib.suppress(OSError):
                self._fill()

    def _fill(self) -> None:
        for number in range(1 << 16):
            path = SHM / f"full-{os.getpid()}-{number}"
            with open(path, "xb", buffering=0) as file:
                self._left.append(path)
                while not number:
                    try:
                        file.write(_BLOCK)
                    except OSError:
                        break

    def empty(self) -> None:
        for path in self._left:
            path.unlink(missing_ok=True)
        self._left.clear()
