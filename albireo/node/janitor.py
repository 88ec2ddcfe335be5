"""The janitor: removes the runtime directory of a supervisor that was killed.

A child process in a session of its own, it does nothing but wait for the end
of a pipe whose other end the supervisor holds.  The kernel kills the actors by
their death signal; the files are the janitor's.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 64):
        pass
    from .runtime_dir import remove_if_abandoned

    path = Path(sys.argv[1])
    if path.is_dir():
        remove_if_abandoned(path)


if __name__ == "__main__":
    main()
