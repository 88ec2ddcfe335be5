"""What each tenant has in flight, so that one of them cannot fill the node's queue.

A tenant is whom an API key or a request names, or else a connection.
"""

from __future__ import annotations

from collections import Counter

from .requests import Refusal


class Tenants:
    """most, most_tokens: answers in flight of one tenant, running or queued, and the tokens of
    their prompts and what they may get; 0 = any number."""

    def __init__(self, most: int, most_tokens: int = 0) -> None:
        self._most = most
        self._most_tokens = most_tokens
        self._in_flight: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

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

    def admit_tokens(self, tenant: str, tokens: int) -> None:
        """Counts so many tokens more.  Raises Refusal when they are too many."""
        if not self._most_tokens:
            return
        now = self._tokens.get(tenant, 0)
        if now + tokens > self._most_tokens:
            alone = tokens > self._most_tokens
            raise Refusal(
                "too_long" if alone else "queue_full",
                f"this request needs {tokens} tokens (prompts and max_tokens of all its answers), "
                f"and {now} of this client's are in flight; {self._most_tokens} are the limit for "
                "one (--max-num-tokens-per-tenant): "
                + ("ask for less" if alone else "wait for some of its answers"),
                param="max_tokens" if alone else None,
                retry=not alone,
            )
        self._tokens[tenant] += tokens

    def begin(self, tenant: str, answers: int) -> None:
        self._in_flight[tenant] += answers

    def end(self, tenant: str, answers: int, tokens: int) -> None:
        """tokens: those of these answers that were counted by admit_tokens."""
        self._in_flight[tenant] -= answers
        if self._in_flight[tenant] <= 0:
            del self._in_flight[tenant]
        if self._most_tokens and tokens:
            self._tokens[tenant] -= tokens
            if self._tokens[tenant] <= 0:
                del self._tokens[tenant]
