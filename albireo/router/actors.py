"""What the other actors say to the router, and what it does about it.

Detokenizers and the tokenizer answer requests; the supervisor tells who is
there, who has died, and when to drain.  A message of an actor that has been
replaced is dropped: groups and texts know the identity of the present one.

A router that was itself restarted has missed the Joined of actors that are
older: it learns their identities from Topology, and resets the groups, which
still work for requests that nobody remembers.  A group that could not be
reached, and is alive, is reset in the same way: what was said to it is lost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec

from albireo.ipc.config import ActorSpec
from albireo.ipc.messages import (
    Decoded,
    Drain,
    Drained,
    Encoded,
    GroupDown,
    GroupStats,
    Joined,
    Output,
    Refused,
    Reset,
    TextFailed,
    TokenizerDown,
    Topology,
    detokenizer_identity,
)
from albireo.ipc.stages import Stage
from albireo.ipc.timeline import NO_STEP
from albireo.ipc.wakefulness import Wakefulness

from .requests import Refusal, Stream
from .router import Router

TICK_S = 0.2
LOST_GROUP_TIMEOUT_S = 5.0

_RETRY_CODES = frozenset({"queue_full", "unavailable", "group_failed"})
_log = logging.getLogger(__name__)


class ActorMessages:
    """Takes messages of other actors.  `send(peer, message)`: False if it is not there."""

    def __init__(
        self, spec: ActorSpec, router: Router, send: Callable[[bytes, msgspec.Struct], bool]
    ) -> None:
        self._router = router
        self._groups = router.groups
        self._dispatch = router.dispatch
        self._delivery = router.delivery
        self._texts = router.texts
        self._send = send
        self._restarted = spec.incarnation > 0
        self._block_size = spec.engine.block_size
        self._unreset: dict[int, int] = {}
        """Groups that have to forget everything before they are used, and their incarnations."""
        self._loop = asyncio.get_running_loop()
        self._draining: dict[int, tuple[Drain, bytes, float]] = {}
        """Of each group the last one, who asked for it, and until when, by the loop's clock."""
        self._node_drain: tuple[Drain, bytes] | None = None
        self._drain_timer: asyncio.TimerHandle | None = None
        self._handlers: dict[type, Callable[[bytes, Any], None]] = {
            Refused: self._refused,
            GroupStats: self._group_stats,
            Encoded: self._text,
            Decoded: self._text,
            TextFailed: self._text,
            Joined: self._joined,
            Topology: self._topology,
            GroupDown: self._group_down,
            TokenizerDown: self._tokenizer_down,
            Drain: self._drain,
        }
        router.on_idle = self._idle
        self._awake = Wakefulness(self._loop, spec.engine.awake_s)
        self._timer = self._loop.call_later(TICK_S, self._tick)

    def receive(self, peer: bytes, message: Any) -> None:
        self._handlers[type(message)](peer, message)

    def close(self) -> None:
        self._timer.cancel()
        if self._drain_timer is not None:
            self._drain_timer.cancel()

    # ------------------------------------------------------------------ answers
    def output(self, peer: bytes, output: Output) -> None:
        """A step's tokens have come from a detokenizer."""
        group = self._groups.of(peer)
        if group is not None:
            start_ns = time.monotonic_ns()
            self._awake.stay()
            try:
                self._delivery.output(group, output)
            except MemoryError:
                raise
            except Exception:
                _log.exception("a batch of group %d could not be handed on", group.number)
                self._delivery.give_up(group, output)
            self._router.timeline.record(
                Stage.ROUTE, NO_STEP, start_ns, time.monotonic_ns(), len(output.pieces)
            )

    def output_lost(self, peer: bytes) -> None:
        """Its tokens do not come any more: it has died, or it has to begin anew."""
        group = self._groups.of(peer)
        if group is not None:
            self._groups.lose(group, time.monotonic())

    def _refused(self, peer: bytes, refused: Refused) -> None:
        group = self._groups.of(peer)
        stream = None if group is None else group.streams.get(refused.request)
        if group is not None and stream is not None:
            group.remove(stream)
            self._router.fail(
                stream.asker,
                Refusal(refused.code, refused.message, retry=refused.code in _RETRY_CODES),
            )

    def _group_stats(self, peer: bytes, stats: GroupStats) -> None:
        group = self._groups.of(peer)
        if group is not None:
            group.stats = stats.scheduler

    def _text(self, peer: bytes, answer: Encoded | Decoded | TextFailed) -> None:
        self._texts.answer(answer)

    # ------------------------------------------------------------------ who is there
    def _joined(self, peer: bytes, joined: Joined) -> None:
        if joined.role == "tokenizer":
            self._texts.joined(peer, joined.incarnation)
        elif joined.role == "detokenizer":
            if self._unreset.get(joined.group, -1) <= joined.incarnation:
                self._unreset.pop(joined.group, None)
            lost = self._groups.joined(peer, joined.group, joined.incarnation)
            if lost is not None:
                self._say_drained_groups()
                self._lost(lost, joined.group, "it has been replaced by a new one")
                self._dispatch.submit_waiting()

    def _topology(self, peer: bytes, topology: Topology) -> None:
        self._router.actors = topology.actors
        self._groups.set_states(topology.groups)
        self._groups.set_sizes(self._block_size * each for each in topology.num_blocks)
        if self._restarted:
            self._adopt(topology)
        self._dispatch.submit_waiting()

    def _adopt(self, topology: Topology) -> None:
        """Finds the actors that joined the router before this one."""
        self._unreset.clear()
        for group, state, incarnation in zip(
            self._groups, topology.groups, topology.incarnations, strict=False
        ):
            if state == "ready" and incarnation > max(group.incarnation, group.ended):
                self._unreset[group.number] = incarnation
        for actor in topology.actors:
            if actor.role == "tokenizer" and actor.state == "ready":
                self._texts.joined(f"tokenizer.{actor.restarts}".encode(), actor.restarts)
        self._reset_groups()

    def _reset_groups(self) -> None:
        """Asks again until they join: a Reset too many comes before the first Submit."""
        for number, incarnation in self._unreset.items():
            self._send(detokenizer_identity(number, incarnation).encode(), Reset())

    def _call_back(self) -> None:
        """Groups that could not be reached and have not ended begin anew, as soon as they can be;
        what they had goes on then, and after a while in any case."""
        for group in self._groups:
            if group.lost_at is None:
                continue
            assert group.peer is not None
            back = self._send(group.peer, Reset())
            if back:
                _log.warning("group %d can be reached again, and begins anew", group.number)
            elif time.monotonic() - group.lost_at > LOST_GROUP_TIMEOUT_S:
                _log.error("group %d cannot be reached, and nobody says why", group.number)
            else:
                continue
            self._unreset[group.number] = group.incarnation
            detected = group.lost_at
            lost = self._groups.give_up(group)
            self._lost(lost, group.number, "its detokenizer cannot be reached", back, detected)

    def _group_down(self, peer: bytes, down: GroupDown) -> None:
        lost = self._groups.down(down.group, down.incarnation)
        if self._unreset.get(down.group, -1) <= down.incarnation:
            self._unreset.pop(down.group, None)
        self._say_drained_groups()
        self._lost(lost, down.group, down.reason, down.planned, down.detected)
        self._dispatch.submit_waiting()

    def _lost(
        self,
        lost: list[Stream],
        group: int,
        reason: str,
        planned: bool = False,
        detected: float = 0.0,
    ) -> None:
        if lost:
            why = f"group {group}, which served this request, failed: {reason}"
            self._dispatch.lost(lost, why, planned, detected or time.monotonic())

    def _tokenizer_down(self, peer: bytes, down: TokenizerDown) -> None:
        self._texts.down(down.incarnation)

    def _tick(self) -> None:
        """What has to be tried again or given up."""
        self._timer = self._loop.call_later(TICK_S, self._tick)
        self._reset_groups()
        self._call_back()
        self._texts.expire()
        self._texts.retry()
        self._router.expire()
        self._say_drained_groups()
        self._dispatch.submit_waiting()

    # ------------------------------------------------------------------ draining
    def _drain(self, peer: bytes, drain: Drain) -> None:
        if drain.group >= 0:
            self._draining[drain.group] = drain, peer, self._loop.time() + drain.timeout_s
            return
        self._router.refusing = Refusal(
            "unavailable", "the node is shutting down; try again when it is back", retry=True
        )
        self._node_drain = drain, peer
        if self._drain_timer is not None:
            self._drain_timer.cancel()
        self._drain_timer = self._loop.call_later(drain.timeout_s, self._time_over)
        self._idle()

    def _say_drained_groups(self) -> None:
        """Answers the Drain of each group that serves nobody any more, or whose time is over.

        One that has died serves nobody until its streams are given out again: to itself, where it
        is back within a tick.
        """
        now = self._loop.time()
        for number, (drain, peer, until) in list(self._draining.items()):
            left = sum(len(group.streams) for group in self._groups if group.number == number)
            if not left or now >= until:
                del self._draining[number]
                self._send(peer, Drained(left, drain.number))

    def _idle(self) -> None:
        if self._node_drain is not None and self._router.idle:
            self._say_drained(0)

    def _time_over(self) -> None:
        assert self._router.refusing is not None
        self._say_drained(self._router.fail_all(self._router.refusing))

    def _say_drained(self, unfinished: int) -> None:
        """Answers the node's Drain, once."""
        if self._node_drain is None:
            return
        drain, peer = self._node_drain
        if not self._send(peer, Drained(unfinished, drain.number)):
            _log.warning("the supervisor is not there to hear that requests are drained")
        self._node_drain = None
        if self._drain_timer is not None:
            self._drain_timer.cancel()
