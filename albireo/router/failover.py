"""Streams whose group has died: they go on elsewhere, and who kills groups is found out.

A stream that has lost `max_failovers` groups has one attempt left, and makes it
on trial: only one stream of the node is on trial at a time.  When its group dies
again, it is what kills groups, and it is refused; whoever was in that group
besides is not charged.  After TRIAL_TOKENS tokens its trial is over.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from .groups import GroupTable
from .requests import Refusal, RequestNumbers, Stream, TokenRequest

TRIAL_TOKENS = 32
MOST_READMISSIONS = 1024


class Failover:
    """streams: the router's, by number.  fail ends a request with an error.  place gives a stream
    to a group; False when none has room."""

    def __init__(
        self,
        max_failovers: int,
        streams: dict[int, Stream],
        numbers: RequestNumbers,
        groups: GroupTable,
        fail: Callable[[TokenRequest, Refusal], None],
        place: Callable[[Stream], bool],
    ) -> None:
        self._most = max_failovers
        self._streams = streams
        self._numbers = numbers
        self._groups = groups
        self._fail = fail
        self._place = place
        self._waiting: dict[int, Stream] = {}
        self._trial: Stream | None = None
        self._trial_until = 0
        self.readmissions_s: deque[float] = deque(maxlen=MOST_READMISSIONS)
        """How long the last streams waited, from their group's death to the next one."""

    @property
    def waiting(self) -> int:
        """Streams that wait for their trial."""
        return len(self._waiting)

    def lost(
        self, lost: list[Stream], why: str, planned: bool = False, detected: float = 0.0
    ) -> int:
        """A group has died with these; returns how many go on, ahead of all that wait.

        planned: it was ended on request, which says nothing about them.
        detected: when its death was found out, by time.monotonic().
        """
        culprit = None
        if self._trial in lost:
            culprit, self._trial = None if planned else self._trial, None
        if culprit is not None:
            self._fail(culprit.asker, Refusal("group_failed", self._verdict(why)))
        innocent = planned or culprit is not None
        if not innocent:
            for stream in lost:
                if stream.failovers >= self._most:
                    self._refuse(stream, why)
        again: dict[int, Stream] = {}
        suspects: dict[int, Stream] = {}
        for stream in lost:
            if self._streams.get(stream.request) is not stream:
                continue  # It has ended, perhaps with another one of its request.
            del self._streams[stream.request]
            stream.fail_over(self._numbers.take(self._streams), innocent)
            stream.lost_at = detected
            self._streams[stream.request] = stream
            suspect = self._most and stream.failovers >= self._most
            (suspects if suspect else again)[stream.request] = stream
        self._groups.waiting = again | self._groups.waiting
        self._waiting |= suspects
        return len(again) + len(suspects)

    def readmitted(self, stream: Stream) -> None:
        """It has been given to a group again."""
        self.readmissions_s.append(time.monotonic() - stream.lost_at)
        stream.lost_at = 0.0

    def forget(self, stream: Stream) -> None:
        """A stream without a group has ended."""
        self._waiting.pop(stream.request, None)

    def try_next(self) -> None:
        """Ends a trial that is over, and begins the next one if there is room for it."""
        trial = self._trial
        if trial is not None:
            ended = self._streams.get(trial.request) is not trial
            if not ended and len(trial.token_ids) < self._trial_until:
                return
            self._trial = None
        while self._trial is None and self._waiting:
            stream = next(iter(self._waiting.values()))
            refusal = self._groups.hopeless()
            if refusal is not None:
                self._fail(stream.asker, refusal)
            elif self._place(stream):
                del self._waiting[stream.request]
                self._trial = stream
                self._trial_until = len(stream.token_ids) + TRIAL_TOKENS
            else:
                return

    def _verdict(self, why: str) -> str:
        return (
            f"{why}; that was group {self._most + 1} which ended under this request, and it was "
            "the only suspect there: it is refused"
        )

    def _refuse(self, stream: Stream, why: str) -> None:
        deaths = self._most + 1
        times = f" (failure {deaths} of {deaths} under this request)" if self._most else ""
        self._fail(stream.asker, Refusal("group_failed", f"{why}{times}; try again", retry=True))
