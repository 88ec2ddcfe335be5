"""A node on virtual time: arrivals, the router's choice of a group, groups that take steps.

What is real: GroupTable with its prefix affinity (albireo/router), and in each
group the Scheduler (albireo/scheduler).  What is not: processes, sockets and the
device, for which the profile has times.  There are two kinds of events, an
arrival and the end of a group's oldest step; at one time the step comes first.
"""

from __future__ import annotations

import gc
import heapq
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import msgspec

from albireo.ipc.messages import Submit
from albireo.ipc.protocol import Generate
from albireo.router.groups import Group, GroupTable
from albireo.router.requests import Refusal, Stream, TokenRequest
from albireo.scheduler.limits import Limits

from .group import Done, SimulatedGroup
from .profile import Profile, StepTimes
from .report import Figures
from .workload import Arrival, Prompts

if TYPE_CHECKING:
    from albireo.router.session import Session


class NodeLimits(msgspec.Struct, frozen=True, kw_only=True):
    """groups: how many.  max_num_queued_reqs: that wait in each, beside max_num_seqs that run."""

    groups: int
    max_num_queued_reqs: int
    limits: Limits


class _Running(msgspec.Struct):
    stream: Stream
    arrived: float


class Simulation:
    """Make one, and run() it once."""

    def __init__(
        self, node: NodeLimits, profile: Profile, arrivals: Iterator[Arrival], seed: int,
        figures: Figures,
    ) -> None:  # fmt: skip
        limits = node.limits
        self.figures = figures
        self._arrivals = arrivals
        self._prompts = Prompts(seed)
        self._profile = profile
        times = StepTimes(profile, limits.max_num_seqs + limits.max_num_batched_tokens)
        most = limits.max_num_seqs + node.max_num_queued_reqs
        self._groups = [SimulatedGroup(limits, times, most) for _ in range(node.groups)]
        cached = limits.num_blocks * limits.block_size if limits.prefix_caching else 0
        self._table = GroupTable(node.groups, limits.max_num_seqs, node.max_num_queued_reqs, cached)
        for number in range(node.groups):
            self._table.joined(b"g%d" % number, number, 0)
        self._running: list[dict[int, _Running]] = [{} for _ in range(node.groups)]
        self._waiting: deque[_Running] = deque()
        self._ends: list[tuple[float, int]] = []
        self._requests = 0
        self._in_flight = 0
        self._sample_at = 0.0

    @property
    def groups(self) -> list[SimulatedGroup]:
        return self._groups

    def run(self) -> float:
        """Until everybody has an answer; returns the virtual seconds that took."""
        # Nothing here makes cycles, and looking for them takes a sixth of the time.
        gc.disable()
        try:
            return self._run()
        finally:
            gc.enable()

    def _run(self) -> float:
        arrival = next(self._arrivals, None)
        now = 0.0
        while arrival is not None or self._ends:
            end = self._ends[0][0] if self._ends else float("inf")
            sent = float("inf") if arrival is None else arrival.at + self._profile.input_ms / 1e3
            now = min(end, sent)
            if end <= sent:
                self._step_ended(heapq.heappop(self._ends)[1], now)
            elif arrival is not None:
                self._arrive(arrival, now)
                arrival = next(self._arrivals, None)
            if now >= self._sample_at:
                self._sample(now)
        return now

    def _arrive(self, arrival: Arrival, now: float) -> None:
        self._requests += 1
        running = _Running(self._stream(arrival, now), arrival.at)
        try:
            self._table.admit(self._in_flight, 1)
        except Refusal:
            self.figures.refused += 1
            return
        self._in_flight += 1
        if self._waiting or not self._place(running, now):
            self._waiting.append(running)

    def _stream(self, arrival: Arrival, now: float) -> Stream:
        number = self._requests & 0x7FFFFFFF
        asked = Generate(id=number, tenant=arrival.tenant or "-", priority=arrival.priority)
        # A stream of a client that is not there: nothing is ever sent to its session.
        stream = Stream(TokenRequest(cast("Session", None), asked), 0, number, now)
        stream.submit = Submit(
            number, self._prompts.of(arrival), arrival.output_len, 0, 0.0, 0, 1.0, 0.0, 0, (), (),
            False, True, priority=arrival.priority, tenant=asked.tenant,
        )  # fmt: skip
        return stream

    def _place(self, running: _Running, now: float) -> bool:
        stream = running.stream
        chosen = self._table.choose(stream)
        if chosen is None:
            return False
        assert stream.submit is not None
        number, refused = self._groups[chosen.number].submit(stream.submit)
        if refused is not None:
            self.figures.refuse(refused.message)
            self._in_flight -= 1
            return True
        chosen.add(stream)
        self._running[chosen.number][number] = running
        self._plan(chosen.number, now)
        return True

    def _plan(self, number: int, now: float) -> None:
        group = self._groups[number]
        idle = group.next_end == float("inf")
        if group.plan(now) and idle:
            heapq.heappush(self._ends, (group.next_end, number))

    def _step_ended(self, number: int, now: float) -> None:
        group = self._groups[number]
        for done in group.finish(self.figures.itl):
            self._ended(number, done)
        if group.next_end < float("inf"):
            heapq.heappush(self._ends, (group.next_end, number))
        self._plan(number, now)
        while self._waiting and self._place(self._waiting[0], now):
            self._waiting.popleft()

    def _ended(self, number: int, done: Done) -> None:
        running = self._running[number].pop(done.number)
        self._in_flight -= 1
        stream = running.stream
        group = stream.group
        assert isinstance(group, Group)
        group.outstanding_tokens -= done.tokens
        stream.token_ids = [0] * done.tokens
        group.remember(stream)
        group.remove(stream)
        out_s = self._profile.output_ms / 1e3
        self.figures.add(running.arrived, done.first + out_s, done.last + out_s, done.tokens)

    def _sample(self, now: float) -> None:
        """Who runs and waits, for the plot: a bounded number of samples."""
        running = sum(group.scheduler.running for group in self._groups)
        waiting = self._in_flight - running
        self._sample_at = now + self.figures.sample(now, running, waiting)
