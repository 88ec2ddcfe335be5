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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from albireo import __version__
from albireo.ipc.config import ActorSpec
from albireo.ipc.messages import Abort, ActorInfo, Credit, Encoded, Output, TextFailed
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
    Status,
    Tokenize,
    Welcome,
)
from albireo.ipc.stages import Stage
from albireo.ipc.timeline import NO_STEP, Recorder
from albireo.trace.rows import NodeTimelines

from .groups import Group, GroupTable
from .requests import Refusal, RequestNumbers, Stream
from .services import Services
from .session import Session
from .status import RequestCounts, status_tree
from .texts import Answer, TextQueue
from .validate import (
    RequestLimits,
    check_chat,
    check_generate,
    check_prompt_ids,
    resolve,
)

MAX_CONNECTIONS = 900

_CREDIT = Credit(1)


class Router:
    """Requests of all clients.  `send(peer, message)` is False when the peer is not there."""

    def __init__(
        self,
        spec: ActorSpec,
        send: Callable[[bytes, msgspec.Struct], bool],
        timeline: Recorder,
    ) -> None:
        self._spec = spec
        self.timeline = timeline
        self._timelines = NodeTimelines(Path(spec.runtime_dir))
        self._send = send
        self._settling = False
        self._connections = 0
        self._loop = asyncio.get_running_loop()
        self._started_at = self._loop.time()
        self._limits = RequestLimits.of(spec)
        self._numbers = RequestNumbers(spec.incarnation)
        self._counts = RequestCounts()
        self.sessions: set[Session] = set()
        self.streams: dict[int, Stream] = {}
        self.groups = GroupTable(
            spec.num_groups, spec.engine.max_num_seqs, spec.max_num_queued_reqs
        )
        self.texts = TextQueue(send, self._loop.time, (spec.incarnation & 0x7FFF) << 40)
        self.actors: list[ActorInfo] = []
        self.refusing: Refusal | None = None
        """Why new requests are refused, once the node is shutting down."""
        self.on_idle: Callable[[], None] = lambda: None
        """Called when requests have ended and none is in flight any more."""
        self._services = services = Services(
            spec, self._limits, self.texts, self._status_tree, self._settle_soon
        )
        self._handlers: dict[type, Callable[[Session, Any], None]] = {
            Generate: self._generate,
            Chat: self._chat,
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
        self.sessions.add(session)
        self._connections += 1
        session.connection = f"#{self._connections}"
        if len(self.sessions) > MAX_CONNECTIONS:
            return Refusal(
                "unavailable",
                f"{MAX_CONNECTIONS} clients are connected, which is the limit: use one "
                "connection for many requests",
                retry=True,
            )
        return None

    def closed(self, session: Session) -> None:
        """Aborts everywhere what the client had in flight."""
        self.sessions.discard(session)
        for request in list(session.requests.values()):
            if isinstance(request, Stream):
                self._abort(request)
                self._counts.cancelled += 1
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
        )

    def handle(self, session: Session, message: Any) -> None:
        start_ns = time.monotonic_ns()
        self._handlers[type(message)](session, message)
        self.timeline.record(Stage.ADMIT, NO_STEP, start_ns, time.monotonic_ns(), 1)

    # ------------------------------------------------------------------ requests
    def _generate(self, session: Session, message: Generate) -> None:
        session.check_id(message.id)
        session.check_room()
        check_generate(self._limits, message)
        stream = self._admit(session, message)
        if message.prompt_ids is not None:
            stream.submit = resolve(
                self._limits, stream.request, message.prompt_ids, message, session.connection
            )
        elif message.prompt is not None:
            stream.job = self.texts.encode_text(
                message.prompt, True, functools.partial(self._encoded, stream)
            )
        self._begin(stream)

    def _chat(self, session: Session, message: Chat) -> None:
        session.check_id(message.id)
        session.check_room()
        check_chat(self._limits, message)
        stream = self._admit(session, message)
        stream.job = self.texts.encode_chat(
            message.messages, functools.partial(self._encoded, stream)
        )
        self._begin(stream)

    def _admit(self, session: Session, message: Generate | Chat) -> Stream:
        if self.refusing is not None:
            raise self.refusing
        self.groups.admit(len(self.streams))
        number = self._numbers.take(self.streams)
        return Stream(session, number, message)

    def _begin(self, stream: Stream) -> None:
        self.streams[stream.request] = stream
        stream.session.requests[stream.client_id] = stream
        if stream.submit is not None:
            self._submit(stream)

    def _encoded(self, stream: Stream, answer: Answer) -> None:
        """The tokenizer has answered for a stream."""
        stream.job = None
        try:
            if isinstance(answer, TextFailed):
                raise Refusal(answer.code, answer.message, retry=answer.code == "unavailable")
            assert isinstance(answer, Encoded)
            check_prompt_ids(self._limits, answer.token_ids)
            stream.submit = resolve(
                self._limits,
                stream.request,
                answer.token_ids,
                stream.asked,
                stream.session.connection,
            )
        except Refusal as refusal:
            self.fail(stream, refusal)
        else:
            self._submit(stream)

    def _submit(self, stream: Stream) -> None:
        """Gives a stream to a group, or lets it wait behind those that wait for one."""
        refusal = self.groups.hopeless()
        if refusal is not None:
            self.fail(stream, refusal)
        elif self.groups.waiting or not self._place(stream):
            self.groups.waiting[stream.request] = stream

    def submit_waiting(self) -> None:
        """Tries again for the streams that wait, oldest first, as long as there is room."""
        waiting = self.groups.waiting
        while waiting:
            stream = next(iter(waiting.values()))
            refusal = self.groups.hopeless()
            if refusal is not None:
                self.fail(stream, refusal)
            elif self._place(stream):
                del waiting[stream.request]
            else:
                return

    def _place(self, stream: Stream) -> bool:
        assert stream.submit is not None
        while (group := self.groups.choose()) is not None:
            if self._tell(group, stream.submit):
                group.add(stream)
                return True
        return False

    def _cancel(self, session: Session, message: Cancel) -> None:
        stream = session.requests.get(message.id)
        if not isinstance(stream, Stream):
            return
        end = End("cancelled", None, stream.prompt_tokens, len(stream.token_ids))
        session.outbox.append(Delta(stream.client_id, len(stream.token_ids), [], "", end))
        self._abort(stream)
        self._counts.cancelled += 1
        del session.requests[message.id]
        session.flush()
        self._settle_soon()

    def _status_tree(self) -> dict[str, Any]:
        counts = self._counts
        counts.in_flight = len(self.streams)
        counts.tokenizing = sum(stream.job is not None for stream in self.streams.values())
        counts.waiting_for_group = len(self.groups.waiting)
        return status_tree(
            self._spec,
            uptime_s=self._loop.time() - self._started_at,
            draining=self.refusing is not None,
            connections=len(self.sessions),
            requests=counts,
            actors=self.actors,
            groups=self.groups,
            timelines=self._timelines,
        )

    # ------------------------------------------------------------------ tokens
    def output(self, peer: bytes, group: Group, output: Output) -> None:
        """Hands a batch on: one frame for each client, then the credit goes back."""
        streams = group.streams
        sessions: list[Session] = []
        broken: list[tuple[Stream, int]] = []
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
            tokens += len(token_ids)
            session = stream.session
            outbox = session.outbox
            if not outbox:
                sessions.append(session)
            end = piece.end
            outbox.append(Delta(stream.client_id, index, token_ids, piece.text, end))
            if end is not None:
                self._finished(stream, group)
        group.outstanding_tokens -= tokens
        for session in sessions:
            session.flush()
        self._send(peer, _CREDIT)
        for stream, index in broken:
            self._fail_broken(stream, index)

    def _finished(self, stream: Stream, group: Group) -> None:
        group.remove(stream)
        del self.streams[stream.request]
        del stream.session.requests[stream.client_id]
        self._counts.finished += 1
        self._settle_soon()

    def _fail_broken(self, stream: Stream, index: int) -> None:
        if self.streams.get(stream.request) is not stream:
            return
        self.fail(
            stream,
            Refusal(
                "internal",
                f"the group sent tokens from index {index}, but {len(stream.token_ids)} had "
                "come: the answer would have a gap or a repeat",
            ),
        )

    # ------------------------------------------------------------------ ends
    def fail(self, stream: Stream, refusal: Refusal) -> None:
        """Ends a stream with an error."""
        self._abort(stream)
        self._counts.failed += 1
        del stream.session.requests[stream.client_id]
        stream.session.fail(
            Error(
                id=stream.client_id,
                code=refusal.code,
                message=refusal.message,
                param=refusal.param,
                retry=refusal.retry,
            )
        )
        self._settle_soon()

    def fail_all(self, refusal: Refusal) -> int:
        """Ends every request, of whatever kind, with an error; returns how many there were."""
        count = 0
        for session in self.sessions:
            for request in list(session.requests.values()):
                count += 1
                if isinstance(request, Stream):
                    self.fail(request, refusal)
                else:
                    self._services.fail(request, refusal)
        return count

    def _tell(self, group: Group, message: msgspec.Struct) -> bool:
        """Sends to a group; one that is not there is out of use until it joins again."""
        assert group.peer is not None
        if self._send(group.peer, message):
            return True
        self.groups.lose(group, self._loop.time())
        return False

    def _abort(self, stream: Stream) -> None:
        """Takes a stream from wherever it is; the session's record of it is the caller's."""
        del self.streams[stream.request]
        if stream.job is not None:
            self.texts.cancel(stream.job)
        elif stream.group is not None:
            group = stream.group
            group.remove(stream)
            self._tell(group, Abort(stream.request))
        else:
            self.groups.waiting.pop(stream.request, None)

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
