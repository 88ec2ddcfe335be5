"""The router itself: what becomes of a request, from its arrival to its last word.

Sessions hand in what clients ask; actors.py what the other actors say.  Nothing
in here waits: each call works on the state and sends.  Invariants:

- a stream is in `streams` from its arrival to its end, and ends once: by the
  last piece of its group, by cancel(), by fail(), or with its connection;
- whoever takes a stream off a group tells the group (Abort), unless the group
  said the end itself or is dead.
"""

from __future__ import annotations

import asyncio
import functools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from albireo._version import __version__
from albireo.ipc.config import ActorSpec
from albireo.ipc.messages import Abort, ActorInfo, Credit, Output
from albireo.ipc.open_files import raise_open_files
from albireo.ipc.protocol import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    Cancel,
    Chat,
    Delta,
    Detokenize,
    End,
    Error,
    Generate,
    Models,
    Resume,
    Status,
    Tokenize,
    Welcome,
)
from albireo.ipc.stages import Stage
from albireo.ipc.timeline import NO_STEP, Recorder
from albireo.trace.rows import NodeTimelines

from .arrivals import Arrivals
from .connections import Connections
from .failover import Failover
from .groups import Group, GroupTable
from .journal import Journal
from .requests import Refusal, RequestNumbers, Stream, TokenRequest
from .resume import Resumption
from .services import Services
from .session import Session
from .stage_times import StageTimes
from .status import RequestCounts, status_tree
from .tenants import Tenants
from .texts import TextQueue
from .validate import RequestLimits

_CREDIT = Credit(1)


class Router:
    """Requests of all clients.  `send(peer, message)` is False when the peer is not there.

    journal: where they are noted, so that they outlive this router; None = they do not.
    """

    def __init__(
        self,
        spec: ActorSpec,
        send: Callable[[bytes, msgspec.Struct], bool],
        timeline: Recorder,
        journal: Journal | None = None,
    ) -> None:
        self._spec = spec
        self.timeline = timeline
        self._stages = StageTimes(NodeTimelines(Path(spec.runtime_dir)), spec.num_groups)
        self._send = send
        self._settling = False
        self._connections = Connections(raise_open_files(), spec.incarnation)
        self._loop = asyncio.get_running_loop()
        self._started_at = self._loop.time()
        self._limits = limits = RequestLimits.of(spec)
        numbers = RequestNumbers(spec.incarnation)
        chance = random.SystemRandom() if spec.seed is None else random.Random(spec.seed)
        draw_seed = functools.partial(chance.getrandbits, 64)
        self._counts = RequestCounts()
        self._tenants = tenants = Tenants(spec.tenants)
        self._journal = journal
        self._resumption = resumption = Resumption(spec.resume_s, journal, self._loop.time)
        self.sessions = self._connections.sessions
        self.streams: dict[int, Stream] = {}
        self.groups = GroupTable(
            spec.num_groups,
            spec.engine.max_num_seqs,
            spec.max_num_queued_reqs,
            spec.engine.num_blocks * spec.engine.block_size if spec.engine.prefix_caching else 0,
        )
        self._failover = Failover(
            spec.max_failovers, self.streams, numbers, self.groups, self.fail, self._place
        )
        self.texts = TextQueue(send, self._loop.time, (spec.incarnation & 0x7FFF) << 40)
        self.actors: list[ActorInfo] = []
        self.refusing: Refusal | None = None
        """Why new requests are refused, once the node is shutting down."""
        self.on_idle: Callable[[], None] = lambda: None
        """Called when requests have ended and none is in flight any more."""
        self._services = services = Services(
            spec, limits, self.texts, self._answer_status, self._settle_soon
        )
        arrivals = Arrivals(
            self, limits, numbers, self.groups, tenants, self.texts, resumption, self._loop.time,
            draw_seed,
        )  # fmt: skip
        self._handlers: dict[type, Callable[[Session, Any], None]] = {
            Generate: arrivals.generate,
            Chat: arrivals.chat,
            Resume: arrivals.resume,
            Cancel: self._cancel,
            Tokenize: services.tokenize,
            Detokenize: services.detokenize,
            Models: services.models,
            Status: services.status,
        }

    @property
    def idle(self) -> bool:
        """Whether no request is in flight, of whatever kind."""
        return not any(session.requests for session in self.sessions)

    # ------------------------------------------------------------------ sessions (Handler)
    def opened(self, session: Session) -> Refusal | None:
        return self._connections.opened(session)

    def known(self, session: Session) -> Refusal | None:
        return self._connections.known(session)

    def greeted(self, session: Session) -> None:
        if session.owner and (before := self._resumption.greeted(session)) is not None:
            self.closed(before)
            before.abort()

    def closed(self, session: Session) -> None:
        """Aborts everywhere what the client had in flight; what can go on waits for it."""
        self._connections.closed(session)
        self._resumption.closed(session)
        for request in list(session.requests.values()):
            if isinstance(request, TokenRequest):
                if not self._resumption.park(request):
                    self._counts.cancelled += len(request.streams)
                self._abort(request)
            else:
                self.texts.cancel(request.job)
        session.requests.clear()
        self._settle_soon()

    def welcome(self) -> Welcome:
        return Welcome(
            protocol=PROTOCOL_VERSION,
            version=__version__,
            node=self._spec.node,
            model=self._spec.model.name,
            max_model_len=self._limits.max_model_len,
            vocab_size=self._limits.vocab_size,
            max_frame_bytes=MAX_FRAME_BYTES,
            resume_s=self._spec.resume_s,
        )

    def handle(self, session: Session, message: Any) -> None:
        start_ns = time.monotonic_ns()
        self._handlers[type(message)](session, message)
        self.timeline.record(Stage.ADMIT, NO_STEP, start_ns, time.monotonic_ns(), 1)

    # ------------------------------------------------------------------ requests
    def submit_all(self, request: TokenRequest) -> None:
        """Everything is known of a new request that a group needs."""
        self._resumption.begin(request)
        for stream in list(request.streams.values()):
            if stream.choice in request.streams:  # one that fails ends them all
                self._submit(stream)

    def resubmit_all(self, request: TokenRequest) -> None:
        """A request goes on from an earlier connection, ahead of all that wait."""
        self._counts.resumed += len(request.streams)
        again = {stream.request: stream for stream in request.streams.values()}
        self.groups.waiting = again | self.groups.waiting
        self.submit_waiting()

    def _submit(self, stream: Stream) -> None:
        """Gives a stream to a group, or lets it wait behind those that wait for one."""
        refusal = self.groups.hopeless()
        if refusal is not None:
            self.fail(stream.asker, refusal)
        elif self.groups.waiting or not self._place(stream):
            self.groups.waiting[stream.request] = stream

    def submit_waiting(self) -> None:
        """Tries again for the streams that wait, oldest first, as long as there is room."""
        self._failover.try_next()
        waiting = self.groups.waiting
        while waiting:
            stream = next(iter(waiting.values()))
            refusal = self.groups.hopeless()
            if refusal is not None:
                self.fail(stream.asker, refusal)
            elif self._place(stream):
                del waiting[stream.request]
            else:
                return

    def _place(self, stream: Stream) -> bool:
        assert stream.submit is not None
        while (group := self.groups.choose(stream)) is not None:
            if self._tell(group, stream.message()):
                group.add(stream)
                if stream.lost_at:
                    self._failover.readmitted(stream)
                return True
        return False

    def _cancel(self, session: Session, message: Cancel) -> None:
        request = session.requests.get(message.id)
        if not isinstance(request, TokenRequest):
            return
        for choice, stream in request.streams.items():
            index = len(stream.token_ids)
            end = End("cancelled", None, stream.prompt_tokens, index)
            session.outbox.append(Delta(request.client_id, index, [], "", end, choice))
        self._counts.cancelled += len(request.streams)
        self._resumption.gone(request)
        self._abort(request)
        del session.requests[message.id]
        session.flush()
        self._settle_soon()

    def _answer_status(self, answer: Callable[[dict[str, Any]], None]) -> None:
        self._stages.when_fresh(lambda: answer(self._status_tree()))

    def _status_tree(self) -> dict[str, Any]:
        counts = self._counts
        counts.in_flight = len(self.streams)
        counts.tokenizing = sum(stream.asker.job is not None for stream in self.streams.values())
        waiting = self.groups.waiting
        counts.waiting_for_group = len(waiting) + self._failover.waiting
        counts.waiting_for_readmission = self._failover.waiting + sum(
            stream.lost_at > 0 for stream in waiting.values()
        )
        counts.waiting_for_client = len(self._resumption)
        return status_tree(
            self._spec,
            uptime_s=self._loop.time() - self._started_at,
            draining=self.refusing is not None,
            connections=len(self.sessions),
            requests=counts,
            readmissions_s=self._failover.readmissions_s,
            actors=self.actors,
            groups=self.groups,
            stages=self._stages.trees,
        )

    # ------------------------------------------------------------------ tokens
    def output(self, peer: bytes, group: Group, output: Output) -> None:
        """Hands a batch on: one frame for each client, then the credit goes back."""
        streams, latencies = group.streams, group.latencies
        now = self._loop.time()
        sessions: list[Session] = []
        broken: list[tuple[Stream, int]] = []
        noted: list[tuple[int, int, list[int]]] = []
        tokens = 0
        for piece in output.pieces:
            stream = streams.get(piece.request)
            if stream is None:
                continue
            known = stream.token_ids
            index = len(known)
            if piece.index != index:
                broken.append((stream, piece.index))
                continue
            token_ids = piece.token_ids
            known += token_ids
            if token_ids:
                if stream.entry:
                    noted.append((stream.entry, index, token_ids))
                tokens += len(token_ids)
                latencies.tokens(stream.times, len(token_ids), now)
            session = stream.session
            outbox = session.outbox
            if not outbox:
                sessions.append(session)
            end, scored = piece.end, piece.prompt_logprobs
            if scored is not None:
                scored = stream.take_scored(scored)
            outbox.append(
                Delta(
                    stream.client_id, index, token_ids, piece.text, end,
                    stream.choice, piece.logprobs, scored,
                )
            )  # fmt: skip
            if end is not None:
                latencies.end(stream.times, end.finish_reason, now)
                self._finished(stream, group)
        group.outstanding_tokens -= tokens
        latencies.batch(tokens)
        if self._journal is not None:
            self._journal.step(noted)
        for session in sessions:
            session.flush()
        self._send(peer, _CREDIT)
        for stream, index in broken:
            self._fail_broken(stream, index)

    def _finished(self, stream: Stream, group: Group) -> None:
        group.remember(stream)
        group.remove(stream)
        del self.streams[stream.request]
        request = stream.asker
        self._tenants.end(request.tenant, 1, stream.all_tokens)
        del request.streams[stream.choice]
        if not request.streams:
            del request.session.requests[request.client_id]
        self._resumption.ended(stream)
        self._counts.finished += 1
        self._settle_soon()

    def _fail_broken(self, stream: Stream, index: int) -> None:
        self.fail(
            stream.asker,
            Refusal(
                "internal",
                f"the group sent tokens from index {index}, but {len(stream.token_ids)} had "
                "come: the answer would have a gap or a repeat",
            ),
        )

    # ------------------------------------------------------------------ ends
    def expire(self) -> None:
        """Gives up requests whose client does not come back."""
        self._resumption.expire()

    def fail(self, request: TokenRequest, refusal: Refusal) -> None:
        """Ends a request, with all its streams, with an error; does nothing if it has ended."""
        if request.session.requests.get(request.client_id) is not request:
            return
        self._counts.failed += len(request.streams)
        self._resumption.gone(request)
        self._abort(request)
        del request.session.requests[request.client_id]
        request.session.fail(
            Error(
                id=request.client_id,
                code=refusal.code,
                message=refusal.message,
                param=refusal.param,
                retry=refusal.retry,
            )
        )
        self._settle_soon()

    def fail_over(
        self, lost: list[Stream], why: str, planned: bool = False, detected: float = 0.0
    ) -> None:
        """A group has died with these; see Failover.lost."""
        self._counts.failed_over += self._failover.lost(lost, why, planned, detected)
        self.submit_waiting()

    def give_up(self, session: Session, request_id: int, refusal: Refusal) -> bool:
        """Ends a request, of whatever kind, with an error; False when there is none."""
        request = session.requests.get(request_id)
        if isinstance(request, TokenRequest):
            self.fail(request, refusal)
        elif request is not None:
            self._services.fail(request, refusal)
        return request is not None

    def fail_all(self, refusal: Refusal) -> int:
        """Ends every request, of whatever kind, with an error; returns how many there were."""
        return sum(
            self.give_up(session, request_id, refusal)
            for session in self.sessions
            for request_id in list(session.requests)
        )

    def _tell(self, group: Group, message: msgspec.Struct) -> bool:
        """Sends to a group; one that is not there is out of use until it joins again."""
        assert group.peer is not None
        if self._send(group.peer, message):
            return True
        self.groups.lose(group, self._loop.time())
        return False

    def _abort(self, request: TokenRequest) -> None:
        """Takes a request's streams from wherever they are; the session's record of it is the
        caller's."""
        if request.job is not None:
            self.texts.cancel(request.job)
            request.job = None
        tokens = sum(stream.all_tokens for stream in request.streams.values())
        self._tenants.end(request.tenant, len(request.streams), tokens)
        for stream in request.streams.values():
            del self.streams[stream.request]
            group = stream.group
            if group is not None:
                group.remove(stream)
                self._tell(group, Abort(stream.request))
            else:
                self.groups.waiting.pop(stream.request, None)
                self._failover.forget(stream)
        request.streams.clear()

    def _settle_soon(self) -> None:
        """After ends, however many: once, when the event loop comes round."""
        if not self._settling:
            self._settling = True
            self._loop.call_soon(self._settle)

    def _settle(self) -> None:
        self._settling = False
        self.submit_waiting()
        if not self.streams:
            self.on_idle()
