"""How many answers each tenant has in flight, so that one of them cannot fill the node's queue.

A tenant is whom a request names, or else its connection.
"""

from __future__ import annotations

from collections import Counter

from .requests import Refusal


class Tenants:
    """most: answers in flight of one tenant, running or queued; 0 = any number."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._in_flight: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._in_flight)

    def admit(self, tenant: str, answers: int) -> None:
        """Raises Refusal when so many answers more are too many."""
        now = self._in_flight.get(tenant, 0)
        if self._most and now + answers > self._most:
            more = "" if answers == 1 else f", and this request asks for {answers}"
            raise Refusal(
                "queue_full",
                f"{now} answers of this client are in flight{more}; "
                f"{self._most} are the limit for one (--max-num-reqs-per-tenant): wait for some of "
                "them",
                retry=True,
            )

    def begin(self, tenant: str, answers: int) -> None:
        self._in_flight[tenant] += answers

    def end(self, tenant: str, answers: int) -> None:
        self._in_flight[tenant] -= answers
        if self._in_flight[tenant] <= 0:
            del self._in_flight[tenant]
