"""Faults, each while a request is known to be in the phase that its cell names."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from .faults import harm
from .load import Load
from .plan import ANY_PHASE, OF_A_GROUP, Cell
from .sight import Seat, Sight
from .wave import Wave

_POLL_S = 0.001
_STEPS_BEFORE = 2
"""Of the last one: then who is to have the last token is held up.  A ring has room for four."""


@dataclass
class Aim:
    """A cell, whose phase counts for it, and who is harmed for it.

    held: who is stopped for a moment so that the last token stays where it is; None = nobody.
    also: who is killed meanwhile.  cuts: the client whose connection is cut.
    """

    cell: Cell
    seat: Seat | None
    victim: int | None
    held: int | None = None
    also: int | None = None
    cuts: int | None = None


@dataclass
class Blows:
    """What has been done: `struck` were harmed, the phase of `sure` being certain before and behind
    it.  missed: why others were not.  lifts: to be called afterwards.  at: when, by
    time.monotonic()."""

    struck: list[Aim] = field(default_factory=list)
    sure: list[Aim] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    lifts: list[Callable[[], None]] = field(default_factory=list)
    at: float = 0.0


def aims(cells: list[Cell], wave: Wave, pids: dict[str, int]) -> list[Aim]:
    """Of cells that can be visited together.  pids: by the actors' names."""
    groups = [wave.seats[number].group for number in sorted(wave.seats)[:2]]
    found = []
    for cell in cells:
        group = groups.pop(0) if cell.role in OF_A_GROUP else None
        seat = None if cell.phase == ANY_PHASE else wave.seat(cell, group)
        at = f"g{0 if seat is None else seat.group}"
        names = {"worker": f"{at}.worker0", "gateway": "gateway0"}
        names |= {role: f"{at}.{role}" for role in ("scheduler", "detokenizer")}
        aim = Aim(cell, seat, pids.get(names.get(cell.role, cell.role)))
        if cell.role == "supervisor":
            aim.also = pids.get(names["worker"])
        elif cell.role == "client" and seat is not None:
            aim.cuts = seat.life.number
        if cell.phase == "ending":
            holder = {"gateway": "gateway0", "router": "router", "client": "router"}
            aim.held = pids.get(holder.get(cell.role, names["detokenizer"]))
        found.append(aim)
    return found


class Strike:
    """patience_s: for a phase to come, less for a process that is held up."""

    def __init__(self, sight: Sight, load: Load, patience_s: float, held_s: float) -> None:
        self._sight = sight
        self._load = load
        self._patience_s = patience_s
        self._held_s = held_s
        self._held: set[int] = set()

    async def hit(self, aimed: list[Aim]) -> Blows:
        """Waits for the phases, and does the harm to those whose phase has come."""
        blows = Blows()
        try:
            came = await asyncio.gather(*(self._wait_for(aim) for aim in aimed))
            blows.at = time.monotonic()
            for aim, missed in zip(aimed, came, strict=True):
                why = missed or self._doubt(aim) or self._harm(aim, blows.lifts)
                if not why:
                    blows.struck.append(aim)
                    continue
                blows.missed.append(f"{'/'.join(aim.cell)} missed: {why}")
            blows.sure = [aim for aim in blows.struck if not self._doubt(aim)]
        finally:
            self._let_go(blows.struck)
        return blows

    def _doubt(self, aim: Aim) -> str:
        """Why it is not sure that the request is in its phase; "" = it is."""
        if aim.seat is None:
            return "" if aim.cell.phase == ANY_PHASE else "no request has that place"
        sure = self._sight.in_phase(aim.seat, aim.cell.phase)
        return "" if sure else "its request is not in that phase"

    async def _wait_for(self, aim: Aim) -> str:
        """Until its phase has come; why it has not."""
        seat = aim.seat
        if seat is None:
            return self._doubt(aim)
        if aim.cell.phase == "ending":
            return await self._hold(aim, seat)
        came = await self._until(lambda: not self._doubt(aim), seat, self._patience_s)
        return "" if came else "the phase did not come"

    async def _hold(self, aim: Aim, seat: Seat) -> str:
        """Stops who is to have the last token, before it does, and waits until it is there."""
        sight, group, last = self._sight, seat.group, seat.last_step
        if aim.held is None or not await self._until(
            lambda: sight.told(group) >= last - _STEPS_BEFORE, seat, self._patience_s
        ):
            return "the last steps did not come"
        self._held.add(aim.held)
        os.kill(aim.held, signal.SIGSTOP)
        if not await self._until(lambda: _stopped(aim.held), seat, self._held_s):
            return f"pid {aim.held} did not stop"
        if sight.told(group) >= last:
            return "the last token was faster"
        detokenizer = aim.cell.role not in ("gateway", "router", "client")

        def there() -> bool:  # the worker counts a step behind its delivery
            return sight.computed(group) >= last and (detokenizer or sight.told(group) >= last)

        if not await self._until(there, seat, self._held_s):
            return f"the last token was not computed within {self._held_s:.1f} s"
        return ""

    async def _until(self, happened: Callable[[], bool], seat: Seat, within_s: float) -> bool:
        deadline = time.monotonic() + within_s
        while not happened():
            if time.monotonic() > deadline or seat.life.over is not None:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    def _harm(self, aim: Aim, lifts: list[Callable[[], None]]) -> str:
        """Why there was nobody to harm; "" = it is done."""
        if aim.cuts is not None:
            return "" if self._load.cut(aim.cuts) else "it has no connection"
        if aim.victim is None:
            return "it does not run"
        try:
            lifts.append(harm(aim.victim, aim.cell.fault))
            if aim.also is not None:
                harm(aim.also, "kill")
        except (ProcessLookupError, psutil.NoSuchProcess):
            return "it had ended by itself"
        return ""

    def _let_go(self, harmed: list[Aim]) -> None:
        stay = {aim.victim for aim in harmed if aim.cell.fault == "stop"}
        for pid in self._held - stay:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._held.clear()


def _stopped(pid: int | None) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False
