"""One tensor-parallel group: a failure unit of scheduler, detokenizer and t workers.

The supervisor starts it, and starts it anew, with new rings, when any of its
processes has died.  A group that keeps dying waits longer each time, and is
given up after `MAX_QUICK_DEATHS` deaths before it was ever ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator

from albireo.ipc.config import ActorSpec, EngineConfig
from albireo.ipc.ring import create_ring
from albireo.ipc.rings import plan_ring, result_ring
from albireo.ipc.shared_memory import create as create_memory

from .children import ActorProcess, StartError

log = logging.getLogger(__name__)

MAX_QUICK_DEATHS = 5
_FIRST_DELAY_S = 0.5
_MAX_DELAY_S = 30.0
_STEADY_S = 60.0

Starter = Callable[[ActorSpec, dict[str, int]], Awaitable[ActorProcess]]


class Group:
    """State: "starting", "ready", "restarting" or "failed".

    make_spec(role, name, incarnation, group, rank) gives an actor's spec;
    `start` forks it; `changed` is called at every change of state, and `died`
    with the reason when a group has died.
    """

    def __init__(
        self,
        number: int,
        engine: EngineConfig,
        comm_bytes: int,
        make_spec: Callable[[str, str, int, int, int], ActorSpec],
        start: Starter,
        changed: Callable[[], None],
        died: Callable[[Group, str], None],
    ) -> None:
        self.number = number
        self.engine = engine
        self.state = "starting"
        self.incarnation = 0
        self.reason = ""
        self.actors: list[ActorProcess] = []
        self._comm_bytes = comm_bytes
        self._make_spec = make_spec
        self._start = start
        self._changed = changed
        self._died = died

    async def run(self) -> None:
        """Keeps the group alive until it is cancelled or given up."""
        quick_deaths = 0
        while True:
            ready_at = None
            try:
                await self._bring_up()
                ready_at = time.monotonic()
                self._set_state("ready")
                await self._first_death()
                self.reason = self._epitaph()
            except StartError as error:
                self.reason = str(error)
            log.error("group %d: %s", self.number, self.reason)
            self._died(self, self.reason)
            await self._tear_down()
            steady = ready_at is not None and time.monotonic() - ready_at > _STEADY_S
            quick_deaths = 0 if steady else quick_deaths + 1
            if ready_at is None and quick_deaths >= MAX_QUICK_DEATHS:
                self._set_state("failed")
                return
            self.incarnation += 1
            self._set_state("restarting")
            if quick_deaths > 1:
                await asyncio.sleep(min(_FIRST_DELAY_S * 2 ** (quick_deaths - 2), _MAX_DELAY_S))

    def stop(self) -> None:
        """Asks every process to leave."""
        for actor in self.actors:
            actor.stop()

    async def _tear_down(self) -> None:
        """Kills what is left of the group; returns when nothing is."""
        for actor in self.actors:
            actor.kill()
        if self.actors:
            await asyncio.wait([actor.exited for actor in self.actors])
        self.actors = []

    async def _bring_up(self) -> None:
        """Forks the processes with new rings, and waits until all are ready."""
        prefix = f"g{self.number}"
        with _new_descriptors(self.number, self.engine, self._comm_bytes) as fds:
            rings = {name: fds[name] for name in ("plan.memory", "result.memory")}
            events = {name: fd for name, fd in fds.items() if ".event." in name}
            await self._fork("detokenizer", f"{prefix}.detokenizer", -1, rings | events)
            await self._fork("scheduler", f"{prefix}.scheduler", -1, rings | events)
            for rank in range(self.engine.tp):
                await self._fork("worker", f"{prefix}.worker{rank}", rank, fds)
        self._changed()
        waiting = [asyncio.ensure_future(actor.wait_ready()) for actor in self.actors]
        try:
            await asyncio.gather(*waiting)
        finally:
            for task in waiting:
                task.cancel()

    async def _fork(self, role: str, name: str, rank: int, fds: dict[str, int]) -> None:
        spec = self._make_spec(role, name, self.incarnation, self.number, rank)
        self.actors.append(await self._start(spec, fds))

    async def _first_death(self) -> None:
        await asyncio.wait(
            [actor.exited for actor in self.actors], return_when=asyncio.FIRST_COMPLETED
        )
        # A process often takes its peers along; its own last words are the ones to show.
        await asyncio.sleep(0.01)

    def _epitaph(self) -> str:
        dead = [actor for actor in self.actors if not actor.alive]
        dead.sort(key=lambda actor: actor.last_words is None)
        return dead[0].epitaph()

    def _set_state(self, state: str) -> None:
        self.state = state
        self._changed()


@contextlib.contextmanager
def _new_descriptors(group: int, engine: EngineConfig, comm_bytes: int) -> Iterator[dict[str, int]]:
    """Fresh rings, eventfds and collective memory; closed here once they are inherited."""
    fds: dict[str, int] = {}
    try:
        fds["plan.memory"] = create_ring(plan_ring(group, engine))
        fds["result.memory"] = create_ring(result_ring(group, engine))
        for reader in ("scheduler", "detokenizer"):
            fds[f"result.event.{reader}"] = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        if comm_bytes:
            fds["comm.memory"] = create_memory(f"g{group}.comm", comm_bytes)
        yield fds
    finally:
        for fd in fds.values():
            os.close(fd)
