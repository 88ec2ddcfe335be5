"""The supervisor's helpers: fork server, understudy and janitor.  Each is replaced when it dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from albireo.ipc.config import ActorSpec

from .children import STARVED, ActorProcess, ForkServer, Janitor, StartError, Watched
from .fork_protocol import Load, Loaded

log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.02
_RETRY_S = 0.5


class Helpers:
    """There is a janitor from the beginning; start() makes the others, and keep() keeps them all.

    note: tells people what happened.  replaced: one of that role, as topology.HELPERS names it.
    """

    def __init__(
        self,
        runtime_dir: Path,
        note: Callable[[str], None],
        replaced: Callable[[str], None],
    ) -> None:
        self._runtime_dir = runtime_dir
        self._note = note
        self._replaced = replaced
        self._load: Load
        self._fork_server: ForkServer | None = None
        self._understudy: ForkServer | None = None
        self._janitor = Janitor(runtime_dir)

    async def start(self, load: Load, on_phase: Callable[[str], None]) -> Loaded:
        """Returns when everything is loaded, and an understudy has it too.  Raises StartError."""
        self._load = load
        self._fork_server, loaded = await ForkServer.start(load, on_phase)
        self._understudy = await self._fork_server.fork_understudy()
        return loaded

    def processes(self) -> tuple[Watched, ...]:
        """As topology.HELPERS names them, once all have been started."""
        assert self._fork_server is not None and self._understudy is not None
        return self._fork_server, self._understudy, self._janitor

    def fork_servers(self) -> list[Watched]:
        """Those that there are: what is to be killed at the end."""
        return [each for each in (self._fork_server, self._understudy) if each is not None]

    async def fork(self, spec: ActorSpec, fds: dict[str, int]) -> ActorProcess:
        """Forks an actor; waits for a new fork server when the present one has just died."""
        while True:
            while self._fork_server is None or not self._fork_server.alive:
                await asyncio.sleep(_LOOK_AGAIN_S)
            server = self._fork_server
            try:
                return await server.fork(spec, fds)
            except StartError:
                # One that hung was killed just now; it may be alive for a moment.
                await asyncio.sleep(_LOOK_AGAIN_S)
                if server.alive:
                    raise

    async def keep(self) -> None:
        """Replaces those that die, until it is cancelled."""
        await asyncio.gather(self._keep_janitor(), self._keep_fork_servers())

    async def release(self) -> None:
        """The runtime directory has been removed: the janitor may leave."""
        self._janitor.release()
        await self._janitor.gone()

    async def _keep_janitor(self) -> None:
        while True:
            how = await self._janitor.gone()
            self._janitor.release()
            while True:
                try:
                    self._janitor = Janitor(self._runtime_dir)
                    break
                except STARVED as error:
                    log.error("there is no janitor: %s", error)
                    await asyncio.sleep(_RETRY_S)
            self._replaced("janitor")
            self._note(f"{how}; there is a new one")

    async def _keep_fork_servers(self) -> None:
        """The understudy takes a dead fork server's place; a dead understudy is replaced."""
        while True:
            server, understudy = self._fork_server, self._understudy
            assert server is not None and understudy is not None
            await asyncio.wait(
                (server.exited, understudy.exited), return_when=asyncio.FIRST_COMPLETED
            )
            if server.alive:
                role, how = "understudy", await understudy.gone()
            else:
                role, how = "forkserver", await server.gone()
                server = self._fork_server = await self._successor(understudy)
            self._note(f"{how}; it is replaced, the groups serve on")
            while server.alive and (understudy is server or not understudy.alive):
                try:
                    understudy = self._understudy = await server.fork_understudy()
                except (StartError, *STARVED) as error:
                    log.error("there is no understudy: %s", error)
                    await asyncio.sleep(_RETRY_S)
            self._replaced(role)

    async def _successor(self, understudy: ForkServer) -> ForkServer:
        """The understudy, or a new one: that has to load the model."""
        if understudy.alive:
            return understudy
        while True:
            try:
                return (await ForkServer.start(self._load, lambda text: None))[0]
            except (StartError, *STARVED) as error:
                log.error("there is no fork server: %s", error)
                await asyncio.sleep(_RETRY_S)
