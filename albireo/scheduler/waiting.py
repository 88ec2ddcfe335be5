"""Requests that wait for a slot, in the order in which they are to get one.

First come, first served.  A preempted request keeps its place in that order:
everything that was admitted is older than everything that waits, so it comes
back first.
"""

from __future__ import annotations

from collections import OrderedDict

from .sequences import Request


class WaitingQueue:
    """Ordered by arrival; all operations but the return of preempted requests are O(1)."""

    def __init__(self) -> None:
        self._new: OrderedDict[int, Request] = OrderedDict()
        self._preempted: dict[int, Request] = {}

    def __len__(self) -> int:
        return len(self._new) + len(self._preempted)

    def add(self, request: Request) -> None:
        """Adds a request that is newer than all that wait."""
        self._new[request.number] = request

    def put_back(self, request: Request) -> None:
        """Adds one that was preempted."""
        self._preempted[request.number] = request

    def head(self) -> Request | None:
        """The next one to be admitted."""
        if self._preempted:
            return min(self._preempted.values(), key=lambda request: request.arrival)
        return next(iter(self._new.values()), None)

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it stands."""
        if self._preempted.pop(request.number, None) is None:
            del self._new[request.number]
