"""A request's way from its message to streams that can be given to a group.

It is in its session's `requests`, and its streams are in the router's, as soon
as it is taken; what cannot be said before its text is tokenized ends it later.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol, TypeVar

from albireo.ipc.messages import Encoded, TextFailed
from albireo.ipc.protocol import Chat, Generate, Resume

from .groups import GroupTable
from .requests import Refusal, RequestNumbers, Stream, TokenRequest
from .resume import Resumption
from .session import Session
from .tenants import Tenants
from .text_jobs import Answer
from .texts import TextQueue
from .validate import (
    RequestLimits,
    check_chat,
    check_generate,
    check_prompt_ids,
    for_choice,
    resolve,
)

Asked = TypeVar("Asked", Generate, Chat)


class Next(Protocol):
    """Where requests go from here: the router."""

    streams: dict[int, Stream]
    refusing: Refusal | None

    def submit_all(self, request: TokenRequest) -> None:
        """All is known that a group needs."""

    def resubmit_all(self, request: TokenRequest) -> None:
        """The same of a request that goes on: it has waited before."""

    def fail(self, request: TokenRequest, refusal: Refusal) -> None: ...


class Arrivals:
    """Handles generate, chat and resume; all raise Refusal."""

    def __init__(
        self,
        router: Next,
        limits: RequestLimits,
        numbers: RequestNumbers,
        groups: GroupTable,
        tenants: Tenants,
        texts: TextQueue,
        resumption: Resumption,
        clock: Callable[[], float],
        draw_seed: Callable[[], int],
    ) -> None:
        """draw_seed: 64 bits, for a request without a seed."""
        self._router = router
        self._limits = limits
        self._numbers = numbers
        self._groups = groups
        self._tenants = tenants
        self._texts = texts
        self._resumption = resumption
        self._clock = clock
        self._draw_seed = draw_seed

    def generate(self, session: Session, message: Generate) -> None:
        session.check_id(message.id)
        session.check_room()
        check_generate(self._limits, message)
        self._take(session, message, self._prepare)

    def chat(self, session: Session, message: Chat) -> None:
        session.check_id(message.id)
        session.check_room()
        check_chat(self._limits, message)
        self._take(session, message, self._prepare_chat)

    def resume(self, session: Session, message: Resume) -> None:
        """Raises Refusal."""
        session.check_id(message.id)
        if self._router.refusing is not None:
            raise self._router.refusing
        request = self._resumption.claim(session, message, self._take_number, self._admit_again)
        self._begin(request)
        self._router.resubmit_all(request)

    def _take(
        self, session: Session, message: Asked, prepare: Callable[[TokenRequest, Asked], None]
    ) -> None:
        """Raises Refusal, and keeps nothing then."""
        request = self._admit(session, message)
        try:
            prepare(request, message)
        except Refusal:
            # Request and streams name each other: with the session they would stay until the
            # collector of cycles goes through everything, which is seldom.
            request.streams.clear()
            raise
        self._begin(request)
        if request.job is None:
            self._router.submit_all(request)

    def _prepare(self, request: TokenRequest, message: Generate) -> None:
        """Decides what the group is given, or asks the tokenizer first.  Raises Refusal."""
        words, grammar = message.params.bad_words, message.params.grammar
        if message.prompt_ids is not None and not words and grammar is None:
            self._resolve(request, message.prompt_ids)
            return
        done = functools.partial(self._encoded, request)
        request.job = self._texts.encode_text(
            message.prompt or "", True, done, words, grammar,
            context=self._limits.max_model_len, tenant=request.tenant,
        )  # fmt: skip

    def _prepare_chat(self, request: TokenRequest, message: Chat) -> None:
        done = functools.partial(self._encoded, request)
        params = message.params
        request.job = self._texts.encode_chat(
            message.messages, done, params.bad_words, params.grammar, message.tools,
            context=self._limits.max_model_len, tenant=request.tenant, template=message.template,
        )  # fmt: skip

    def _admit_again(self, request: TokenRequest, over: bool) -> None:
        """Bounds do not count: it was taken when it was asked, and its place was kept.

        over: but not where it had ended, and somebody else may have its place.  Raises Refusal.
        """
        tokens = sum(stream.all_tokens for stream in request.streams.values())
        if over:
            self._admit_answers(request.tenant, len(request.streams))
            self._tenants.admit_tokens(request.tenant, tokens)
        else:
            self._tenants.count_tokens(request.tenant, tokens)

    def _admit_answers(self, tenant: str, answers: int) -> None:
        """Those that wait for their client have their places.  Raises Refusal."""
        in_flight = len(self._router.streams) + self._resumption.answers
        self._groups.admit(in_flight, answers, self._tenants.in_flight(tenant))
        self._tenants.admit(tenant, answers)

    def _admit(self, session: Session, message: Generate | Chat) -> TokenRequest:
        """A request with numbers for its streams, which are not in `streams` yet."""
        if self._router.refusing is not None:
            raise self._router.refusing
        self._resumption.asked_again(session, message.id)
        n = message.params.n
        request = TokenRequest(session, message)
        self._admit_answers(request.tenant, n)
        now = self._clock()
        for choice in range(n):
            request.streams[choice] = Stream(request, choice, self._take_number(), now)
        return request

    def _take_number(self) -> int:
        return self._numbers.take(self._router.streams)

    def _begin(self, request: TokenRequest) -> None:
        request.session.requests[request.client_id] = request
        self._tenants.begin(request.tenant, len(request.streams))
        for stream in request.streams.values():
            self._router.streams[stream.request] = stream

    def _encoded(self, request: TokenRequest, answer: Answer) -> None:
        """The tokenizer has answered for a request."""
        request.job = None
        try:
            if isinstance(answer, TextFailed):
                raise Refusal(
                    answer.code,
                    answer.message,
                    param=answer.param,
                    retry=answer.code == "unavailable",
                )
            assert isinstance(answer, Encoded)
            prompt_ids = answer.token_ids
            asked = request.asked
            if isinstance(asked, Generate) and asked.prompt_ids is not None:
                prompt_ids = asked.prompt_ids
            check_prompt_ids(self._limits, prompt_ids)
            self._resolve(request, prompt_ids, answer.words, answer.grammar)
        except Refusal as refusal:
            self._router.fail(request, refusal)
        else:
            self._router.submit_all(request)

    def _resolve(
        self,
        request: TokenRequest,
        prompt_ids: list[int],
        bad_words: tuple[tuple[int, ...], ...] = (),
        grammar: str = "",
    ) -> None:
        """Decides what the group is given for each stream.  Raises Refusal."""
        asked = request.asked
        assert not isinstance(asked, Resume)
        terms = self._tenants.terms(request.tenant, asked.cache_salt)
        first = resolve(self._limits, prompt_ids, bad_words, asked, terms, grammar, self._draw_seed)
        tokens = len(prompt_ids) + first.max_tokens
        self._tenants.admit_tokens(request.tenant, tokens * len(request.streams))
        for choice, stream in request.streams.items():
            stream.submit = for_choice(first, stream.request, choice, stream.times.arrived)
