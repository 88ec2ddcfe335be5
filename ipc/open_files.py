"""The limit of open files, which is a limit of connections."""

from __future__ import annotations

import contextlib
import resource


def raise_open_files() -> int:
    """Raises this process's limit to what the system allows, and returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return soft
