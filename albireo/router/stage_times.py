"""What the groups' stages take, from their timelines: computed beside the event loop.

Summing up some hundred steps takes milliseconds, in which tokens would wait, so
a thread does it, when somebody asks and the last answer is older than a second.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec

from albireo.trace.rows import NodeTimelines, Source
from albireo.trace.stages import group_stages

MAX_AGE_S = 1.0
STEPS = 500
"""Of all groups together."""

_log = logging.getLogger(__name__)
_Trees = list[dict[str, Any] | None]
_Seen = list[tuple[str, int, int]]
"""How much each device of a group had written: name, incarnation, records."""


class StageTimes:
    """trees: of each group by number, as in the status tree; None until there are steps."""

    def __init__(self, timelines: NodeTimelines, num_groups: int) -> None:
        self.trees: _Trees = [None] * num_groups
        self._timelines = timelines
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "stage times")
        self._waiting: list[Callable[[], None]] = []
        self._until = 0.0
        self._seen: list[_Seen] = [[] for _ in range(num_groups)]

    def when_fresh(self, do: Callable[[], None]) -> None:
        """Calls `do` on the event loop once the trees are no older than a second."""
        if self._loop.time() < self._until:
            do()
            return
        if not self._waiting:
            # First, for it raises where there is no room for a thread; the next one tries again.
            self._thread.submit(self._compute).add_done_callback(self._tell_loop)
        self._waiting.append(do)

    def _compute(self) -> tuple[_Trees, list[_Seen]]:
        """The trees, and what they were made of; those of before where a group's device has done
        nothing since."""
        groups = range(len(self.trees))
        own: list[list[Source]] = [[] for _ in groups]
        for source in self._timelines.sources():
            if source.group in groups and not source.ended:
                own[source.group].append(source)
        steps = STEPS // len(own)
        seen = [
            [(each.name, each.incarnation, each.written) for each in sources if each.device]
            for sources in own
        ]
        trees = [
            self.trees[number]
            if seen[number] == self._seen[number]
            else msgspec.to_builtins(group_stages(sources, steps))
            for number, sources in enumerate(own)
        ]
        return trees, seen

    def _tell_loop(self, computed: Future[tuple[_Trees, list[_Seen]]]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._take, computed)

    def _take(self, computed: Future[tuple[_Trees, list[_Seen]]]) -> None:
        error = computed.exception()
        if error is None:
            self.trees, self._seen = computed.result()
        else:
            _log.error("the stages cannot be summed up", exc_info=error)
        self._until = self._loop.time() + MAX_AGE_S
        waiting, self._waiting = self._waiting, []
        for do in waiting:
            do()
