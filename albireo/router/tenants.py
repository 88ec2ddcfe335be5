"""Tenants: what each may have in flight, what its turns weigh, and whose prefixes it shares.

A tenant is whom an API key or a request names, or else a connection.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from albireo.ipc.config import TenantConfig

from .requests import Refusal


class Terms(NamedTuple):
    """On whose behalf a request is, and what that means for it; each as in messages.Submit."""

    tenant: str
    weight: float
    cache_salt: str


class Tenants:
    """The rules of `config`, and how many answers and tokens of each tenant are in flight."""

    def __init__(self, config: TenantConfig) -> None:
        self._config = config
        self._in_flight: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._in_flight)

    def in_flight(self, tenant: str) -> int:
        """Answers of a tenant."""
        return self._in_flight.get(tenant, 0)

    def terms(self, tenant: str, cache_salt: str) -> Terms:
        """cache_salt: as the request has it."""
        if self._config.isolated:
            # With the name's length, so that no name and salt together look like others.
            cache_salt = f"{len(tenant)}:{tenant}{cache_salt}"
        return Terms(tenant, self._config.weights.get(tenant, 1.0), cache_salt)

    def admit(self, tenant: str, answers: int) -> None:
        """Raises Refusal when so many answers more are too many."""
        now = self.in_flight(tenant)
        most = self._config.max_num_reqs
        if most and answers > most:
            raise Refusal(
                "invalid_request",
                f"this request asks for {answers} answers; {most} are the limit for one client "
                "(--max-num-reqs-per-tenant): ask for fewer",
                param="n",
            )
        if most and now + answers > most:
            more = "" if answers == 1 else f", and this request asks for {answers}"
            raise Refusal(
                "queue_full",
                f"{now} answers of this client are in flight{more}; "
                f"{most} are the limit for one (--max-num-reqs-per-tenant): wait for some of "
                "them",
                retry=True,
            )

    def admit_tokens(self, tenant: str, tokens: int) -> None:
        """Counts so many tokens more.  Raises Refusal when they are too many."""
        most, now = self._config.max_num_tokens, self._tokens.get(tenant, 0)
        if not most:
            return
        if now + tokens > most:
            alone = tokens > most
            raise Refusal(
                "too_long" if alone else "queue_full",
                f"this request needs {tokens} tokens (prompts and max_tokens of all its answers), "
                f"and {now} of this client's are in flight; {most} are the limit for one "
                "(--max-num-tokens-per-tenant): "
                + ("ask for less" if alone else "wait for some of its answers"),
                param="max_tokens" if alone else None,
                retry=not alone,
            )
        self.count_tokens(tenant, tokens)

    def count_tokens(self, tenant: str, tokens: int) -> None:
        """Of a request that was admitted on an earlier connection."""
        if self._config.max_num_tokens:
            self._tokens[tenant] += tokens

    def begin(self, tenant: str, answers: int) -> None:
        self._in_flight[tenant] += answers

    def end(self, tenant: str, answers: int, tokens: int) -> None:
        """tokens: those of these answers that were counted by admit_tokens."""
        self._in_flight[tenant] -= answers
        if self._in_flight[tenant] <= 0:
            del self._in_flight[tenant]
        if self._config.max_num_tokens and tokens:
            self._tokens[tenant] -= tokens
            if self._tokens[tenant] <= 0:
                del self._tokens[tenant]
