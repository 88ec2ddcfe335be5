"""One tensor-parallel group: a failure unit of scheduler, detokenizer and t workers.

The supervisor starts it, and starts it anew, with new rings, when any of its
processes has died or hangs.  A group that keeps dying waits longer each time,
and is given up after `max_restarts` restarts without having been ready for
STEADY_S between two of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from albireo.ipc.actor import NUM_BLOCKS, SWAP_BLOCK_NS
from albireo.ipc.config import ActorSpec, EngineConfig
from albireo.ipc.ring import create_ring
from albireo.ipc.rings import plan_ring, result_ring
from albireo.ipc.shared_memory import create as create_memory
from albireo.workers.parallel.canary import canary_bytes

from .children import STARVED, ActorProcess, StartError, write_stacks

log = logging.getLogger(__name__)

STEADY_S = 10.0
_FIRST_DELAY_S = 0.5
_MAX_DELAY_S = 30.0

Starter = Callable[[ActorSpec, dict[str, int]], Awaitable[ActorProcess]]


def doubled(first_s: float, times: int, most_s: float) -> float:
    """A wait that has doubled so often."""
    return min(first_s * 2.0 ** min(times, 64), most_s)


class GroupTimes(NamedTuple):
    """max_restarts: without a steady time between them.  start_s: for its start at most.
    hang_s: without an answer of a process."""

    max_restarts: int
    start_s: float
    hang_s: float


class Group:
    """State: "starting", "ready", "draining", "restarting", "stopped" or "failed".

    make_spec(role, name, incarnation, group, rank) gives an actor's spec;
    `start` forks it; `changed` is called at every change of state, and `died`
    with the reason when a group has died, or was ended on request (`planned`).
    detected: when its last death was found out, by time.monotonic().
    engine: what it runs with, or ran with last: as planned, but for what its workers found out.
    """

    def __init__(
        self,
        number: int,
        engine: EngineConfig,
        comm_bytes: int,
        times: GroupTimes,
        make_spec: Callable[[str, str, int, int, int], ActorSpec],
        start: Starter,
        changed: Callable[[], None],
        died: Callable[[Group, str, bool], None],
    ) -> None:
        self.number = number
        self.engine = engine
        self._planned = engine
        self.state = "starting"
        self.incarnation = 0
        self.reason = ""
        self.detected = 0.0
        self.actors: list[ActorProcess] = []
        self._comm_bytes = comm_bytes
        self._times = times
        self._wanted = asyncio.Event()
        self._wanted.set()
        self._leave = asyncio.Event()
        self._hurry = asyncio.Event()
        self._make_spec = make_spec
        self._start = start
        self._changed = changed
        self._died = died

    async def run(self) -> None:
        """Keeps the group alive until it is cancelled."""
        deaths = 0
        while True:
            if not self._wanted.is_set():
                self._set_state("stopped")
                await self._wanted.wait()
                deaths = 0
                self._set_state("restarting")
            self._leave.clear()  # what was not alive has left already
            self._hurry.clear()  # not in _pause(): who asks during the tear-down is heard, too
            ready_s, planned = await self._live()
            deaths = 0 if planned or ready_s > STEADY_S else deaths + 1
            if deaths > self._times.max_restarts:
                self._set_state("failed")
                self._wanted.clear()
                await self._wanted.wait()
                deaths = 0
            self.incarnation += 1
            if self._wanted.is_set():
                self._set_state("restarting")
            if deaths > 1:
                await self._pause(doubled(_FIRST_DELAY_S, deaths - 2, _MAX_DELAY_S))

    def start(self) -> None:
        """Lets a group run that was stopped, or given up, or waits before it tries again."""
        self._wanted.set()
        self._hurry.set()

    def drain(self, come_back: bool) -> None:
        """It gets no more requests: its state says so to the router.

        come_back: as of leave(), which is to follow; where it dies before, that is how it left.
        """
        if not come_back:
            self._wanted.clear()
        if self.state == "ready":
            self._set_state("draining")

    def leave(self, come_back: bool) -> None:
        """Ends its processes; whether new ones are to take their place."""
        if not come_back:
            self._wanted.clear()
            self._hurry.set()
        self._leave.set()

    async def _live(self) -> tuple[float, bool]:
        """One life of the group: for how long it was ready, in seconds; whether it was asked to
        end."""
        ready_at = time.monotonic()
        ready_s = 0.0
        try:
            await self._bring_up()
            ready_at = time.monotonic()
            self._set_state("ready")
            self.detected = 0.0
            self.reason = await self._end()
            ready_s = time.monotonic() - ready_at
        except StartError as error:
            self.reason = str(error)
        except STARVED as error:
            self.reason = f"the supervisor could not start it: {error}"
        self.detected = self.detected or time.monotonic()
        log.error("group %d: %s", self.number, self.reason)
        planned = self._leave.is_set()
        self._died(self, self.reason, planned)
        if any(actor.blames for actor in self.actors):
            await write_stacks(self.actors)
        await self._tear_down()
        return ready_s, planned

    async def _pause(self, seconds: float) -> None:
        """Before the next start, unless somebody has asked for it, or for none, since the last."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), seconds)

    async def _tear_down(self) -> None:
        """Kills what is left of the group; returns when nothing is."""
        for actor in self.actors:
            actor.kill()
        if self.actors:
            await asyncio.wait([actor.exited for actor in self.actors])
        self.actors = []

    async def _bring_up(self) -> None:
        """Forks the processes with new rings, and waits until all are ready.

        The workers first: the others are told what these find out.
        """
        prefix = f"g{self.number}"
        with _new_descriptors(self.number, self.engine, self._comm_bytes) as fds:
            rings = {name: fds[name] for name in ("plan.memory", "result.memory")}
            events = {name: fd for name, fd in fds.items() if ".event." in name}
            for rank in range(self.engine.tp):
                await self._fork("worker", f"{prefix}.worker{rank}", rank, fds, self._planned)
            await self._all_ready()
            self.engine = _as_found(self._planned, [actor.detail for actor in self.actors])
            for role in ("detokenizer", "scheduler"):
                await self._fork(role, f"{prefix}.{role}", -1, rings | events, self.engine)
        await self._all_ready()

    async def _all_ready(self) -> None:
        """Waits for all processes that have been forked.

        Raises StartError, also where one dies that has been ready for long: the others may wait
        for it.
        """
        self._changed()
        start_s = self._times.start_s
        waiting = [asyncio.ensure_future(actor.wait_ready(start_s)) for actor in self.actors]
        ready = asyncio.gather(*waiting)
        try:
            events: list[asyncio.Future[Any]] = [ready, *(actor.exited for actor in self.actors)]
            await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                raise StartError(await self._why_dead())
            await ready
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, ready, return_exceptions=True)

    async def _fork(
        self, role: str, name: str, rank: int, fds: dict[str, int], engine: EngineConfig
    ) -> None:
        spec = self._make_spec(role, name, self.incarnation, self.number, rank)
        spec = msgspec.structs.replace(spec, engine=engine)
        self.actors.append(await self._start(spec, fds))

    async def _end(self) -> str:
        """Waits until a process has died or hangs, or the group is asked to leave; says why."""
        leave = asyncio.ensure_future(self._leave.wait())
        silent = {
            asyncio.ensure_future(actor.silence(self._times.hang_s)): actor for actor in self.actors
        }
        events: list[asyncio.Future[Any]] = [leave, *silent]
        try:
            await asyncio.wait(
                [*events, *(actor.exited for actor in self.actors)],
                return_when=asyncio.FIRST_COMPLETED,
            )
            if self._leave.is_set():
                return "it was ended on request"
            self.detected = time.monotonic()
            epitaph = await self._why_dead()
            hung = [actor for task, actor in silent.items() if task.done() and actor.alive]
            if hung and all(actor.alive for actor in self.actors):
                await write_stacks(self.actors)
                return "; ".join(actor.why_hung(self._times.hang_s) for actor in hung)
            return epitaph
        finally:
            for event in events:
                event.cancel()

    async def _why_dead(self) -> str:
        """Of the processes that have died, or are about to: a process often takes its peers along,
        and its own last words are the ones to show.  "" where none has."""
        await asyncio.sleep(0.01)
        dead = [actor for actor in self.actors if not actor.alive]
        dead.sort(key=lambda actor: actor.last_words is None)
        return dead[0].epitaph() if dead else ""

    def _set_state(self, state: str) -> None:
        self.state = state
        self._changed()


def _as_found(planned: EngineConfig, details: Sequence[Mapping[str, Any]]) -> EngineConfig:
    """With what the workers have found out; details: theirs, by rank."""
    return msgspec.structs.replace(
        planned,
        num_blocks=min(detail.get(NUM_BLOCKS, planned.num_blocks) for detail in details),
        swap_block_ns=details[0].get(SWAP_BLOCK_NS, 0),
    )


@contextlib.contextmanager
def _new_descriptors(group: int, engine: EngineConfig, comm_bytes: int) -> Iterator[dict[str, int]]:
    """Fresh rings, eventfds and collective memory; closed here once they are inherited."""
    fds: dict[str, int] = {}
    try:
        fds["plan.memory"] = create_ring(plan_ring(group, engine))
        fds["result.memory"] = create_ring(result_ring(group, engine))
        for reader in ("scheduler", "detokenizer"):
            fds[f"result.event.{reader}"] = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        if engine.tp > 1:
            size = canary_bytes(engine.tp, engine.max_num_seqs)
            fds["canary.memory"] = create_memory(f"g{group}.canary", size)
        if comm_bytes:
            fds["comm.memory"] = create_memory(f"g{group}.comm", comm_bytes)
        yield fds
    finally:
        for fd in fds.values():
            os.close(fd)
