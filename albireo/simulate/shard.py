"""Some of the groups, in this process or in one of their own.

All a group needs to know of the others is what the router gives it, and all the
router needs to know of a group is who ends when.  A step that is not planned
yet cannot end before its group's horizon (group.py); up to the earliest of all
horizons the router therefore knows every end there is, and can decide while the
groups are still on their way.  (A conservative simulation with a window as long
as the shortest step: see D. Nicol, "The cost of conservative synchronization in
parallel discrete event simulations", J. ACM 40, 1993.)
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import resource
import signal
from collections import defaultdict
from multiprocessing.connection import Connection
from typing import Protocol

import msgspec

from albireo.scheduler.state import Counters

from .group import Done, GroupShape, Placed, SimulatedGroup
from .histogram import Histogram
from .profile import Profile

_STOP_S = 10.0


class Report(msgspec.Struct, frozen=True, array_like=True):
    """After an advance.

    done: who ends with the steps planned meanwhile.  delivered: tokens by group, in the order of
    their numbers.  running: requests in all of them.  horizon: the earliest of them.
    """

    done: list[Done]
    delivered: list[int]
    running: int
    horizon: float


class GroupResult(msgspec.Struct, frozen=True, array_like=True):
    """Of a group, at the end.  gaps: between tokens: the histogram's buckets, and its total."""

    number: int
    busy_s: float
    counters: Counters
    gaps: bytes
    gaps_total: float

    def gap_times(self) -> Histogram:
        return Histogram.of(self.gaps, self.gaps_total)


class ShardResult(msgspec.Struct, frozen=True, array_like=True):
    """peak_kib: the most memory that its process had."""

    groups: list[GroupResult]
    peak_kib: int


class _Advance(msgspec.Struct, frozen=True, array_like=True):
    placed: list[Placed]
    until: float
    last: bool


class Shard(Protocol):
    """Between `advance` and `report` it is at work."""

    def advance(self, placed: list[Placed], until: float) -> None:
        """placed: in the order of time."""

    def report(self) -> Report: ...

    def finish(self) -> ShardResult:
        """Lives to the end of all requests; raises RuntimeError when something is left."""


class LocalShard:
    """Groups in this process.  shapes: by number.  most: requests of each at once."""

    def __init__(self, shapes: dict[int, GroupShape], profile: Profile, most: int) -> None:
        self._groups = {
            number: SimulatedGroup(number, shape, profile, most) for number, shape in shapes.items()
        }
        self._work: tuple[list[Placed], float] = [], 0.0

    def advance(self, placed: list[Placed], until: float) -> None:
        self._work = placed, until

    def report(self) -> Report:
        placed, until = self._work
        by_group: defaultdict[int, list[Placed]] = defaultdict(list)
        for each in placed:
            by_group[each.group].append(each)
        done, delivered, running, horizon = [], [], 0, float("inf")
        for number, group in self._groups.items():
            group.advance(by_group.get(number, ()), until)
            done += group.done
            delivered.append(group.delivered)
            running += group.scheduler.running
            horizon = min(horizon, group.horizon(until))
            group.done, group.delivered = [], 0
        return Report(done, delivered, running, horizon)

    def finish(self) -> ShardResult:
        results = []
        for number, group in self._groups.items():
            group.advance((), float("inf"))
            if not group.scheduler.idle:
                raise RuntimeError(f"group {number} has requests left, but no step to come")
            group.scheduler.check_idle()
            results.append(
                GroupResult(
                    number, group.busy_s, group.scheduler.counters,
                    group.gaps.counts.tobytes(), group.gaps.total,
                )
            )  # fmt: skip
        return ShardResult(results, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


class RemoteShard:
    """Groups in a process of their own, as LocalShard."""

    def __init__(self, shapes: dict[int, GroupShape], profile: Profile, most: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, shapes, profile, most), daemon=True
        )
        self._process.start()
        theirs.close()
        self._encode = msgspec.msgpack.Encoder().encode
        self._report = msgspec.msgpack.Decoder(Report).decode

    def advance(self, placed: list[Placed], until: float) -> None:
        self._send(_Advance(placed, until, False))

    def report(self) -> Report:
        return self._report(self._receive())

    def finish(self) -> ShardResult:
        self._send(_Advance([], 0.0, True))
        result = msgspec.msgpack.decode(self._receive(), type=ShardResult)
        self._process.join(_STOP_S)
        return result

    def close(self) -> None:
        """Ends the process, if it still runs."""
        self._pipe.close()
        self._process.kill()
        self._process.join(_STOP_S)

    def _send(self, message: _Advance) -> None:
        try:
            self._pipe.send_bytes(self._encode(message))
        except OSError:
            raise self._died() from None

    def _receive(self) -> bytes:
        try:
            return self._pipe.recv_bytes()
        except (EOFError, OSError):
            raise self._died() from None

    def _died(self) -> RuntimeError:
        self._process.join(_STOP_S)
        return RuntimeError(
            f"a process of the simulation has ended with status {self._process.exitcode}"
        )


def _serve(pipe: Connection, shapes: dict[int, GroupShape], profile: Profile, most: int) -> None:
    """The process of a RemoteShard; ends with the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()
    shard = LocalShard(shapes, profile, most)
    encode = msgspec.msgpack.Encoder().encode
    decode = msgspec.msgpack.Decoder(_Advance).decode
    with contextlib.suppress(EOFError, ConnectionError):
        while not (order := decode(pipe.recv_bytes())).last:
            shard.advance(order.placed, order.until)
            pipe.send_bytes(encode(shard.report()))
        pipe.send_bytes(encode(shard.finish()))
