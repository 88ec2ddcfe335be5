"""The requests of one visit: more than both groups can run, each in a place that is known."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

from .load import Life, Load, Story
from .node import Tree
from .plan import Cell
from .sight import MAX_NUM_SEQS, Seat, Sight

_POLL_S = 0.002
FIRST, FIRST_HTTP, TEXT, QUEUED, QUEUED_HTTP, SIZE = 0, 1, 2, 4, 5, 6
"""Numbers of clients.  The first two find idle groups, and run at once; the two behind QUEUED find
groups that have all they can run, where that matters."""
_SPARE = 4
"""Clients more, where groups have not been given as many each."""
_HTTP = (FIRST_HTTP, QUEUED_HTTP)


class Wave:
    """status: the node's tree, None when nobody answers.  patience_s: for each request to be
    seen."""

    def __init__(
        self,
        load: Load,
        sight: Sight,
        known: dict[str, list[Story]],
        rng: random.Random,
        status: Callable[[], Awaitable[Tree | None]],
        patience_s: float,
    ) -> None:
        self._load = load
        self._sight = sight
        self._known = known
        self._rng = rng
        self._status = status
        self._patience_s = patience_s
        self._steps: dict[int, int] = {}
        self.lives: list[Life] = []
        self.seats: dict[int, Seat] = {}
        """Of those whose place was looked for, by number."""

    async def begin(self, phase: str) -> bool:
        """Asks all, on an idle node; False when the places of those that matter are not known."""
        if not await self._idle():
            return False
        queue = phase == "queued"
        for number in range(QUEUED if queue else TEXT):
            if not await self._ask_and_see(number, phase):
                return False
        if queue and not await self._queue(phase):
            return False
        for number in range(len(self.seats), SIZE):
            self._ask(number, phase)
        return self.seats[FIRST].group != self.seats[FIRST_HTTP].group

    async def _queue(self, phase: str) -> bool:
        """Has somebody wait in each group, behind all that it can run."""
        spare = list(range(SIZE, SIZE + _SPARE))
        return (
            await self._fill(MAX_NUM_SEQS, spare, phase)
            and await self._ask_and_see(QUEUED, phase)
            and await self._ask_and_see(QUEUED_HTTP, phase)
            and await self._fill(MAX_NUM_SEQS + 1, spare, phase)
        )

    async def _fill(self, enough: int, spare: list[int], phase: str) -> bool:
        """Asks until each group has so many requests."""
        while self._fewest() < enough:
            if not spare or not await self._ask_and_see(spare.pop(0), phase):
                return False
        return True

    def _fewest(self) -> int:
        """Requests of the group that has fewer."""
        return min(sum(seat.group == group for seat in self.seats.values()) for group in (0, 1))

    def seat(self, cell: Cell, group: int | None) -> Seat | None:
        """Whose phase counts for a cell: of that group, where one is given."""
        if cell.phase != "queued":
            if group is None:
                return self.seats[FIRST_HTTP if cell.role == "gateway" else FIRST]
            return next(each for each in self.seats.values() if each.group == group and each.runs)
        for number, seat in self.seats.items():
            if seat.runs or group not in (None, seat.group):
                continue
            if cell.role == "gateway" and not seat.life.http:
                continue
            if cell.role == "client" and number != QUEUED:
                continue
            return seat
        return None

    def _ask(self, number: int, phase: str) -> Life:
        kind = "text" if number == TEXT else "short"
        if phase == "prefill" and number in (FIRST, FIRST_HTTP):
            kind = "long"
        story = self._rng.choice(self._known[kind])
        life = self._load.ask(number, story, number in _HTTP)
        self.lives.append(life)
        return life

    async def _idle(self) -> bool:
        """Waits until no step is planned without having been told."""
        deadline = time.monotonic() + self._patience_s
        while time.monotonic() < deadline:
            self._sight.look()
            found = {}
            for group in (0, 1):
                planned = self._sight.planned(group)
                if planned == self._sight.computed(group):
                    found[group] = planned
            if len(found) == 2 and await self._in_flight() == [0, 0]:
                self._steps = found
                return True
            await asyncio.sleep(_POLL_S)
        return False

    async def _in_flight(self) -> list[int] | None:
        tree = await self._status()
        return None if tree is None else [group["in_flight"] for group in tree["groups"]]

    async def _ask_and_see(self, number: int, phase: str) -> bool:
        """Asks, and finds the group that has one request more; False when that is not seen."""
        before = [0, 0]
        for seat in self.seats.values():
            before[seat.group] += 1
        life = self._ask(number, phase)
        deadline = time.monotonic() + self._patience_s
        while time.monotonic() < deadline and life.over is None:
            now = await self._in_flight()
            if now is None:
                return False
            more = [a - b for a, b in zip(now, before, strict=True)]
            if sorted(more) == [0, 1]:
                group = more.index(1)
                self.seats[number] = Seat(life, group, self._steps[group], before[group])
                return True
            if min(more) < 0:
                return False  # somebody has ended
            await asyncio.sleep(_POLL_S)
        return False
