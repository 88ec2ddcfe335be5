"""The memory of the actors' timelines, which outlives them: see ipc/timeline.py.

The supervisor holds each memfd and shows it in the runtime directory as a link
to its own descriptor.  Of each actor there are at most two: the present one's,
and that of the one before, to see what it did last.
"""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

from albireo.ipc.config import ActorSpec
from albireo.ipc.timeline import DIRECTORY, WORKER_TRACKS, create_timeline

_KEPT = 2


class Timelines:
    """Of one node."""

    def __init__(self, runtime_dir: Path) -> None:
        self._directory = runtime_dir / DIRECTORY
        self._directory.mkdir(mode=0o700)
        self._kept: dict[str, deque[tuple[int, Path]]] = {}

    def create(self, spec: ActorSpec) -> int:
        """New memory for an actor that is about to start; the descriptor stays this object's."""
        link = self._directory / f"{spec.name}.{spec.incarnation}"
        kept = self._kept.setdefault(spec.name, deque())
        # The same incarnation comes again when it could not be forked.
        while len(kept) >= _KEPT or (kept and kept[-1][1] == link):
            old, old_link = kept.pop() if kept[-1][1] == link else kept.popleft()
            old_link.unlink(missing_ok=True)
            os.close(old)
        fd = create_timeline(spec.name, tracks=WORKER_TRACKS if spec.role == "worker" else 1)
        kept.append((fd, link))
        link.symlink_to(f"/proc/{os.getpid()}/fd/{fd}")
        return fd
