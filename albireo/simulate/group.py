"""One simulated group: the real Scheduler, and a device that only takes time.

    plan n+1 lies ready ──┐
    device    │ step n    │ step n+1   │
    scheduler             │ apply n, plan n+2

A step begins when its plan is there and the step before has ended, as in a
worker.  Nothing of a planned step is open: when it ends, and who ends with it,
is known as soon as it is planned, and that is what lets the groups of a node be
simulated apart (shard.py).

Requests are told apart by numbers of this group's own, small ones, so that the
times of all tokens of a step are one array operation.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple, cast

import msgspec
import numpy as np

from albireo.ipc.messages import Submit
from albireo.ipc.plan import ROW_WORDS, Int32Array
from albireo.scheduler.draft import Plan
from albireo.scheduler.limits import Limits
from albireo.scheduler.scheduler import Scheduler

from .histogram import Histogram
from .profile import Profile, StepTimes

TOKEN = 7
"""All that is ever generated."""
_CHUNK_SLOT, _CHUNK_START, _CHUNK_LENGTH, _CHUNK_SAMPLES = range(4)


class GroupShape(NamedTuple):
    """ranks: over which the model is split."""

    limits: Limits
    ranks: int


class Placed(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request that the router gives to a group.

    key: the router's number for it.  at: when it is there, seconds.  prompt: ids, int32.
    """

    group: int
    key: int
    at: float
    prompt: bytes
    max_tokens: int
    priority: int
    tenant: str
    weight: float
    cache_salt: str


class Done(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request that ends.  first, last: when its first and last token come, seconds."""

    key: int
    first: float
    last: float


class _Flight(NamedTuple):
    """A step that is planned.

    rows: of its result, as in ipc.plan.ResultView.  begin, end: seconds; then that is there.
    ending: requests that end with it.
    """

    step: int
    rows: Int32Array
    begin: float
    end: float
    step_us: int
    ending: list[int]


class SimulatedGroup:
    """most: requests at once, running and waiting."""

    def __init__(self, number: int, shape: GroupShape, profile: Profile, most: int) -> None:
        limits = shape.limits
        rows = range(limits.max_num_seqs + limits.max_num_batched_tokens + 1)
        self.number = number
        self.scheduler = Scheduler(limits)
        self.busy_s = 0.0
        self.gaps = Histogram()
        self.delivered = 0
        self.done: list[Done] = []
        self._times = StepTimes(profile, rows, shape.ranks)
        self.scheduler.swap_block_us = self._times.swap_block_us
        self._free_at = 0.0
        self._plan_at = math.inf
        self._flights: deque[_Flight] = deque()
        # A number rests for long after its request's end: nothing in flight names it then.
        self._numbers = deque(range(1, 4 * most + 1))
        self._keys = [0] * (4 * most + 1)
        self._first = np.zeros(4 * most + 1)
        self._last = np.zeros(4 * most + 1)

    def horizon(self, now: float) -> float:
        """Before when no step ends that is not planned now, whatever comes from now on."""
        return max(now, self._free_at) + self._times.least_s

    def advance(self, placed: Iterable[Placed], until: float) -> None:
        """Lives on to a point in time, and not to what happens just then.

        placed: what comes meanwhile, in the order of time.
        Adds to `done` who ends with the steps that are planned meanwhile, and to `delivered` the
        tokens of those that end.
        """
        for each in placed:
            while self._next_event() <= each.at:
                self._pass_event()
            self._submit(each)
            self._plan(each.at)
        while self._next_event() < until:
            self._pass_event()

    def _next_event(self) -> float:
        """When a step ends, or a plan is due that waited for more requests."""
        return min(self._plan_at, self._flights[0].end if self._flights else math.inf)

    def _pass_event(self) -> None:
        if self._plan_at <= self._flights[0].end:
            self._plan(self._plan_at)
        else:
            self._finish()

    def _submit(self, placed: Placed) -> None:
        number = self._numbers.popleft()
        self._keys[number] = placed.key
        self._first[number] = 0.0
        prompt = cast("list[int]", np.frombuffer(placed.prompt, np.int32))
        refused = self.scheduler.submit(
            Submit(
                number, prompt, placed.max_tokens, 0, 0.0, 0, 1.0, 0.0, 0, (), (), False, True,
                priority=placed.priority, tenant=placed.tenant, weight=placed.weight,
                cache_salt=placed.cache_salt,
            )
        )  # fmt: skip
        if refused is not None:
            raise RuntimeError(f"the router has let through what never fits: {refused.message}")

    def _plan(self, now: float) -> None:
        """Plans what can be planned, as the scheduler's process does."""
        while not self._waits_for_more(now) and (plan := self.scheduler.plan()) is not None:
            positions = self.scheduler.sequences.planned[plan.sections.decode]
            step_s = self._step_s(plan, int(positions.sum()))
            begin = max(now, self._free_at)
            self._free_at = end = begin + step_s
            self.busy_s += step_s
            rows = np.empty((len(plan.sampled), ROW_WORDS), np.int32)
            rows[:, 0] = plan.sampled
            rows[:, 1] = 1
            rows[:, 2] = TOKEN
            ending = self._tell(plan, end)
            step_us = round(step_s * 1e6)
            self._flights.append(_Flight(plan.step, rows, begin, end, step_us, ending))

    def _waits_for_more(self, now: float) -> bool:
        self._plan_at = math.inf
        if self._flights:
            due = self._flights[0].begin + self.scheduler.plan_after_us() / 1e6
            # The step may end long before it was expected to.
            if now < due < self._flights[0].end:
                self._plan_at = due
            return now < due
        return False

    def _tell(self, plan: Plan, end: float) -> list[int]:
        """Notes the times of a step's tokens; returns the requests that end with it."""
        decode, chunk = plan.sections.decode, plan.sections.chunk
        requests = plan.sampled
        slots = decode
        first = len(requests) - len(decode)
        if first:
            chunks = chunk[chunk[:, _CHUNK_SAMPLES] == 1, _CHUNK_SLOT]
            slots = np.concatenate([chunks, decode])
            prefilled = requests[:first]
            new = self._first[prefilled] == 0.0
            self._first[prefilled[new]] = end
            self.gaps.add_all(end - self._last[prefilled[~new]])  # they were preempted
        self.gaps.add_all(end - self._last[requests[first:]])
        self._last[requests] = end
        seq = self.scheduler.sequences
        at_end = seq.planned[slots] >= seq.end_len[slots] - 1
        if not at_end.any():
            return []
        ending: list[int] = requests[at_end].tolist()
        self.done += [Done(self._keys[each], float(self._first[each]), end) for each in ending]
        return ending

    def _finish(self) -> None:
        """The oldest step in flight ends, and what can be is planned."""
        flight = self._flights.popleft()
        self.delivered += len(flight.rows)
        ended = self.scheduler.apply(flight.step, flight.rows, flight.step_us)
        if [each.request for each in ended] != flight.ending:
            raise RuntimeError(f"step {flight.step} ends {ended}, and not {flight.ending}")
        self._numbers += flight.ending
        self._plan(flight.end)

    def _step_s(self, plan: Plan, kv_tokens: int) -> float:
        """kv_tokens: that its decodes read."""
        sections = plan.sections
        decode, chunk = sections.decode, sections.chunk
        prefill = pairs = 0
        if len(chunk):
            start = chunk[:, _CHUNK_START].astype(np.int64)
            length = chunk[:, _CHUNK_LENGTH].astype(np.int64)
            prefill = int(length.sum())
            pairs = int((length * (start + (length + 1) // 2)).sum())
        return self._times.step_s(len(decode) + prefill, kv_tokens, pairs, len(sections.copy))
