"""The detokenizer process: the group's end towards the router.

                 Submit, Abort, Reset, Credit         Submit, Abort, Reset, Processed
                ─────────────────────────────▶     ────────────────────────▶
        router                         detokenizer                           scheduler
                ◀─────────────────────────────     ◀────────────────────────
              Joined, Refused, GroupStats       ▲   Joined, Refused, SchedulerStats
                ◀═════════════════════════════  │
                           Output               │
                                                └── result ring, from worker 0

A request is registered here before the scheduler hears of it, so no token can
come before its stop strings.  The group has joined once its scheduler has.  A
router that is new, or could not reach the group for a while, says Reset; every
request is dropped, and it gets a Joined as its answer: what comes before that
is of the past.

At most OUTPUT_CREDITS Outputs are unanswered, each of a bounded size; without
credit what is new collects in the requests, so memory is bounded by their text
and logprobs.

Where processes have cores of their own, many rows go out in parts: the router and the client
deal with the first ones while the next ones become text.  Ends of answers come last, for the
router has several times as much to do with one as with a token.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

import zmq

from albireo.ipc.actor import Actor
from albireo.ipc.link import Hub, PeerGone, Spoke
from albireo.ipc.messages import (
    Abort,
    Credit,
    FromScheduler,
    GroupStats,
    Joined,
    Output,
    Processed,
    Refused,
    Reset,
    SchedulerStats,
    Submit,
    ToDetokenizer,
    ToScheduler,
    detokenizer_identity,
)
from albireo.ipc.output_lane import OutputSender
from albireo.ipc.paths import OUTPUT_SOCKET
from albireo.ipc.plan import ResultView
from albireo.ipc.ring import RingReader
from albireo.ipc.rings import result_ring
from albireo.ipc.stages import Stage
from albireo.ipc.timeline import Recorder
from albireo.ipc.wakefulness import await_news
from albireo.workers.tokenizer.text_model import TextModel

from .detokenizer import Detokenizer
from .stream import stream_factory

OUTPUT_CREDITS = 8
_PARTS, _PART_ROWS = 4, 64
"""A step of more rows than the latter goes out in several Outputs of as many rows each, at most so
many."""
_Row = tuple[int, int, int]
"""As in ipc/plan.py: request, count, token."""
_SCHEDULER = b"scheduler"
_STOP_GRACE_S = 1.0
_MESSAGES_S = 0.002
"""For which the router's messages are taken before it is looked whether there are results: what
another group's death brings here has its text made again, some us a token."""


def main(actor: Actor, fds: Mapping[str, int], text: TextModel) -> None:
    """Serves until the actor is asked to stop."""
    group = _Group(actor, fds, text)
    poller = zmq.Poller()
    for readable in (
        group.router.socket, group.scheduler.socket, group.results, group.outputs,
        actor.stop_fd, actor.ping_fd,
    ):  # fmt: skip
        poller.register(readable, zmq.POLLIN)
    while not actor.stopping.is_set():
        await_news(poller, group.results, group.awake_until_s)
        group.take_results()
        group.send_output()
        group.take_scheduler_messages()
        group.take_router_messages()
        group.send_output()
        group.say_processed()
        actor.answer_ping(group.step)
    group.close()


class _Group:
    """The links of one group and what stands between them."""

    def __init__(self, actor: Actor, fds: Mapping[str, int], text: TextModel) -> None:
        spec = actor.spec
        self._actor = actor
        self._group = spec.group
        self._joined = Joined("detokenizer", spec.group, spec.incarnation, os.getpid())
        self._has_scheduler = False
        self._waiting: list[ToScheduler] = []
        self._credits = OUTPUT_CREDITS
        self._more = False  # The last Output said that more of its step follows.
        self._timeline = Recorder.of(fds)
        self._step = self._said = 0
        self._says_processed = not spec.engine.async_output
        self._awake_s = spec.engine.awake_s
        self.awake_until_s = 0.0
        """More results will come soon, and a process that sleeps is late (see config.py)."""
        self._detokenizer = Detokenizer(
            stream_factory(text, spec.model.vocab_size),
            text.bytes_of,
            spec.model.eos_token_ids,
        )
        self.results = RingReader(
            result_ring(spec.group, spec.engine),
            fds["result.memory"],
            "detokenizer",
            event=fds["result.event.detokenizer"],
        )
        self.scheduler: Hub[FromScheduler] = Hub(spec.socket_path(f"g{spec.group}"), FromScheduler)
        self.router: Spoke[ToDetokenizer] = Spoke(
            spec.socket_path("router"),
            detokenizer_identity(spec.group, spec.incarnation),
            ToDetokenizer,
        )
        self.outputs = OutputSender(f"{spec.runtime_dir}/{OUTPUT_SOCKET}", self._joined)

    @property
    def step(self) -> int:
        """The last step whose rows have come."""
        return self._step

    def take_scheduler_messages(self) -> None:
        for _, message in self.scheduler.drain():
            match message:
                case Joined():
                    self._has_scheduler = True
                    for waiting in self._waiting:
                        self._tell_scheduler(waiting)
                    self._waiting.clear()
                    self.router.send(self._joined)
                    self._actor.ready()
                case Refused(request):
                    self._detokenizer.drop(request)
                    self.router.send(message)
                case SchedulerStats():
                    self.router.send(GroupStats(self._group, message))

    def take_router_messages(self) -> None:
        """Those that have come, or as many as there is time for; the others are taken next."""
        until_s = time.monotonic() + _MESSAGES_S
        for message in self.router.drain():
            match message:
                case Submit():
                    self._detokenizer.submit(message)
                    self._tell_scheduler(message)
                case Abort(request):
                    self._detokenizer.drop(request)
                    self._tell_scheduler(message)
                case Credit(batches):
                    self._credits = min(OUTPUT_CREDITS, self._credits + batches)
                case Reset():
                    self._reset(message)
            if time.monotonic() > until_s:
                return

    def take_results(self) -> None:
        while (frame := self.results.poll()) is not None:
            start_ns = time.monotonic_ns()
            result = ResultView(frame)
            self._step, rows = result.step, result.rows.tolist()
            self.awake_until_s = start_ns * 1e-9 + self._awake_s
            in_parts = self._awake_s > 0 and not len(result.logprobs)
            if len(result.logprobs):
                self._detokenizer.add_logprobs(result.logprobs, rows)  # of all rows at once
            self.results.release()
            *others, last = _parts(rows) if in_parts else [rows]
            for part in others:
                self._take_rows(part, start_ns)
                self.send_output(more=True)
                start_ns = time.monotonic_ns()
            self._take_rows(last, start_ns)
            if in_parts and self._detokenizer.has_ends:
                self.send_output(more=True)

    def _take_rows(self, rows: list[_Row], start_ns: int) -> None:
        stopped, refused = self._detokenizer.add_rows(rows)
        for request in stopped:
            self._tell_scheduler(Abort(request))
        for refusal in refused:
            self.router.send(refusal)
        self._timeline.record(
            Stage.DETOKENIZE, self._step, start_ns, time.monotonic_ns(), len(rows)
        )

    def send_output(self, more: bool = False) -> None:
        """All that is new, as far as credits go and the socket takes it.

        more: rows of the same step follow, and the ends of answers behind them, for which one
        credit is kept.
        """
        while self.outputs.flush() and self._credits > more:
            start_ns = time.monotonic_ns()
            pieces = self._detokenizer.take_pieces(ends=not more)
            if not pieces and (more or not self._more):
                return
            self.outputs.send(Output(pieces, more))
            self._more = more
            self._credits -= 1
            self._timeline.record(
                Stage.SEND, self._step, start_ns, time.monotonic_ns(), len(pieces)
            )

    def say_processed(self) -> None:
        """Without asynchronous output the scheduler plans on only then."""
        if self._says_processed and self._step != self._said:
            self._said = self._step
            self._tell_scheduler(Processed(self._step))

    def close(self) -> None:
        self.outputs.close()
        self.router.close()
        self.scheduler.close()

    def _reset(self, message: Reset) -> None:
        self._detokenizer.reset()
        self._credits = OUTPUT_CREDITS
        self._waiting.clear()
        if self._has_scheduler:
            self._tell_scheduler(message)
            self.router.send(self._joined)

    def _tell_scheduler(self, message: ToScheduler) -> None:
        """Sends, or keeps until the scheduler has joined."""
        if not self._has_scheduler:
            self._waiting.append(message)
            return
        try:
            self.scheduler.send(_SCHEDULER, message)
        except PeerGone:
            # A stopping node's scheduler may leave first; otherwise the group has failed.
            if not self._actor.stopping.wait(_STOP_GRACE_S):
                raise


def _parts(rows: list[_Row]) -> list[list[_Row]]:
    """A step's rows as they go out."""
    if len(rows) <= _PART_ROWS:
        return [rows]
    size = -(-len(rows) // min(_PARTS, -(-len(rows) // _PART_ROWS)))
    return [rows[first : first + size] for first in range(0, len(rows), size)]
