"""The way of tokens from a group to the clients: a batch comes in, one frame a client leaves.

This is the router's hot path: the work of a step grows with its tokens alone.
Tokens are in the journal before a client sees them, and a piece that would
leave a gap or a repeat in an answer ends it with an error instead.  What is done
for the router alone, at ends of answers and for histograms, is done when the
clients have theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import msgspec

from albireo.ipc.messages import Credit, Output
from albireo.ipc.protocol import Delta

from .groups import Group
from .journal import Journal
from .latencies import StreamTimes
from .requests import Refusal, Stream, TokenRequest
from .session import Session

_log = logging.getLogger(__name__)
_CREDIT = Credit(1)
_END_FAULT = "the end of this request met a fault in the router"
_FAULT = "tokens of this request met a fault in the router, and are lost"


class Delivery:
    """sessions: all of them.  tell: says something to a group.  finished: called with a stream
    whose end has come, and its group.  fail ends a request with an error.  clock: seconds, of
    any origin."""

    def __init__(
        self,
        sessions: Iterable[Session],
        journal: Journal | None,
        tell: Callable[[Group, msgspec.Struct], bool],
        finished: Callable[[Stream, Group], None],
        fail: Callable[[TokenRequest, Refusal], None],
        clock: Callable[[], float],
    ) -> None:
        self._sessions = sessions
        self._journal = journal
        self._tell = tell
        self._finished = finished
        self._fail = fail
        self._clock = clock
        self._ended: list[tuple[Stream, str, Group]] = []
        """Streams whose end is in an outbox, or with the client, the reasons, and their groups."""

    def output(self, group: Group, output: Output) -> None:
        """Hands a batch on: one frame for each client, then the credit goes back."""
        streams = group.streams
        now = self._clock()
        sessions: list[Session] = []
        broken: list[tuple[Stream, int]] = []
        noted: list[tuple[int, int, list[int]]] = []
        timed: list[tuple[StreamTimes, int]] = []
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
                timed.append((stream.times, len(token_ids)))
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
                    stream.choice, piece.logprobs, scored, 0 if index else stream.prompt_tokens,
                )
            )  # fmt: skip
            if end is not None:
                self._ended.append((stream, end.finish_reason, group))
        group.outstanding_tokens -= tokens
        if self._journal is not None:
            self._journal.step(noted)
        for session in sessions:
            session.flush()
        latencies = group.latencies
        for times, count in timed:
            latencies.tokens(times, count, now)
        latencies.batch(tokens, output.more)
        self._finish()
        self._tell(group, _CREDIT)
        for stream, index in broken:
            self._fail_broken(stream, index)

    def give_up(self, group: Group, output: Output) -> None:
        """output() has failed.  What was made of the batch goes to the clients; those whose part is
        lost hear of it."""
        try:
            for session in self._sessions:
                if session.outbox:
                    session.flush()
            self._finish()
            for piece in output.pieces:
                stream = group.streams.get(piece.request)
                if stream is not None:
                    self._fail(stream.asker, Refusal("internal", _FAULT))
            # Tokens that it handed on may not have been taken off.
            group.outstanding_tokens = sum(each.left_tokens for each in group.streams.values())
        finally:
            self._tell(group, _CREDIT)

    def _finish(self) -> None:
        """The work of the ends that have come, each by itself: one's fault is not the others'."""
        if not self._ended:
            return
        ended, self._ended = self._ended, []
        for stream, reason, group in ended:
            try:
                group.latencies.end(stream.times, reason, self._clock())
                self._finished(stream, group)
            except MemoryError:
                raise
            except Exception:
                _log.exception("an answer of group %d could not be ended", group.number)
                if group.streams.get(stream.request) is stream:
                    self._fail(stream.asker, Refusal("internal", _END_FAULT))
        if self._journal is not None:
            self._journal.step([])

    def _fail_broken(self, stream: Stream, index: int) -> None:
        self._fail(
            stream.asker,
            Refusal(
                "internal",
                f"the group sent tokens from index {index}, but {len(stream.token_ids)} had "
                "come: the answer would have a gap or a repeat",
            ),
        )
