"""The janitor: removes the files of a supervisor that was killed: its runtime directory, and the
Unix socket of its gateways.

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
    from .http_sockets import remove_dead
    from .runtime_dir import remove_if_abandoned

    path = Path(sys.argv[1])
    if path.is_dir() and (uds := remove_if_abandoned(path).get("uds")):
        remove_dead(uds)


if __name__ == "__main__":
    main()
