"""One simulated group: the real Scheduler, and a device that only takes time.

    plan n+1 lies ready ──┐
    device    │ step n    │ step n+1   │
    scheduler             │ apply n, plan n+2

A step begins when its plan is there and the step before has ended, as in a
worker.  Requests are told apart by numbers of this group's own, small ones, so
that the times of all tokens of a step are one array operation.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import msgspec
import numpy as np

from albireo.ipc.messages import Refused, Submit
from albireo.ipc.plan import ROW_WORDS, Int32Array
from albireo.scheduler.draft import Plan
from albireo.scheduler.limits import Limits
from albireo.scheduler.scheduler import Ended, Scheduler

from .histogram import Histogram
from .profile import StepTimes

_TOKEN = 7
_CHUNK_START, _CHUNK_LENGTH = 1, 2


class Flight(NamedTuple):
    """A step that is planned.

    chunks: how many of its rows, the first ones, are of prompts.
    end: when its result is there, seconds.
    """

    step: int
    rows: Int32Array
    chunks: int
    end: float
    step_us: int


class Done(NamedTuple):
    """A request of the group that has ended.  first, last: when its tokens came, seconds."""

    number: int
    tokens: int
    first: float
    last: float


class SimulatedGroup:
    """most: requests at once, running and waiting."""

    def __init__(self, limits: Limits, times: StepTimes, most: int) -> None:
        self.scheduler = Scheduler(limits)
        self.busy_s = 0.0
        self._times = times
        self._free_at = 0.0
        self._flights: deque[Flight] = deque()
        # A number rests for long after its request's end: nothing in flight names it then.
        self._numbers = deque(range(1, 4 * most + 1))
        self._first = np.zeros(4 * most + 1)
        self._last = np.zeros(4 * most + 1)

    @property
    def next_end(self) -> float:
        """When the oldest step in flight ends; infinite when there is none."""
        return self._flights[0].end if self._flights else float("inf")

    def submit(self, submit: Submit) -> tuple[int, Refused | None]:
        """Queues a request under a number of this group; its `request` field is not used."""
        number = self._numbers.popleft()
        self._first[number] = 0.0
        refused = self.scheduler.submit(msgspec.structs.replace(submit, request=number))
        if refused is not None:
            self._numbers.append(number)
        return number, refused

    def plan(self, now: float) -> bool:
        """Plans what can be planned; whether anything was."""
        planned = False
        while (plan := self.scheduler.plan()) is not None:
            planned = True
            step_s = self._step_s(plan)
            self._free_at = max(now, self._free_at) + step_s
            self.busy_s += step_s
            rows = np.empty((len(plan.sampled), ROW_WORDS), np.int32)
            rows[:, 0] = plan.sampled
            rows[:, 1] = 1
            rows[:, 2] = _TOKEN
            chunks = len(rows) - len(plan.sections.decode)
            flight = Flight(plan.step, rows, chunks, self._free_at, round(step_s * 1e6))
            self._flights.append(flight)
        return planned

    def finish(self, gaps: Histogram) -> list[Done]:
        """The oldest step has ended.  Returns who has ended with it; `gaps` gets the times between
        tokens."""
        flight = self._flights.popleft()
        requests = flight.rows[:, 0]
        if flight.chunks:
            first = requests[: flight.chunks]
            first = first[self._first[first] == 0.0]  # others have been preempted
            self._first[first] = flight.end
        gaps.add_all(flight.end - self._last[requests[flight.chunks :]])
        self._last[requests] = flight.end
        ended = self.scheduler.apply(flight.step, flight.rows, flight.step_us)
        return [self._done(each) for each in ended]

    def _done(self, ended: Ended) -> Done:
        number = ended.request
        self._numbers.append(number)
        return Done(number, ended.generated, float(self._first[number]), float(self._last[number]))

    def _step_s(self, plan: Plan) -> float:
        sections = plan.sections
        decode, chunk = sections.decode, sections.chunk
        prefill = pairs = 0
        if len(chunk):
            start = chunk[:, _CHUNK_START].astype(np.int64)
            length = chunk[:, _CHUNK_LENGTH].astype(np.int64)
            prefill = int(length.sum())
            pairs = int((length * (start + (length + 1) // 2)).sum())
        kv_tokens = int(self.scheduler.sequences.planned[decode].sum())
        return self._times.step_s(len(decode) + prefill, kv_tokens, pairs, len(sections.copy))
