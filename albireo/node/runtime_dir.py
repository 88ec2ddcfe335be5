"""The node's runtime directory: made 0700, claimed with a lock, removed at the end.

It holds the sockets, node.json, links to the timelines and the lock; else the
file system has only the node's log, and the socket of --uds and the journal
where it has these.  Who holds the lock owns the
directory: a second node of the same name is refused, and what a dead node left
is cleared away by the next one (or at once, by its janitor).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec

from albireo.ipc.paths import node_dir

from .options import OptionError

_LOCK = "lock"
_FACTS = "node.json"
_PATIENCE_S = 0.5
"""Who holds the lock for less just looks whether a node runs, or clears away what one left."""


class RuntimeDir:
    """A claimed runtime directory."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self._lock_fd = lock_fd

    @classmethod
    def claim(cls, name: str) -> RuntimeDir:
        """Makes and locks the directory of a node.

        Raises OptionError when a live node of that name has it, or it cannot be made.
        """
        path = Path(node_dir(name))
        try:
            return cls._claimed(path, name)
        except OSError as error:
            raise OptionError(
                f"the node's runtime directory {path} cannot be used: {error.strerror or error}; "
                "ALBIREO_RUNTIME_DIR names another place for it"
            ) from None

    @classmethod
    def _claimed(cls, path: Path, name: str) -> RuntimeDir:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            path.mkdir(mode=0o700, exist_ok=True)
            lock_fd = _lock(path)
            if lock_fd is not None:
                if _still_there(path, lock_fd):
                    break
                os.close(lock_fd)
            elif time.monotonic() < deadline:
                time.sleep(0.01)
            else:
                pid = (read_facts(name) or {}).get("pid", "unknown")
                raise OptionError(
                    f"a node named {name!r} is running already (pid {pid}); "
                    f"stop it with `albireo node stop --name {name}`, or start this one with "
                    "another --name"
                )
        path.chmod(0o700)
        for left in path.iterdir():
            if left.name != _LOCK:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        return cls(path, lock_fd)

    def write_facts(self, facts: dict[str, Any]) -> None:
        """node.json: what `node status` and `node stop` know without asking the router."""
        scratch = self.path / f".{_FACTS}"
        scratch.write_bytes(msgspec.json.encode(facts))
        scratch.replace(self.path / _FACTS)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock_fd)


def remove_if_abandoned(path: Path) -> dict[str, Any]:
    """Removes a runtime directory unless a live node holds its lock; what node.json said."""
    lock_fd = _lock(path)
    facts: dict[str, Any] = {}
    if lock_fd is not None:
        if _still_there(path, lock_fd):
            facts = _facts_in(path) or {}
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock_fd)
    return facts


def is_running(name: str) -> bool:
    """Whether a live node holds the directory of that name."""
    path = Path(node_dir(name))
    lock_fd = _lock(path, create=False)
    if lock_fd is None:
        return (path / _LOCK).exists()
    os.close(lock_fd)
    return False


def read_facts(name: str) -> dict[str, Any] | None:
    """node.json of a node, or None."""
    return _facts_in(Path(node_dir(name)))


def _facts_in(path: Path) -> dict[str, Any] | None:
    try:
        facts = msgspec.json.decode((path / _FACTS).read_bytes(), type=dict)
    except (OSError, msgspec.DecodeError):
        return None
    return dict(facts)


def _lock(path: Path, create: bool = True) -> int | None:
    """The locked descriptor, or None when somebody else has it (or there is none)."""
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    try:
        fd = os.open(path / _LOCK, flags, 0o600)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _still_there(path: Path, fd: int) -> bool:
    """Whether the locked file is the one that the path names now."""
    try:
        named = (path / _LOCK).stat()
    except FileNotFoundError:
        return False
    held = os.fstat(fd)
    return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)
