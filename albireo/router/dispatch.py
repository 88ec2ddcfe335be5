"""Which streams a group is given, and when: at once, or in their turn when one has room.

Streams whose group has died come back here; whether one of them kills groups
is failover.py's business.  Whoever takes a stream off a group tells the group
(Abort), unless the group said the end itself or is dead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable

import msgspec

from albireo.ipc.messages import Abort

from .failover import Failover
from .groups import Group, GroupTable
from .requests import Refusal, RequestNumbers, Stream, TokenRequest


class Dispatch:
    """streams: the router's, by number.  send: False when the peer is not there.  fail ends a
    request with an error."""

    def __init__(
        self,
        max_failovers: int,
        streams: dict[int, Stream],
        numbers: RequestNumbers,
        groups: GroupTable,
        send: Callable[[bytes, msgspec.Struct], bool],
        fail: Callable[[TokenRequest, Refusal], None],
    ) -> None:
        self._groups = groups
        self._send = send
        self._fail = fail
        self._failover = Failover(max_failovers, streams, numbers, groups, fail, self._place)
        self.failed_over = 0
        """How often a stream went on when its group had died."""

    @property
    def waiting(self) -> int:
        """Streams that wait for a group."""
        return len(self._groups.waiting) + self._failover.waiting

    @property
    def waiting_for_readmission(self) -> int:
        """Those of them whose group has died."""
        again = sum(stream.lost_at > 0 for stream in self._groups.waiting.values())
        return again + self._failover.waiting

    @property
    def readmissions_s(self) -> Collection[float]:
        """How long the last of these waited, from their group's death to the next one."""
        return self._failover.readmissions_s

    def submit(self, stream: Stream) -> None:
        """Gives a stream to a group, or lets it wait behind those that wait for one."""
        refusal = self._groups.hopeless()
        if refusal is not None:
            self._fail(stream.asker, refusal)
        elif self._groups.waiting or not self._place(stream):
            self._groups.waiting[stream.request] = stream

    def resubmit(self, streams: Iterable[Stream]) -> None:
        """These go on from an earlier connection, ahead of all that wait."""
        again = {stream.request: stream for stream in streams}
        self._groups.waiting = again | self._groups.waiting
        self.submit_waiting()

    def lost(
        self, lost: list[Stream], why: str, planned: bool = False, detected: float = 0.0
    ) -> None:
        """A group has died with these; see Failover.lost."""
        self.failed_over += self._failover.lost(lost, why, planned, detected)
        self.submit_waiting()

    def submit_waiting(self) -> None:
        """Tries again for the streams that wait, oldest first, as long as there is room."""
        self._failover.try_next()
        waiting = self._groups.waiting
        while waiting:
            stream = next(iter(waiting.values()))
            refusal = self._groups.hopeless()
            if refusal is not None:
                self._fail(stream.asker, refusal)
            elif self._place(stream):
                del waiting[stream.request]
            else:
                return

    def take_back(self, stream: Stream) -> None:
        """Takes a stream from wherever it is: from its group, or from those that wait for one."""
        group = stream.group
        if group is not None:
            group.remove(stream)
            self.tell(group, Abort(stream.request))
        else:
            self._groups.waiting.pop(stream.request, None)
            self._failover.forget(stream)

    def _place(self, stream: Stream) -> bool:
        assert stream.submit is not None
        while (group := self._groups.choose(stream)) is not None:
            if self.tell(group, stream.message()):
                group.add(stream)
                if stream.lost_at:
                    self._failover.readmitted(stream)
                return True
        return False

    def tell(self, group: Group, message: msgspec.Struct) -> bool:
        """Sends to a group; one that is not there is out of use until it joins again."""
        assert group.peer is not None
        if self._send(group.peer, message):
            return True
        self._groups.lose(group, time.monotonic())
        return False
