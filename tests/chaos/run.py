"""The story of a chaos run: one cell after the other, on one node that must never be the worse."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from albireo.client import AlbireoError, AsyncClient
from albireo.ipc.paths import node_dir
from albireo.node.demo_model import fetch_demo_model
from albireo.node.options import NodeOptions
from albireo.node.owned import OwnedNode

from .faults import harm
from .load import Life, Load, stories, undisturbed
from .plan import ANY_PHASE, Cell

_STORIES = 15
_WORKERS = 12
_PHASE_S = 20.0
_WHOLE_S = 60.0
_TRIES = 5
_STEP_TIMEOUT_S = 2.0  # where nobody else uses the machine; see step_timeout_s()
_CONNECTION_ROLES = ("router", "gateway", "client")


@dataclass
class Visit:
    """A cell that was visited.  why: it was not, or what did not come true."""

    cell: Cell
    at: float = 0.0
    until: float = 0.0
    why: str | None = None


@dataclass
class Report:
    visits: list[Visit] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    pauses_ms: dict[str, list[float]] = field(default_factory=dict)


def step_timeout_s() -> float:
    """Longer where others use the machine, too: steps that are slow are no hangs."""
    return _STEP_TIMEOUT_S * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def options(model: str) -> NodeOptions:
    """Two groups, a slot for every third request; hangs are found soon, nothing is given up."""
    return NodeOptions(
        name=f"chaos-{os.getpid()}", model=model, served_model_name="m", groups=(1, 1),
        device="cpu", dtype="float32", batch_invariant=True, max_num_seqs=3, threads=1,
        max_num_batched_tokens=64, max_model_len=512, enable_prefix_caching=False,
        kv_cache_gib=0.25, http="127.0.0.1:0", step_timeout_s=step_timeout_s(),
        max_failovers=1_000_000, max_group_restarts=1_000_000,
    )  # fmt: skip


def model_path(name: str) -> str:
    """Of what --model says; the demo model is fetched."""
    if name != "demo":
        return name
    return str(fetch_demo_model(print))


async def run(
    cells: list[Cell], model: str, seed: int, until: float, say: Callable[[str], None]
) -> Report:
    """Visits the cells until the time (time.monotonic()) is over."""
    report = Report()
    shared_memory = set(os.listdir("/dev/shm"))
    node = await asyncio.to_thread(OwnedNode, options(model))
    pids: set[int] = set()
    try:
        told = stories(random.Random(seed), _STORIES)
        known = await asyncio.gather(*(undisturbed(node.name, each) for each in told))
        address = urlsplit(node.facts["http"])
        assert address.hostname is not None and address.port is not None
        load = Load(node.name, (address.hostname, address.port), known, _WORKERS)
        for cell in cells:
            if time.monotonic() > until:
                break
            visit = await _visit(node.name, cell, load, pids)
            report.visits.append(visit)
            say(f"{len(report.visits):3d} {'/'.join(cell)} {visit.why or ''}")
            if visit.why is not None and not await _whole(node.name, pids):
                break
        await load.finish()
        await _check_at_rest(node.name, report)
        _check_lives(load.finished, report)
    finally:
        await asyncio.to_thread(node.stop)
    _check_nothing_left(node.name, pids, shared_memory, report)
    return report


async def _visit(node: str, cell: Cell, load: Load, pids: set[int]) -> Visit:
    """One cell.  A victim that has ended before it was harmed (on a busy machine a step may take
    longer than its time) is looked for again."""
    visit = Visit(cell)
    for _ in range(_TRIES):
        if not await _whole(node, pids):
            visit.why = f"the node was not whole within {_WHOLE_S:g} s"
            return visit
        victim = await _pid(node, cell.role)
        deadline = time.monotonic() + _PHASE_S
        while cell.phase != ANY_PHASE and not any(life.phase == cell.phase for life in load.lives):
            if time.monotonic() > deadline:
                visit.why = f"no request came to the phase {cell.phase}"
                return visit
            await asyncio.sleep(0.001)
        visit.at = visit.at or time.monotonic()
        try:
            visit.why = await _strike(node, cell, load, victim)
            break
        except (ProcessLookupError, psutil.NoSuchProcess):
            visit.why = f"{cell.role} (pid {victim}) ended by itself, {_TRIES} times"
    if visit.why is None and not await _whole(node, pids):
        visit.why = f"the node was not whole again within {_WHOLE_S:g} s"
    visit.until = time.monotonic()
    return visit


async def _strike(node: str, cell: Cell, load: Load, victim: int | None) -> str | None:
    """Does the harm and waits until it has had its effect; what did not come true.

    Raises ProcessLookupError or psutil.NoSuchProcess when the victim is not there.
    """
    if cell.role == "client":
        found = load.disconnect(cell.phase)
        await asyncio.sleep(0.2)
        return None if found else f"no connection had a request in the phase {cell.phase}"
    if victim is None:
        raise ProcessLookupError
    at = time.monotonic()
    lift = harm(victim, cell.fault)
    if cell.role == "supervisor" and (worker := await _pid(node, "worker")) is not None:
        with contextlib.suppress(ProcessLookupError):
            harm(worker, "kill")
    await asyncio.to_thread(lift)
    if cell.fault in ("kill", "stop"):
        while _alive(victim):
            if time.monotonic() > at + _WHOLE_S:
                return f"{cell.role} (pid {victim}) was not ended"
            if cell.role == "forkserver" and cell.fault == "stop":
                await _provoke(node)
            await asyncio.sleep(0.01)
    return None


async def _provoke(node: str) -> None:
    """A stopped fork server is noticed when it is needed: by the next death."""
    pid = await _pid(node, "worker")
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            harm(pid, "kill")
    await asyncio.sleep(0.5)


async def _status(node: str) -> dict[str, Any] | None:
    try:
        async with asyncio.timeout(3), await AsyncClient.connect(node=node) as client:
            return await client.status()
    except (AlbireoError, OSError, TimeoutError):
        return None


async def _whole(node: str, pids: set[int]) -> bool:
    """Waits until all that status tells is ready; notes every process that ever was."""
    deadline = time.monotonic() + _WHOLE_S
    while time.monotonic() < deadline:
        tree = await _status(node)
        if tree is not None:
            pids |= {actor["pid"] for actor in tree["actors"]}
            if all(group["state"] == "ready" for group in tree["groups"]) and all(
                actor["state"] == "ready" and _alive(actor["pid"]) for actor in tree["actors"]
            ):
                return True
        await asyncio.sleep(0.02)
    return False


async def _pid(node: str, role: str) -> int | None:
    """Of group 0 where there are several."""
    tree = await _status(node)
    names = (role, f"g0.{role}", f"g0.{role}0", f"{role}0")
    actors = [] if tree is None else tree["actors"]
    return next((actor["pid"] for actor in actors if actor["name"] in names), None)


def _alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# ---------------------------------------------------------------------- afterwards
async def _check_at_rest(node: str, report: Report) -> None:
    """No request, block or slot is held when nobody asks any more."""
    deadline = time.monotonic() + 5
    while True:
        tree = await _status(node)
        held: list[Any] = ["no status"]
        if tree is not None:
            held = [tree["requests"]["in_flight"]] + [
                group["in_flight"] + (group["scheduler"] or {}).get("kv_blocks_used", 0)
                for group in tree["groups"]
            ]
        if not any(held):
            return
        if time.monotonic() > deadline:
            report.wrong.append(f"requests in flight and blocks held at rest: {held}")
            return
        await asyncio.sleep(0.2)


def _check_lives(lives: list[Life], report: Report) -> None:
    """Every request has one end, and the tokens of an undisturbed run up to it."""
    for life in lives:
        story, name = life.story, "HTTP" if life.http else "socket"
        report.counts["requests"] += 1
        report.counts["tokens"] += len(life.tokens)
        whole = life.lost is None
        if life.wrong is not None:
            report.wrong.append(f"{name}: {life.wrong}")
        if whole and life.ends != 1:
            report.wrong.append(f"{name}: a request has {life.ends} ends")
        tokens, text = list(story.tokens[: len(life.tokens)]), story.text[: len(life.text)]
        if life.tokens != tokens or life.text != text:
            report.wrong.append(f"{name}: {life.tokens} {life.text!r} instead of {tokens} {text!r}")
            report.counts["streams changed"] += 1
        if life.ends and (life.text != story.text or (not life.http and life.tokens != tokens)):
            report.counts["tokens lost"] += 1
        if whole:
            report.counts["whole"] += 1
        elif not _excused(life, report.visits):
            report.wrong.append(f"{name}: lost without a fault of its way: {life.lost}")
        else:
            report.counts["lost with their connection"] += 1
        _note_pause(life, report)


def _excused(life: Life, visits: list[Visit]) -> bool:
    """A request may end with its connection: when router, gateway or client were hit."""
    assert life.over is not None
    return any(
        visit.cell.role in _CONNECTION_ROLES
        and visit.at - 1 <= life.over
        and life.began <= visit.until + 1
        for visit in visits
    )


def _note_pause(life: Life, report: Report) -> None:
    """The gap between two tokens in which a fault fell, where it is longer than usual."""
    gaps = list(zip(life.times, life.times[1:], strict=False))
    if len(gaps) < 3 or life.lost is not None:
        return
    usual = statistics.median(b - a for a, b in gaps)
    for a, b in gaps:
        visit = next((each for each in report.visits if a <= each.at < b), None)
        if visit is not None and b - a > 3 * usual:
            report.pauses_ms.setdefault(visit.cell.fault, []).append((b - a) * 1e3)


def _check_nothing_left(name: str, pids: set[int], shared_memory: set[str], report: Report) -> None:
    left = [pid for pid in pids if _alive(pid)]
    if left:
        report.wrong.append(f"processes are left: {left}")
    if Path(node_dir(name)).exists():
        report.wrong.append(f"files are left: {list(Path(node_dir(name)).iterdir())}")
    more = set(os.listdir("/dev/shm")) - shared_memory
    if more:
        report.wrong.append(f"shared memory is left: {sorted(more)}")
