"""What must be true of all requests, and of the machine, when a run is over."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from albireo.ipc.paths import node_dir
from albireo.node.options import RESUME_S

from .full import SHM
from .load import Life
from .node import alive, status
from .plan import STARVING, Cell

_REST_S = RESUME_S + 5.0
"""What was in flight when its gateway or the router was killed waits for its client so long."""


@dataclass
class Visit:
    """Faults that struck at the same time.

    journal: whether the node had one.
    cells: whose phase was sure when they struck.  struck: all that struck.
    cut: the client whose connection was cut.
    at: when they struck, by time.monotonic().
    missed: why cells are left for later.  why: what did not come true.
    """

    journal: bool
    cells: list[Cell] = field(default_factory=list)
    struck: list[Cell] = field(default_factory=list)
    cut: int | None = None
    at: float = 0.0
    why: str | None = None
    missed: list[str] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)


@dataclass
class Report:
    visits: list[Visit] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    pauses_ms: dict[str, list[float]] = field(default_factory=dict)

    @property
    def broken(self) -> bool:
        """Whether a visit has failed: what comes behind it would say little."""
        return any(visit.why is not None for visit in self.visits)

    @property
    def visited(self) -> set[Cell]:
        return {cell for visit in self.visits if visit.why is None for cell in visit.cells}


def check_lives(visit: Visit, report: Report) -> None:
    """Every request has one end, and the tokens of an undisturbed run up to it."""
    for life in visit.lives:
        story, name = life.story, "HTTP" if life.http else "socket"
        report.counts["requests"] += 1
        report.counts["tokens"] += len(life.tokens)
        faults = ", ".join("/".join(cell) for cell in visit.struck) or "no fault"
        where = f"{name} request {life.number} under {faults}"
        if life.wrong is not None:
            report.wrong.append(f"{where}: {life.wrong}")
        if life.lost is None and life.ends != 1:
            report.wrong.append(f"{where}: {life.ends} ends")
        tokens, text = list(story.tokens[: len(life.tokens)]), story.text[: len(life.text)]
        if life.tokens != tokens or life.text != text:
            report.wrong.append(
                f"{where}: {life.tokens} {life.text!r} instead of {tokens} {text!r}"
            )
            report.counts["streams changed"] += 1
        whole = life.http or life.tokens == list(story.tokens)
        if life.ends and (life.text != story.text or not whole):
            report.counts["tokens lost"] += 1
            report.wrong.append(f"{where}: it ended without all of its tokens")
        if life.lost is None:
            report.counts["whole"] += 1
        elif not _excused(life, visit):
            report.wrong.append(f"{where}: lost without a fault of its way: {life.lost}")
        else:
            report.counts["lost with their connection"] += 1
        _note_pause(life, visit, report)


def _excused(life: Life, visit: Visit) -> bool:
    """A request may end with an error where its way was hit, and nobody keeps it: its gateway;
    without a journal its router, or its own connection.  A router that starves may refuse."""
    for cell in visit.struck:
        if cell.role == "gateway" and life.http:
            return True
        if cell.role == "router" and (not visit.journal or cell.fault in STARVING):
            return True
        if cell.role == "client" and not visit.journal and life.number == visit.cut:
            return True
    return False


def _note_pause(life: Life, visit: Visit, report: Report) -> None:
    """The gap between two tokens in which a fault fell, where it is longer than usual."""
    gaps = list(zip(life.times, life.times[1:], strict=False))
    if len(gaps) < 3 or life.lost is not None:
        return
    usual = statistics.median(b - a for a, b in gaps)
    for a, b in gaps:
        if a <= visit.at < b and b - a > 3 * usual:
            for fault in {cell.fault for cell in visit.struck}:
                report.pauses_ms.setdefault(fault, []).append((b - a) * 1e3)


async def check_at_rest(node: str, report: Report) -> None:
    """No request, block or slot is held when nobody asks any more."""
    deadline = time.monotonic() + _REST_S
    while True:
        tree = await status(node)
        held: list[Any] = ["no status"]
        if tree is not None:
            requests = tree["requests"]
            held = [requests["in_flight"], requests["waiting_for_client"]] + [
                group["in_flight"] + (group["scheduler"] or {}).get("kv_blocks_used", 0)
                for group in tree["groups"]
            ]
        if not any(held):
            return
        if time.monotonic() > deadline:
            report.wrong.append(f"requests in flight and blocks held at rest: {held}")
            return
        await asyncio.sleep(0.2)


def check_nothing_left(
    name: str, pids: set[int], journal: str | None, shared_memory: set[str], report: Report
) -> None:
    """Of a node that has ended."""
    left = [pid for pid in pids if alive(pid)]
    if left:
        report.wrong.append(f"processes are left: {left}")
    if Path(node_dir(name)).exists():
        report.wrong.append(f"files are left: {list(Path(node_dir(name)).iterdir())}")
    if journal is not None and (files := os.listdir(journal)):
        report.wrong.append(f"files of the journal are left: {files}")
    more = set(os.listdir(SHM)) - shared_memory
    if more:
        report.wrong.append(f"shared memory is left: {sorted(more)}")
