"""Requests that wait for a slot, in the order in which they are to get one.

    priorities    the one whose oldest request has the lowest rank: the lower
                  number first, with aging (requests.AGING_STEPS)
    tenants       in turn, by start-time fair queuing: a tenant's tag grows by the
                  tokens that are computed for it, divided by its weight, and the
                  lowest tag is next.
                  Whoever begins to wait starts from where the turn is, which moves
                  on by everybody's fair part of what is computed: nobody saves up
                  turns, and no number of newcomers keeps the others waiting
    requests      first come, first served; one that was preempted is older than
                  all others of its priority and tenant that wait, so it is first

All operations take O(log tenants), but for a look at each priority in use.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict

from .requests import Request, Share

_SPARE_TENANTS = 64  # tags of tenants that do not wait, kept besides twice those that do


class _Tenant:
    """tag: tokens for a weight of 1, on the scale of its priority.  in_heap: it has an entry in
    `by_tag`."""

    __slots__ = ("in_heap", "requests", "tag", "weight")

    def __init__(self, weight: float, tag: float) -> None:
        self.weight = weight
        self.tag = tag
        self.in_heap = False
        self.requests: OrderedDict[int, Request] = OrderedDict()


class _Priority:
    """The requests of one priority.

    preempted: those among them that are back at the front of their tenant's queue.
    turn: where newcomers start: at the tag of the tenant that was served last, or beyond.
    by_tag: a heap of (tag, arrival of its first request, tenant), an entry for
        each tenant that waits; it is put right, or dropped, when it comes up.
    weights: of those tenants, together.
    """

    def __init__(self) -> None:
        self._preempted: dict[int, Request] = {}
        self._by_arrival: OrderedDict[int, Request] = OrderedDict()
        self._tenants: dict[str, _Tenant] = {}
        self._by_tag: list[tuple[float, int, str]] = []
        self._weights = 0.0
        self._turn = 0.0

    def __len__(self) -> int:
        return len(self._preempted) + len(self._by_arrival)

    def oldest_rank(self) -> int:
        """Of all that wait; there is one at least."""
        known = list(self._preempted.values())
        if self._by_arrival:
            known.append(next(iter(self._by_arrival.values())))
        return min(request.rank for request in known)

    def add(self, request: Request) -> None:
        self._queued(request).requests[request.number] = request
        self._by_arrival[request.number] = request

    def put_back(self, request: Request) -> None:
        """To the front of its tenant's, but behind older ones that are there already."""
        older = [
            each
            for each in self._preempted.values()
            if each.tenant == request.tenant and each.arrival < request.arrival
        ]
        older.sort(key=lambda each: each.arrival)
        self._preempted[request.number] = request
        requests = self._queued(request).requests
        requests[request.number] = request
        for each in (request, *older[::-1]):
            requests.move_to_end(each.number, last=False)

    def _queued(self, request: Request) -> _Tenant:
        """The request's tenant, which waits from now on."""
        tenant = self._tenant(request.share)
        if not tenant.requests:
            tenant.tag = max(tenant.tag, self._turn)
        if not tenant.in_heap:
            tenant.in_heap = True
            self._weights += tenant.weight
            heapq.heappush(self._by_tag, (tenant.tag, request.arrival, request.tenant))
        return tenant

    def head(self) -> Request:
        """The next one; there is one at least."""
        while True:
            tag, _, name = self._by_tag[0]
            tenant = self._tenants[name]
            if not tenant.requests:
                heapq.heappop(self._by_tag)
                tenant.in_heap = False
                self._weights -= tenant.weight
                continue
            first = next(iter(tenant.requests.values()))
            if tag == tenant.tag:
                return first
            heapq.heapreplace(self._by_tag, (tenant.tag, first.arrival, name))

    def take(self, request: Request, tokens: int) -> None:
        """Removes the head; its tenant pays for these tokens, but not again after a preemption."""
        if not request.preemptions:
            self._turn = max(self._turn, self._tenants[request.tenant].tag)
            self.charge(request.share, tokens)
        self.remove(request)

    def remove(self, request: Request) -> None:
        if self._preempted.pop(request.number, None) is None:
            del self._by_arrival[request.number]
        del self._tenants[request.tenant].requests[request.number]

    def charge(self, share: Share, tokens: int) -> None:
        tenant = self._tenant(share)
        if not tenant.requests:
            tenant.tag = max(tenant.tag, self._turn)
        tenant.tag += tokens / share.weight
        self._turn += tokens / (self._weights + 1.0)

    def _tenant(self, share: Share) -> _Tenant:
        tenant = self._tenants.get(share.tenant)
        if tenant is None:
            if len(self._tenants) > 2 * len(self._by_tag) + _SPARE_TENANTS:
                self._tenants = {
                    name: each
                    for name, each in self._tenants.items()
                    if each.in_heap or each.tag > self._turn
                }
            tenant = self._tenants[share.tenant] = _Tenant(share.weight, self._turn)
        return tenant


class WaitingQueue:
    """All that wait; a preempted request also while the last step that names its slot runs.

    prompt_tokens: of their prompts, together.
    """

    def __init__(self) -> None:
        self._priorities: dict[int, _Priority] = {}
        self._waiting = 0
        self.prompt_tokens = 0

    def __len__(self) -> int:
        return self._waiting

    def add(self, request: Request) -> None:
        """Adds a request that is newer than all that wait."""
        self._priority(request.priority).add(request)
        self._added(request)

    def put_back(self, request: Request) -> None:
        """Adds one that was preempted."""
        self._priority(request.priority).put_back(request)
        self._added(request)

    def head(self) -> Request | None:
        """The next one to be admitted."""
        if not self._waiting:
            return None
        if len(self._priorities) == 1:
            (only,) = self._priorities.values()
            return only.head()
        number = min(self._priorities, key=lambda p: (self._priorities[p].oldest_rank(), p))
        return self._priorities[number].head()

    def take(self, request: Request, tokens: int) -> None:
        """Takes the head out: it is admitted.  tokens: of its prompt, to be computed."""
        self._priorities[request.priority].take(request, tokens)
        self._removed(request)

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it stands: it has ended."""
        self._priorities[request.priority].remove(request)
        self._removed(request)

    def charge(self, share: Share, tokens: int) -> None:
        """So many tokens have been computed for a tenant besides its prompts."""
        if share.priority in self._priorities:
            self._priorities[share.priority].charge(share, tokens)

    def by_priority(self) -> dict[int, int]:
        """How many wait at each priority."""
        return {number: len(each) for number, each in sorted(self._priorities.items())}

    def _priority(self, number: int) -> _Priority:
        priority = self._priorities.get(number)
        if priority is None:
            priority = self._priorities[number] = _Priority()
        return priority

    def _added(self, request: Request) -> None:
        self._waiting += 1
        self.prompt_tokens += request.prompt_len

    def _removed(self, request: Request) -> None:
        """Where nobody waits any more, there are no turns either: everybody starts equal."""
        self._waiting -= 1
        self.prompt_tokens -= request.prompt_len
        if not len(self._priorities[request.priority]):
            del self._priorities[request.priority]
