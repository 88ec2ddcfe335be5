"""What the router knows of a request: a TokenRequest with its Streams, or a TextRequest.

A TokenRequest has a Stream for each of its n answers.  A Stream passes through
three stages: its text is with the tokenizer (the request's `job` is set), it
waits for a group (`group` is None), it runs on a group.  It is in
Router.streams, by the number of its attempt, from its first stage to its end,
and a piece of output whose number is not there is nobody's.

A stream keeps its prompt and every token handed on: that is what another
group would need to continue it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from albireo.ipc.messages import Submit
from albireo.ipc.protocol import Chat, Generate, Logprobs, Resume

from .latencies import StreamTimes

if TYPE_CHECKING:
    from .groups import Group
    from .records import Accepted
    from .session import Session
    from .text_jobs import TextJob

NUMBERS_PER_ROUTER = 1 << 24


class Refusal(Exception):
    """A request cannot be taken, or not be carried on; becomes a protocol.Error."""

    def __init__(
        self, code: str, message: str, *, param: str | None = None, retry: bool = False
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry = retry


def tenant_of(session: Session, named: str = "") -> str:
    """Whose turns a request takes: of its key's tenant, of whom it names, or of its connection."""
    return session.tenant or named or session.connection


class TokenRequest:
    """A generate or chat request.

    client_id: the client's number for it, on its connection.
    asked: what the client sent; Resume when it goes on from an earlier connection.
    tenant: on whose behalf: as its API key says, else as it says itself.
    job: while its texts are with the tokenizer.
    streams: those of its answers that have not ended, by choice.
    record: what outlives its connection, where anything does (resume.py).
    """

    __slots__ = ("asked", "client_id", "job", "record", "session", "streams", "tenant")

    def __init__(self, session: Session, asked: Generate | Chat | Resume, tenant: str = "") -> None:
        """tenant: that the client named; for Resume, which does not say it."""
        self.session = session
        self.client_id = asked.id
        self.asked = asked
        named = tenant if isinstance(asked, Resume) else asked.tenant
        self.tenant = tenant_of(session, named)
        self.job: TextJob | None = None
        self.streams: dict[int, Stream] = {}
        self.record: Accepted | None = None


class Stream:
    """One answer of a TokenRequest.

    request: the number of this attempt, by which the actors of a group know it.
    asker: the client's request; client_id and session are its own.
    choice: which of the request's answers.
    token_ids: the new tokens handed on to the client so far.
    submit: what the group is given, once the prompt's ids are known.
    prefix: names of the prompt's pieces (affinity.py), once a group is chosen by them.
    failovers: how many groups have died under it.  lost_at: when the last one did, by
        time.monotonic(), until it has another; else 0.
    entry: its number in the journal; 0 = it is not there.
    scored: prompt logprobs handed on so far.  repeated: of those that come, the first ones that
        the client has had already.
    """

    __slots__ = (
        "asker",
        "choice",
        "client_id",
        "entry",
        "failovers",
        "group",
        "lost_at",
        "prefix",
        "repeated",
        "request",
        "scored",
        "session",
        "submit",
        "times",
        "token_ids",
    )

    def __init__(self, asker: TokenRequest, choice: int, request: int, now: float) -> None:
        self.asker = asker
        self.choice = choice
        self.session = asker.session
        self.client_id = asker.client_id
        self.request = request
        self.submit: Submit | None = None
        self.group: Group | None = None
        self.token_ids: list[int] = []
        self.prefix: list[int] = []
        self.failovers = self.entry = 0
        self.lost_at = 0.0
        self.scored = self.repeated = 0
        self.times = StreamTimes(now)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt; 0 while they are not known."""
        return 0 if self.submit is None else len(self.submit.prompt_ids)

    @property
    def all_tokens(self) -> int:
        """Of the prompt, and most that it may get; 0 while they are not known."""
        submit = self.submit
        return 0 if submit is None else len(submit.prompt_ids) + submit.max_tokens

    @property
    def left_tokens(self) -> int:
        """Prompt and new tokens that it may still need."""
        assert self.submit is not None
        return len(self.submit.prompt_ids) + self.submit.max_tokens - len(self.token_ids)

    def message(self) -> Submit:
        """What a group is told: all that there is to do, or what is left of it."""
        submit = self.submit
        assert submit is not None
        if self.request == submit.request:
            return submit
        had = self.token_ids
        return msgspec.structs.replace(
            submit,
            request=self.request,
            prompt_ids=submit.prompt_ids + had,
            resumed=len(had),
            prompt_logprobs=-1 if had else submit.prompt_logprobs,
        )

    def fail_over(self, request: int, planned: bool = False) -> None:
        """Its group has died: the next attempt begins behind what the client has."""
        self.failovers += not planned
        self.request = request
        self.repeated = self.scored

    def resume(self, token_ids: list[int], scored: int, now: float) -> None:
        """It goes on from an earlier connection, where its client had these."""
        self.token_ids = token_ids
        self.scored = self.repeated = scored
        if token_ids:
            self.times.tokens, self.times.first, self.times.last = 1, now, now

    def take_scored(self, found: list[Logprobs]) -> list[Logprobs] | None:
        """Of prompt logprobs that have come, those that the client has not had."""
        repeated = min(self.repeated, len(found))
        self.repeated -= repeated
        found = found[repeated:]
        self.scored += len(found)
        return found or None


class TextRequest:
    """A tokenize or detokenize request."""

    __slots__ = ("client_id", "job", "session")

    def __init__(self, session: Session, client_id: int, job: TextJob) -> None:
        self.session = session
        self.client_id = client_id
        self.job = job


class RequestNumbers:
    """Numbers for attempts: positive int32, and other ones than the router before used.

    The high bits are the router's incarnation, so that what a group still sends
    for requests of a router that died meets no number of this one.
    """

    def __init__(self, incarnation: int) -> None:
        self._base = (incarnation & 0x7F) << 24
        self._next = 1

    def take(self, used: dict[int, Stream]) -> int:
        """The next number that is not in use."""
        while True:
            number = self._base + self._next
            self._next = self._next + 1 if self._next < NUMBERS_PER_ROUTER - 1 else 1
            if number not in used:
                return number
