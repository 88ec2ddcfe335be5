"""Requests whose connection is over: they wait for their session's next one.

A session is a name that only its client knows.  What a client of one asks is
kept as an Accepted: the prompt, everything resolved, and the tokens so far.
When the connection ends nothing is computed any more; the record waits, for
`resume_s`, until a new connection of the session says how many tokens of which
answer it has (Resume), and the request goes on behind them, as a stream does
whose group has died.  That its last tokens were sent does not say that they
came: a request that has ended is known for a while, too.  With a journal the
records outlive this process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from albireo.ipc.protocol import Have, Resume

from .journal import Journal
from .records import Accepted
from .replay import MAX_ENDED
from .requests import Refusal, Stream, TokenRequest
from .session import Session
from .tenants import Tenants
from .validate import for_choice

MAX_PARKED = 65_536


class Resumption:
    """resume_s: 0 = no request outlives its connection.  clock: seconds, of any origin."""

    def __init__(
        self, resume_s: float, journal: Journal | None, tenants: Tenants, clock: Callable[[], float]
    ) -> None:
        self.resume_s = resume_s
        self.answers = 0
        """Of the requests that wait for their client: their places are kept for them."""
        self._journal = journal
        self._tenants = tenants
        self._clock = clock
        self._owners: dict[bytes, Session] = {}
        self._parked: dict[tuple[bytes, int], tuple[Accepted, float]] = {}
        """By owner and client's id, those first that are given up first."""
        self._ended: dict[tuple[bytes, int], tuple[Accepted, float]] = {}
        """The same of requests that have ended."""
        if journal is not None:
            for record in journal.found:
                self._park(record)
            for record in journal.found_ended:
                self._remember(record)
            journal.found, journal.found_ended = [], []

    def __len__(self) -> int:
        """Requests that wait for their client."""
        return len(self._parked)

    # ------------------------------------------------------------------ sessions
    def greeted(self, session: Session) -> Session | None:
        """A connection of a session has begun; returns the one before, where that is still there:
        its client has left it."""
        before = self._owners.get(session.owner)
        self._owners[session.owner] = session
        return before

    def closed(self, session: Session) -> None:
        if self._owners.get(session.owner) is session:
            del self._owners[session.owner]

    # ------------------------------------------------------------------ requests in flight
    def begin(self, request: TokenRequest) -> None:
        """A request is resolved, and about to be given to a group."""
        session = request.session
        streams = request.streams
        submit = next(iter(streams.values())).submit
        asked = request.asked
        if not self.resume_s or not session.owner or submit is None or isinstance(asked, Resume):
            return
        self._keep(
            request,
            Accepted(
                0, session.owner, request.client_id, asked.tenant,
                submit, {choice: stream.token_ids for choice, stream in streams.items()},
            ),
        )  # fmt: skip

    def ended(self, stream: Stream) -> None:
        """An answer has ended; with the last one its request has."""
        record, over = stream.asker.record, not stream.asker.streams
        if self._journal is not None and stream.entry:
            self._journal.ended(stream.entry)
            if over and record is not None:
                self._journal.forget(record, gone=False)
        if over and record is not None:
            self._remember(record)

    def gone(self, request: TokenRequest) -> None:
        """A request was cancelled, or has failed."""
        if request.record is not None:
            self._forget(request.record)

    # ------------------------------------------------------------------ between connections
    def park(self, request: TokenRequest) -> bool:
        """Its connection is over; False when that is its end."""
        record = request.record
        if record is None:
            return False
        self._park(record)
        while len(self._parked) > MAX_PARKED:
            self._take(next(iter(self._parked)))
        return True

    def asked_again(self, session: Session, client_id: int) -> None:
        """Its client had seen nothing of a request, or has all: what is kept of it is of no use."""
        self._take((session.owner, client_id))

    def expire(self) -> None:
        """Gives up what has waited for too long."""
        now = self._clock()
        for records in (self._parked, self._ended):
            while records:
                key = next(iter(records))
                if now < records[key][1]:
                    break
                self._take(key)

    def claim(
        self,
        session: Session,
        message: Resume,
        number: Callable[[], int],
        admit: Callable[[TokenRequest, bool], None],
    ) -> TokenRequest:
        """The request with streams that go on behind what the client has.

        number: gives numbers for streams.  admit(request, over): whether it had ended; raises
        Refusal where there is no room for it then.  Raises Refusal; after "lost" nothing is kept.
        """
        key = session.owner, message.id
        found = self._parked.get(key) or self._ended.get(key)
        if found is None or session.tenant not in ("", found[0].submit.tenant):
            raise _lost("the node has no record of this request")
        old, _ = found
        request = TokenRequest(session, message, old.tenant)
        try:
            record = self._go_on(request, old, message.have, number)
            admit(request, key not in self._parked)
        except Refusal as refusal:
            request.streams.clear()  # as in arrivals.py
            if refusal.code == "invalid_request":
                raise
            self._take(key)
            if refusal.code == "lost":
                raise
            # Its client would take another code for that of a request of which nothing has come.
            why = f"the answer had ended, and cannot be computed again now ({refusal.message})"
            raise _lost(why) from None
        self._take(key)
        self._keep(request, record)
        return request

    def _go_on(
        self, request: TokenRequest, old: Accepted, haves: Sequence[Have], number: Callable[[], int]
    ) -> Accepted:
        """Gives a request its streams, behind what the client has; returns its record.

        Raises Refusal.
        """
        chosen = {have.choice: have for have in haves}
        for have in haves:
            _check(old, have)
        if not chosen or len(chosen) != len(haves):
            raise Refusal(
                "invalid_request", "have names each answer once, and one at least", param="have"
            )
        submit = msgspec.structs.replace(old.submit, tenant=request.tenant)
        tokens = {choice: old.tokens[choice][: have.tokens] for choice, have in chosen.items()}
        now = self._clock()
        for choice, have in chosen.items():
            stream = Stream(request, choice, number(), now)
            stream.submit = for_choice(submit, 0, choice, now)
            stream.resume(tokens[choice], have.prompt_logprobs, now)
            request.streams[choice] = stream
        return Accepted(0, old.owner, old.client_id, old.tenant, submit, tokens)

    def _keep(self, request: TokenRequest, record: Accepted) -> None:
        request.record = record
        if self._journal is not None and self._journal.accept(record):
            for choice, stream in request.streams.items():
                stream.entry = record.number + choice

    def _park(self, record: Accepted) -> None:
        key = record.owner, record.client_id
        self._take(key)
        self._parked[key] = record, self._clock() + self.resume_s
        answers, tokens = _places(record)
        self.answers += answers
        self._tenants.begin(record.submit.tenant, answers)
        self._tenants.count_tokens(record.submit.tenant, tokens)

    def _take(self, key: tuple[bytes, int]) -> None:
        """It is kept no longer: it goes on, or is asked again, or given up."""
        parked = self._parked.pop(key, None)
        if parked is not None:
            answers, tokens = _places(parked[0])
            self.answers -= answers
            self._tenants.end(parked[0].submit.tenant, answers, tokens)
        for found in (parked, self._ended.pop(key, None)):
            if found is not None:
                self._forget(found[0])

    def _remember(self, record: Accepted) -> None:
        """It has ended."""
        self._ended[record.owner, record.client_id] = record, self._clock() + self.resume_s
        if len(self._ended) > MAX_ENDED:
            self._take(next(iter(self._ended)))

    def _forget(self, record: Accepted) -> None:
        if self._journal is not None:
            self._journal.forget(record, gone=True)


def _places(record: Accepted) -> tuple[int, int]:
    """Answers and tokens that count as in flight meanwhile."""
    answers = len(record.tokens)
    return answers, answers * (len(record.submit.prompt_ids) + record.submit.max_tokens)


def _check(record: Accepted, have: Have) -> None:
    tokens = record.tokens.get(have.choice)
    if tokens is None:
        raise _lost(f"the node has no record of answer {have.choice} of this request")
    if not 0 <= have.tokens <= min(len(tokens), record.submit.max_tokens - 1):
        raise _lost(
            f"the node knows {len(tokens)} tokens of this answer, and the client has {have.tokens}"
        )
    if not 0 <= have.prompt_logprobs <= len(record.submit.prompt_ids):
        raise Refusal(
            "invalid_request",
            f"the prompt has {len(record.submit.prompt_ids)} tokens, not {have.prompt_logprobs}",
            param="have",
        )


def _lost(why: str) -> Refusal:
    return Refusal("lost", f"{why}: ask again; the tokens that have come are valid", retry=True)
