"""A node on virtual time: arrivals, the router's choice of a group, groups that take steps.

What is real: GroupTable with its prefix affinity and Tenants (albireo/router), and in each
group the Scheduler (albireo/scheduler).  What is not: processes, sockets and the
device, for which the profile has times.

    router   │ decides for window k+1          │ k+2
    groups   │ live through window k           │ k+1

Here is the router; the groups are in shards (shard.py), which may be processes of
their own.  What comes out does not depend on how many there are.
"""

from __future__ import annotations

import gc
import heapq
import itertools
from array import array
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import msgspec

from albireo.ipc.config import TenantConfig
from albireo.ipc.messages import Submit
from albireo.ipc.protocol import Generate
from albireo.router.groups import Group, GroupTable
from albireo.router.requests import Refusal, Stream, TokenRequest
from albireo.router.tenants import Tenants

from .group import TOKEN, GroupShape, Placed
from .profile import Profile, StepTimes
from .report import NOBODY, Figures
from .shard import LocalShard, RemoteShard, Report, Shard
from .workload import Arrival, Prompts

if TYPE_CHECKING:
    from albireo.router.session import Session

_NEVER = float("inf")
_TOKENS = array("i", [TOKEN])
_ALL_EQUAL = TenantConfig()
_ROUTER = 0.25
"""What routing takes, of what the groups take."""


class _Away:
    """The session of a client that is not there: nothing is ever sent to it."""

    tenant = connection = ""


_AWAY = cast("Session", _Away())


class _Running(msgspec.Struct):
    """A request from its arrival to its end.  first: when its first token comes."""

    stream: Stream
    arrived: float
    first: float = 0.0


class Simulation:
    """Make one, and run() it once.

    max_num_queued_reqs: that wait in each group, beside max_num_seqs that run.
    processes: at most so many share the groups.
    """

    def __init__(
        self, groups: list[GroupShape], max_num_queued_reqs: int, profile: Profile,
        arrivals: Iterator[Arrival], seed: int, figures: Figures, processes: int = 1,
        tenants: TenantConfig = _ALL_EQUAL,
    ) -> None:  # fmt: skip
        limits = groups[0].limits
        self.figures = figures
        self._limits = {shape.limits for shape in groups}
        self._arrivals = arrivals
        self._next = next(arrivals, None)
        self._prompts = Prompts(seed)
        self._profile = profile
        most = limits.max_num_seqs + max_num_queued_reqs
        rows = range(limits.max_num_seqs + limits.max_num_batched_tokens + 1)
        degrees = {shape.ranks for shape in groups}
        self._least_s = min(StepTimes(profile, rows, each).least_s for each in degrees)
        self._numbers = _shares(len(groups), processes)
        self._shards: list[Shard] = [
            (LocalShard if not place else RemoteShard)(
                {number: groups[number] for number in numbers}, profile, most
            )
            for place, numbers in enumerate(self._numbers)
        ]
        cached = limits.num_blocks * limits.block_size if limits.prefix_caching else 0
        self._table = GroupTable(len(groups), limits.max_num_seqs, max_num_queued_reqs, cached)
        for number in range(len(groups)):
            self._table.joined(b"g%d" % number, number, 0)
        self._tenants = Tenants(tenants)
        self._running: dict[int, _Running] = {}
        self._waiting: deque[_Running] = deque()
        self._ends: list[tuple[float, int]] = []
        self._placed: list[list[Placed]] = [[] for _ in self._shards]
        self._shard_of = {
            number: place for place, numbers in enumerate(self._numbers) for number in numbers
        }
        self._requests = 0
        self._in_flight = 0
        self._now = 0.0
        self._sample_at = 0.0

    def run(self) -> float:
        """Until everybody has an answer; returns the virtual seconds that took."""
        # Nothing here makes cycles, and looking for them takes a sixth of the time.
        gc.disable()
        try:
            self._run()
            for result in [shard.finish() for shard in self._shards]:
                self.figures.take(result)
        finally:
            gc.enable()
            for shard in self._shards:
                if isinstance(shard, RemoteShard):
                    shard.close()
        return self._now

    def _run(self) -> None:
        """Up to `horizon` all ends are known, up to `routed` all decisions are made."""
        routed, horizon = 0.0, self._least_s
        while self._next is not None or self._running:
            here, in_flight = routed, self._in_flight
            placed, self._placed = self._placed, [[] for _ in self._shards]
            for shard, each in zip(self._shards, placed, strict=True):
                shard.advance(each, here)
            if not self._running and self._next is not None:
                # Nothing runs: nothing ends before what comes next does.
                horizon = max(horizon, self._sent(self._next) + self._least_s)
            routed = max(routed, horizon)
            self._route(routed)
            reports = [shard.report() for shard in self._shards]
            horizon = min(report.horizon for report in reports)
            self._take(reports, routed)
            if here >= self._sample_at:
                running = sum(report.running for report in reports)
                self._sample_at = here + self.figures.sample(here, running, in_flight - running)

    def _take(self, reports: list[Report], routed: float) -> None:
        """What the groups have to say: who ends when, and tokens that the router has seen."""
        groups = list(self._table)
        for report, numbers in zip(reports, self._numbers, strict=True):
            for number, tokens in zip(numbers, report.delivered, strict=True):
                groups[number].outstanding_tokens -= tokens
            for done in report.done:
                if done.last < routed:
                    raise RuntimeError(f"an end at {done.last} s is known only at {routed} s")
                self._running[done.key].first = done.first
                heapq.heappush(self._ends, (done.last, done.key))

    def _route(self, until: float) -> None:
        """All arrivals and ends before a point in time, in their order."""
        while True:
            end = self._ends[0][0] if self._ends else _NEVER
            sent = _NEVER if self._next is None else self._sent(self._next)
            if min(end, sent) >= until:
                return
            if end <= sent:
                self._now = end
                self._end_all(end)
            elif self._next is not None:
                self._now = sent
                self._arrive(self._next, sent)
                self._next = next(self._arrivals, None)

    def _sent(self, arrival: Arrival) -> float:
        """When it is at its scheduler, if nobody keeps it waiting."""
        return arrival.at + self._profile.input_ms / 1e3

    def _arrive(self, arrival: Arrival, now: float) -> None:
        self._requests += 1
        tenant = arrival.tenant or NOBODY
        try:
            self._table.admit(self._in_flight, 1, self._tenants.in_flight(tenant))
            self._tenants.admit(tenant, 1)
        except Refusal:
            self.figures.refused += 1
            return
        if self._never(arrival):
            return
        self._in_flight += 1
        self._tenants.begin(tenant, 1)
        # Its prompt is made now: what is refused may be longer than memory holds.
        running = _Running(self._stream(arrival, tenant, now), arrival.at)
        self._running[running.stream.request] = running
        if self._waiting or not self._place(running, now):
            self._waiting.append(running)

    def _never(self, arrival: Arrival) -> bool:
        """Whether it can never run on one of them, and so is refused."""
        length = arrival.input_len if arrival.prompt_ids is None else len(arrival.prompt_ids)
        for limits in self._limits:
            if (reason := limits.why_never(length, arrival.output_len)) is not None:
                self.figures.refuse(reason)
                return True
        return False

    def _stream(self, arrival: Arrival, tenant: str, now: float) -> Stream:
        number = self._requests
        terms = self._tenants.terms(tenant, "")
        asked = Generate(id=number, tenant=terms.tenant, priority=arrival.priority)
        stream = Stream(TokenRequest(_AWAY, asked), 0, number, now)
        prompt = self._prompts.of(arrival)
        stream.submit = Submit(
            number, cast("list[int]", prompt), arrival.output_len, 0, 0.0, 0, 1.0, 0.0, 0, (), (),
            False, True, priority=arrival.priority, tenant=terms.tenant, weight=terms.weight,
            cache_salt=terms.cache_salt,
        )  # fmt: skip
        return stream

    def _place(self, running: _Running, now: float) -> bool:
        stream = running.stream
        chosen = self._table.choose(stream)
        if chosen is None:
            return False
        submit = stream.submit
        assert submit is not None
        chosen.add(stream)
        self._placed[self._shard_of[chosen.number]].append(
            Placed(
                chosen.number, submit.request, now, _ids(submit).tobytes(),
                submit.max_tokens, submit.priority, submit.tenant, submit.weight, submit.cache_salt,
            )
        )  # fmt: skip
        return True

    def _end_all(self, now: float) -> None:
        """All that end just now; then those get their places that wait for one."""
        while self._ends and self._ends[0][0] == now:
            running = self._running.pop(heapq.heappop(self._ends)[1])
            self._in_flight -= 1
            stream = running.stream
            self._tenants.end(stream.asker.tenant, 1, 0)
            group = stream.group
            assert isinstance(group, Group) and stream.submit is not None
            stream.token_ids = cast("list[int]", _TOKENS * stream.submit.max_tokens)
            group.remember(stream)
            group.remove(stream)
            out_s = self._profile.output_ms / 1e3
            self.figures.add(
                stream.asker.tenant, running.arrived, running.first + out_s, now + out_s,
                len(stream.token_ids),
            )  # fmt: skip
        while self._waiting and self._place(self._waiting[0], now):
            self._waiting.popleft()


def _ids(submit: Submit) -> array[int]:
    """Of its prompt: here they are an array, which the router slices and joins like a list."""
    return cast("array[int]", submit.prompt_ids)


def _shares(groups: int, processes: int) -> list[range]:
    """Numbers of the groups of each process; the first one, which is the router's, has fewer."""
    processes = max(1, min(processes, groups))
    if processes == 1:
        return [range(groups)]
    own = max(0, round(groups * (1 - _ROUTER * (processes - 1)) / processes))
    others = (own + (groups - own) * place // (processes - 1) for place in range(processes))
    return [range(begin, end) for begin, end in itertools.pairwise([0, *others])]
