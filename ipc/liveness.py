"""Whether the process behind a stored pid still lives; for error messages, not for decisions.

A pid may be reused, so "running" can be wrong after a long time; "dead" never is.
"""

from __future__ import annotations


def describe_process(pid: int) -> str:
    """ "pid 17", "pid 17, dead", or "never attached" for pid 0."""
    if pid == 0:
        return "never attached"
    return f"pid {pid}" if is_alive(pid) else f"pid {pid}, dead"


def is_alive(pid: int) -> bool:
    """False once the process has ended, also while its parent has not reaped it."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            # The command name, in parentheses, may hold any character: the state follows the last.
            state = stat.read().rpartition(b")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in (b"Z", b"X")
