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


class StageTimes:
    """trees: of each group by number, as in the status tree; None until there are steps."""

    def __init__(self, timelines: NodeTimelines, num_groups: int) -> None:
        self.trees: _Trees = [None] * num_groups
        self._timelines = timelines
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "stage times")
        self._waiting: list[Callable[[], None]] = []
        self._until = 0.0
        self._seen: list[list[tuple[str, int, int]]] = [[] for _ in range(num_groups)]

    def when_fresh(self, do: Callable[[], None]) -> None:
        """Calls `do` on the event loop once the trees are no older than a second."""
        if self._loop.time() < self._until:
            do()
            return
        self._waiting.append(do)
        if len(self._waiting) == 1:
            self._thread.submit(self._compute).add_done_callback(self._tell_loop)

    def _compute(self) -> _Trees:
        groups = range(len(self.trees))
        own: list[list[Source]] = [[] for _ in groups]
        for source in self._timelines.sources():
            if source.group in groups and not source.ended:
                own[source.group].append(source)
        steps = STEPS // len(own)
        return [
            self.trees[number]
            if self._nothing_new(number, sources)
            else msgspec.to_builtins(group_stages(sources, steps))
            for number, sources in enumerate(own)
        ]

    def _nothing_new(self, group: int, sources: list[Source]) -> bool:
        """Whether the group's device has done nothing since its tree was made."""
        seen = [(each.name, each.incarnation, each.written) for each in sources if each.device]
        same = seen == self._seen[group]
        self._seen[group] = seen
        return same

    def _tell_loop(self, computed: Future[_Trees]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._take, computed)

    def _take(self, computed: Future[_Trees]) -> None:
        error = computed.exception()
        if error is None:
            self.trees = computed.result()
        else:
            _log.error("the stages cannot be summed up", exc_info=error)
        self._until = self._loop.time() + MAX_AGE_S
        waiting, self._waiting = self._waiting, []
        for do in waiting:
            do()
