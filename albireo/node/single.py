"""An actor that belongs to no group: the router, the tokenizer, a gateway.

Forked again, at once, whenever it has died or hangs; but one that keeps dying waits longer
each time, so that it leaves the machine to the others.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from albireo.ipc.config import ActorSpec

from .children import STARVED, ActorProcess, StartError, write_stacks
from .group import STEADY_S, Starter, doubled

log = logging.getLogger(__name__)

_RETRY_S = 0.2
_AT_ONCE = 2
"""Deaths without STEADY_S in between, behind which a new one is forked at once."""
_FIRST_DELAY_S, _MAX_DELAY_S = 0.1, 5.0


class Single:
    """make_spec(role, name, incarnation) gives its spec; `start` forks it.

    changed(): it is ready.  died(incarnation, why): it is gone, and a new one is about to come.
    """

    def __init__(
        self,
        role: str,
        name: str,
        fds: dict[str, int],
        start_s: float,
        hang_s: float,
        make_spec: Callable[[str, str, int], ActorSpec],
        start: Starter,
        changed: Callable[[], None],
        died: Callable[[Single, int, str], None],
    ) -> None:
        self.role = role
        self.name = name
        self.actor: ActorProcess | None = None
        self._fds = fds
        self._start_s, self._hang_s = start_s, hang_s
        self._make_spec = make_spec
        self._start = start
        self._changed = changed
        self._died = died

    @property
    def ready(self) -> bool:
        """Whether there is one that can work."""
        return self.actor is not None and self.actor.alive and self.actor.ready.done()

    async def run(self) -> None:
        """Keeps it alive until it is cancelled; raises StartError when the first does not start."""
        incarnation = deaths = 0
        while True:
            if deaths > _AT_ONCE:
                await asyncio.sleep(doubled(_FIRST_DELAY_S, deaths - _AT_ONCE - 1, _MAX_DELAY_S))
            spec = self._make_spec(self.role, self.name, incarnation)
            try:
                self.actor = actor = await self._start(spec, self._fds)
            except (StartError, *STARVED) as error:
                if incarnation == 0:
                    raise
                log.error("%s: %s", self.name, error)
                await asyncio.sleep(_RETRY_S)
                continue
            try:
                await actor.wait_ready(self._start_s)
            except StartError:
                if incarnation == 0:
                    raise
                actor.kill()
                await asyncio.sleep(_RETRY_S)
                began = time.monotonic()
            else:
                began = time.monotonic()
                self._changed()
            self._died(self, incarnation, await self._end(actor))
            incarnation += 1
            deaths = 1 if time.monotonic() - began > STEADY_S else deaths + 1

    async def _end(self, actor: ActorProcess) -> str:
        """Waits until it has died, or hangs and was killed; says why."""
        silent = asyncio.ensure_future(actor.silence(self._hang_s))
        try:
            await asyncio.wait((actor.exited, silent), return_when=asyncio.FIRST_COMPLETED)
        finally:
            silent.cancel()
        if not actor.alive:
            return actor.epitaph()
        await write_stacks([actor])
        actor.kill()
        await actor.gone()
        return actor.why_hung(self._hang_s)
