"""Keeps watching a node: AsyncWatch for the gateway, NodeWatch for the command line.

Both ask the router for its status tree when somebody wants to see, and read
the machine beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from albireo.client import AlbireoError, Client

from .history import History, Sample
from .machine import Gpus, cpu_seconds
from .picture import Picture, energy_of, picture

FRESH_S = 0.5
"""A sample so young is shown again."""
FIRST_S = 0.5
"""Whoever looks first waits so long, for rates."""


class _Watch:
    """History of one node, and how a sample is taken."""

    def __init__(self) -> None:
        self.history = History()
        self._gpus = Gpus()

    def picture(self) -> Picture:
        """Of the newest sample; there has to be one."""
        return picture(self.history, self._gpus.why_not)

    def _sample(self, tree: dict[str, Any]) -> Sample:
        at_s = time.monotonic()
        uuids = [uuid for group in tree["groups"] for uuid in group.get("gpus", ())]
        return Sample(at_s, tree, cpu_seconds(tree["actors"]), self._gpus.read(uuids))


class AsyncWatch(_Watch):
    """For one event loop.  `status` asks for the status tree."""

    def __init__(self, status: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        super().__init__()
        self._status = status
        self._taking = asyncio.Lock()

    async def see(self) -> Picture:
        """At most FRESH_S old.  Raises AlbireoError."""
        await self.sample()
        if len(self.history) == 1:
            await asyncio.sleep(FIRST_S)
            await self.sample(FIRST_S / 2)
        return self.picture()

    async def measure(self) -> tuple[Sample, dict[int, float]]:
        """The newest sample, and the joules a token that each group's GPUs took, where they are
        known.  Raises AlbireoError."""
        newest = await self.sample()
        found = {}
        for group in newest.tree["groups"]:
            energy = energy_of(self.history, group["group"])
            if energy is not None and energy.j_per_token is not None:
                found[group["group"]] = energy.j_per_token
        return newest, found

    async def sample(self, fresh_s: float = FRESH_S) -> Sample:
        """The newest sample, taken anew where it is older than that.  Raises AlbireoError."""
        async with self._taking:
            history = self.history
            if not len(history) or time.monotonic() - history.newest.at_s > fresh_s:
                tree = await self._status()
                history.add(await asyncio.to_thread(self._sample, tree))
            return history.newest


class NodeWatch(_Watch):
    """Of the node of that name, from another process; survives the node's restarts."""

    def __init__(self, node: str) -> None:
        super().__init__()
        self._node = node
        self._client: Client | None = None
        self._lock = threading.Lock()

    def see(self) -> Picture:
        """A new picture.  Raises AlbireoError while the node is not there."""
        with self._lock:
            try:
                if self._client is None:
                    self._client = Client.connect(node=self._node, client_name="top")
                self.history.add(self._sample(self._client.status()))
            except AlbireoError:
                self.history.clear()
                self._disconnect()
                raise
            return self.picture()

    def close(self) -> None:
        with self._lock:
            self._disconnect()

    def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(AlbireoError):
                client.close()
