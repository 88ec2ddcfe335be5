"""The node's log: one file for all processes, which inherit its descriptor, and a bound.

Every writer appends (O_APPEND), so the file can be emptied under them: what it
had is copied to `<node>.log.1` before.  Of two such files there is never more
than twice MAX_LOG_BYTES, and what is written within a second.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from pathlib import Path

from albireo.ipc.paths import log_path

MAX_LOG_BYTES = 32 << 20
_LOOK_S = 1.0
_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC

log = logging.getLogger(__name__)


def open_log(name: str) -> int:
    """A descriptor of the node's log, 0600, for appending."""
    path = Path(log_path(name))
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


async def keep_log_bounded(name: str) -> None:
    """Looks after it until it is cancelled."""
    path = Path(log_path(name))
    while True:
        bound(path)
        await asyncio.sleep(_LOOK_S)


def bound(path: Path) -> None:
    """Empties a log that is too long; the present one becomes the old one."""
    try:
        if path.stat().st_size <= MAX_LOG_BYTES:
            return
        old = path.with_suffix(".log.1")
        try:
            with path.open("rb") as now, open(os.open(old, _NEW, 0o600), "wb") as before:
                now.seek(-MAX_LOG_BYTES, os.SEEK_END)
                shutil.copyfileobj(now, before, 1 << 20)
        finally:
            # A disk that is full is no reason to fill it further.
            os.truncate(path, 0)
        log.info("the log had grown beyond %d MiB; before: %s", MAX_LOG_BYTES >> 20, old)
    except OSError as error:
        log.warning("%s cannot be kept short: %s", path, error)
