"""The story of a chaos run: one visit after the other, on nodes that must never be the worse.

First comes a node with a journal, then one without.  On each a visit's requests are asked, its
faults strike in the phase that their cells name, and it is over when all requests have ended and
the node is whole again.  A cell whose phase was not sure is left for later.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from albireo.ipc.paths import node_dir
from albireo.node.owned import OwnedNode

from .checks import Report, Visit, check_at_rest, check_lives, check_nothing_left
from .faults import harm
from .full import SHM
from .load import TOKENS, Load, Story, stories, undisturbed
from .node import STEP_TIMEOUT_S, Health, Tree, alive, options, status
from .plan import Cell, count_visits, phase_of, together, without_journal
from .sight import Seat, Sight
from .strike import Aim, Strike, aims
from .wave import SIZE, Wave

_STORIES = 2
_SLOW_STEPS = 2
"""A step time-out is so many of the slowest undisturbed steps, at least; a group that is ended for
being slow fails nothing, but takes time."""
_WAVE_S = 2.0
"""Of an undisturbed wave on two quiet cores; what is waited for may take longer on others."""
_PHASE_S, _WHOLE_S, _END_S = 5.0, 60.0, 120.0
_HELD = 0.75
"""Of a step time-out: so long a process is held up at most."""
_PROVOKE_S = 0.5
_POLL_S = 0.01
_TRIES = 3
_NODE_VISITS = 4

Say = Callable[[str], None]
Known = dict[str, list[Story]]


async def run(
    cells: list[Cell], model: str, seed: int, until: float, again: bool, say: Say
) -> Report:
    """Visits the cells; until the time (time.monotonic()) is over.

    again: when all have been visited and there is time left, they are once more, in any order.
    """
    report = Report()
    rng = random.Random(seed)
    later = without_journal(cells, rng)
    first = [cell for cell in cells if cell not in later]
    second = [cell for cell in cells if cell in later]
    now = time.monotonic()
    # A start of a node takes as long as some visits.
    visits = [_NODE_VISITS + count_visits(part) for part in (first, second)]
    share = now + (until - now) * visits[0] / sum(visits)
    known: Known = {}
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        journal = Path(directory) / "journal"
        stage = _Stage(model, str(journal), rng, known, report, say)
        more = cells if again else []
        step_timeout_s = await stage.play(first, more, share, STEP_TIMEOUT_S)
        left = second + [cell for cell in first if cell not in report.visited]
        if not report.broken:
            rng = random.Random(seed + 1)  # however far the first one came
            stage = _Stage(model, None, rng, known, report, say)
            await stage.play(left, more, until, step_timeout_s)
    return report


class _Stage:
    """One node, from its start to its end.

    journal: its directory.  known: stories with their answers; empty = they are learnt first.
    """

    def __init__(
        self, model: str, journal: str | None, rng: random.Random, known: Known, report: Report,
        say: Say,
    ) -> None:  # fmt: skip
        self._model = model
        self._journal = journal
        self._rng = rng
        self._known = known
        self._report = report
        self._say = say
        self._scale = 1.0

    async def play(
        self, cells: list[Cell], more: list[Cell], until: float, step_timeout_s: float
    ) -> float:
        """Visits the cells, and then, as long as there is time, some of `more`; returns the step
        time-out that the machine was quick enough for."""
        shared_memory = set(os.listdir(SHM))
        for tries_left in reversed(range(_TRIES)):
            chosen = options(self._model, self._journal, step_timeout_s)
            node = await asyncio.to_thread(OwnedNode, chosen)
            self._health = Health(node.name)
            self._step_timeout_s = step_timeout_s
            try:
                with tempfile.TemporaryDirectory(prefix="chaos-") as wires:
                    slowest_s = await self._prepare(node, Path(wires))
                    fits = slowest_s * _SLOW_STEPS <= step_timeout_s or not tries_left
                    if fits:
                        self._strike = Strike(
                            self._sight, self._load, _PHASE_S * self._scale, _HELD * step_timeout_s
                        )
                        await self._visit_all(cells, more, until)
                    await self._load.close()
                    await self._health.close()
                    await check_at_rest(node.name, self._report)
            finally:
                await asyncio.to_thread(node.stop)
            check_nothing_left(
                node.name, self._health.pids, self._journal, shared_memory, self._report
            )
            if fits:
                break
            step_timeout_s = slowest_s * _SLOW_STEPS * 1.5
        return step_timeout_s

    # ------------------------------------------------------------------ before
    async def _prepare(self, node: OwnedNode, wires: Path) -> float:
        """Learns the answers, and how fast the machine is; returns its slowest step, in s."""
        self._name = node.name
        self._sight = Sight(Path(node_dir(node.name)))
        address = urlsplit(node.facts["http"])
        assert address.hostname is not None and address.port is not None
        self._load = Load(node.name, (address.hostname, address.port), wires, _END_S)
        if not self._known:
            told = stories(random.Random(self._rng.random()), _STORIES)
            for kind, each in told.items():
                answers = await asyncio.gather(*(undisturbed(node.name, one) for one in each))
                self._known[kind] = list(answers)
            await self._check_counting()
        began = time.monotonic()
        wave = self._wave()
        await wave.begin("queued")
        await self._load.settle()
        check_lives(Visit(self._journal is not None, lives=wave.lives), self._report)
        self._scale = max(1.0, (time.monotonic() - began) / _WAVE_S)
        self._load.give_up_s = _END_S * self._scale
        slowest_s = self._sight.slowest_step_s()
        self._say(
            f"{'a' if self._journal else 'no'} journal; a wave of {SIZE} requests takes "
            f"{time.monotonic() - began:.1f} s, the slowest step {slowest_s:.2f} s "
            f"(time-out {self._step_timeout_s:.1f} s)"
        )
        return slowest_s

    async def _check_counting(self) -> None:
        """That a request takes the steps that sight.py counts on."""
        for _ in range(_TRIES):
            self._sight.look()
            before = [self._sight.planned(group) for group in (0, 1)]
            life = self._load.ask(0, self._known["long"][0], http=False)
            await self._load.settle()
            found = [self._sight.planned(group) for group in (0, 1)]
            expected = [Seat(life, group, before[group], 0).last_step for group in (0, 1)]
            if found in ([before[0], expected[1]], [expected[0], before[1]]):
                return
            # On a busy machine a group may have hung, and counts anew.
        raise RuntimeError(f"a request of {TOKENS} tokens: steps {found}, not one of {expected}")

    # ------------------------------------------------------------------ visits
    async def _visit_all(self, cells: list[Cell], more: list[Cell], until: float) -> None:
        report, left = self._report, list(cells)
        while time.monotonic() < until and not report.broken:
            left = left or self._rng.sample(more, len(more))
            if not left:
                return
            chosen = together(left)
            began = time.monotonic()
            visit = await self._visit(chosen)
            report.visits.append(visit)
            left = [cell for cell in left if cell not in chosen] + [
                cell for cell in chosen if cell not in visit.cells
            ]
            shown = ", ".join("/".join(cell) for cell in visit.cells)
            took, words = time.monotonic() - began, [shown, *visit.missed, visit.why or ""]
            said = "; ".join(filter(None, words))
            self._say(f"{len(report.visited):3d} {took:5.1f} s  {said}")

    async def _visit(self, cells: list[Cell]) -> Visit:
        """Some of the cells: those whose phase was sure."""
        visit = Visit(self._journal is not None)
        tree = await self._whole(visit)
        if tree is None:
            return visit
        wave = self._wave()
        visit.lives = wave.lives
        if not await wave.begin(phase_of(cells)):
            visit.missed.append(f"places not known: {'/'.join(cells[0])}")
        else:
            pids = {actor["name"]: actor["pid"] for actor in tree["actors"]}
            visit.at = time.monotonic()
            blows = await self._strike.hit(aims(cells, wave, pids))
            visit.at = blows.at
            visit.cells = [aim.cell for aim in blows.sure]
            visit.struck = [aim.cell for aim in blows.struck]
            visit.missed += blows.missed
            visit.cut = next((n for aim in blows.struck if (n := aim.cuts) is not None), None)
            await asyncio.gather(*(asyncio.to_thread(lift) for lift in blows.lifts))
            visit.why = await self._see_ended(blows.struck)
        await self._load.settle()
        if visit.struck:
            await self._whole(visit)
        check_lives(visit, self._report)
        return visit

    async def _see_ended(self, struck: list[Aim]) -> str | None:
        """Waits for the ends of those that were killed or stopped; who has none."""
        deadline = time.monotonic() + _WHOLE_S * self._scale
        for aim in struck:
            role, _, fault = aim.cell
            while fault in ("kill", "stop") and aim.victim is not None and alive(aim.victim):
                if time.monotonic() > deadline:
                    return f"{role} (pid {aim.victim}) was not ended"
                if role == "forkserver" and fault == "stop":
                    await self._provoke()
                await asyncio.sleep(_POLL_S)
        return None

    async def _provoke(self) -> None:
        """A stopped fork server is noticed when it is needed: by the next death."""
        tree = await status(self._name)
        for actor in [] if tree is None else tree["actors"]:
            if actor["name"] == "g0.worker0":
                with contextlib.suppress(ProcessLookupError):
                    harm(actor["pid"], "kill")
        await asyncio.sleep(_PROVOKE_S)

    async def _whole(self, visit: Visit) -> Tree | None:
        within_s = _WHOLE_S * self._scale
        tree = await self._health.whole(within_s)
        if tree is None:
            visit.why = visit.why or f"the node was not whole within {within_s:g} s"
        return tree

    def _wave(self) -> Wave:
        return Wave(
            self._load, self._sight, self._known, self._rng,
            lambda: status(self._name), _PHASE_S * self._scale,
        )  # fmt: skip
