"""Who is connected, and how many may be: in all, over TCP, and with one API key.

A connection is an open file, of which the process has a limit.  Clients over TCP
get at most half of the places, and one key at most a quarter of those: a flood
from outside locks nobody out who is on this machine, nor the other keys.
"""

from __future__ import annotations

from collections import Counter

from .requests import Refusal
from .session import Session

MAX_CONNECTIONS = 8192
_SPARE_FILES = 128
_ADVICE = "use one connection for many requests"


class Connections:
    """open_files: that the process may have.  incarnation: of the router, in connections' names."""

    def __init__(self, open_files: int, incarnation: int) -> None:
        self._incarnation = incarnation
        self.sessions: set[Session] = set()
        self._open_files = open_files
        self._count = 0
        self._remote = 0
        self._of_key: Counter[str] = Counter()

    @property
    def most(self) -> int:
        return max(16, min(MAX_CONNECTIONS, self._open_files - _SPARE_FILES))

    def opened(self, session: Session) -> Refusal | None:
        """Names the connection; the Refusal is for one too many."""
        self.sessions.add(session)
        self._count += 1
        session.connection = f"#{self._incarnation}.{self._count}"
        self._remote += session.remote
        if len(self.sessions) > self.most:
            return _too_many(self.most, "clients are connected")
        if session.remote and self._remote > self.most // 2:
            return _too_many(self.most // 2, "clients are connected over TCP")
        return None

    def known(self, session: Session) -> Refusal | None:
        """The session's tenant is that of its key; the Refusal is for one too many of these."""
        self._of_key[session.tenant] += 1
        most = max(1, self.most // 8)
        if self._of_key[session.tenant] > most:
            return _too_many(most, "clients are connected with this API key")
        return None

    def closed(self, session: Session) -> None:
        if session not in self.sessions:  # its client had another one, and now it is lost, too
            return
        self.sessions.remove(session)
        self._remote -= session.remote
        if session.tenant:
            self._of_key[session.tenant] -= 1
            if not self._of_key[session.tenant]:
                del self._of_key[session.tenant]


def _too_many(most: int, who: str) -> Refusal:
    return Refusal("unavailable", f"{most} {who}, which is the limit: {_ADVICE}", retry=True)
