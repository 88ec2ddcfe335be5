"""When to try to connect again, and for how long."""

from __future__ import annotations

import random
import time

RECONNECT_S = 30.0
"""How long the node may be away before requests in flight end; a router is back within a second."""

_FIRST_S = 0.01
_MOST_S = 0.5
_FACTOR = 1.6


class Backoff:
    """Waits between tries, which grow; all clients of a node do not try at the same moment."""

    def __init__(self, most_s: float) -> None:
        self._deadline = time.monotonic() + most_s
        self._wait = _FIRST_S

    def next(self) -> float | None:
        """Seconds to wait before the next try; None when there is to be none."""
        if time.monotonic() >= self._deadline:
            return None
        wait = self._wait * random.uniform(0.5, 1.0)
        self._wait = min(_MOST_S, self._wait * _FACTOR)
        return wait
