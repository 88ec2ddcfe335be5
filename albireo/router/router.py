"""The router itself: what becomes of a request, from its arrival to its last word.

Sessions hand in what clients ask; actors.py what the other actors say.  On its
way a request is checked (arrivals.py), given to a group (dispatch.py), and its
tokens are handed on (delivery.py).  Nothing here waits: each call works on the
state and sends.  A stream is in `streams` from its arrival to its end, and ends
once: by the last piece of its group, by a cancel, by fail(), or with its
connection.
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
from albireo.ipc.messages import ActorInfo
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
from .delivery import Delivery
from .dispatch import Dispatch
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
        self._settling = False
        self._connections = Connections(raise_open_files(), spec.incarnation)
        self._loop = asyncio.get_running_loop()
        self._clock = clock = self._loop.time
        self._started_at = clock()
        self._limits = limits = RequestLimits.of(spec)
        numbers = RequestNumbers(spec.incarnation)
        chance = random.SystemRandom() if spec.seed is None else random.Random(spec.seed)
        draw_seed = functools.partial(chance.getrandbits, 64)
        self._counts = RequestCounts()
        self._tenants = tenants = Tenants(spec.tenants)
        self._resumption = resumption = Resumption(spec.resume_s, journal, tenants, clock)
        self.sessions = self._connections.sessions
        self.streams: dict[int, Stream] = {}
        self.groups = GroupTable(
            spec.num_groups,
            spec.engine.max_num_seqs,
            spec.max_num_queued_reqs,
            spec.engine.num_blocks * spec.engine.block_size if spec.engine.prefix_caching else 0,
        )
        self.dispatch = Dispatch(
            spec.max_failovers, self.streams, numbers, self.groups, send, self.fail
        )
        self.delivery = Delivery(
            self.sessions, journal, self.dispatch.tell, self._finished, self.fail, clock
        )
        self.texts = TextQueue(send, clock, (spec.incarnation & 0x7FFF) << 40)
        self.actors: list[ActorInfo] = []
        self.refusing: Refusal | None = None
        """Why new requests are refused, once the node is shutting down."""
        self.on_idle: Callable[[], None] = lambda: None
        """Called when requests have ended and none is in flight any more."""
        self._services = services = Services(
            spec, limits, self.texts, self._answer_status, self._settle_soon
        )
        arrivals = Arrivals(
            self, limits, numbers, self.groups, tenants, self.texts, resumption, clock, draw_seed
        )
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
            strips_first_space=self._spec.model.strips_first_space,
            special_ids=self._spec.model.special_ids,
            tool_style=self._spec.model.tool_style,
            sampling_defaults=self._spec.model.sampling_defaults,
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
                self.dispatch.submit(stream)

    def resubmit_all(self, request: TokenRequest) -> None:
        """A request goes on from an earlier connection, ahead of all that wait."""
        self._counts.resumed += len(request.streams)
        self.dispatch.resubmit(request.streams.values())

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
        counts.waiting_for_group = self.dispatch.waiting
        counts.waiting_for_readmission = self.dispatch.waiting_for_readmission
        counts.failed_over = self.dispatch.failed_over
        counts.waiting_for_client = len(self._resumption)
        return status_tree(
            self._spec,
            uptime_s=self._clock() - self._started_at,
            draining=self.refusing is not None,
            connections=len(self.sessions),
            requests=counts,
            readmissions_s=self.dispatch.readmissions_s,
            actors=self.actors,
            groups=self.groups,
            stages=self._stages.trees,
        )

    # ------------------------------------------------------------------ ends
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
            self.dispatch.take_back(stream)
        request.streams.clear()

    def _settle_soon(self) -> None:
        """After ends, however many: once, when the event loop comes round."""
        if not self._settling:
            self._settling = True
            self._loop.call_soon(self._settle)

    def _settle(self) -> None:
        self._settling = False
        self.dispatch.submit_waiting()
        if not self.streams:
            self.on_idle()
