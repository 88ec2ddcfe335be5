"""Requests that are answered at once, or by the tokenizer alone: no group is asked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import msgspec

from albireo.ipc.config import ActorSpec
from albireo.ipc.messages import Encoded, TextFailed
from albireo.ipc.protocol import (
    Detokenize,
    Error,
    ModelCard,
    ModelList,
    Models,
    NodeStatus,
    Status,
    Text,
    Tokenize,
    Tokens,
)

from .requests import Refusal, TextRequest, tenant_of
from .session import Session
from .text_jobs import Answer
from .texts import TextQueue
from .validate import RequestLimits, check_detokenize, check_tokenize


class Services:
    """tokenize, detokenize, models and status.

    status: makes the status tree.
    ended: called when a request that was in flight has its answer.
    """

    def __init__(
        self,
        spec: ActorSpec,
        limits: RequestLimits,
        texts: TextQueue,
        status: Callable[[Callable[[dict[str, Any]], None]], None],
        ended: Callable[[], None],
    ) -> None:
        self._limits = limits
        self._texts = texts
        self._answer_status = status
        self._ended = ended
        self._card = ModelCard(
            id=spec.model.name,
            max_model_len=limits.max_model_len,
            vocab_size=limits.vocab_size,
            architecture=spec.model.architecture,
        )

    def tokenize(self, session: Session, message: Tokenize) -> None:
        session.check_id(message.id)
        session.check_room()
        check_tokenize(message)
        done = functools.partial(self._text_done, session, message.id)
        tenant = tenant_of(session, message.tenant)
        if message.text is not None:
            job = self._texts.encode_text(
                message.text, message.add_special_tokens, done, tenant=tenant
            )
        else:
            job = self._texts.encode_chat(
                message.messages or [], done, tenant=tenant, template=message.template
            )
        session.requests[message.id] = TextRequest(session, message.id, job)

    def detokenize(self, session: Session, message: Detokenize) -> None:
        session.check_id(message.id)
        session.check_room()
        check_detokenize(self._limits, message)
        job = self._texts.decode_ids(
            message.token_ids,
            message.skip_special_tokens,
            functools.partial(self._text_done, session, message.id),
            tenant_of(session, message.tenant),
        )
        session.requests[message.id] = TextRequest(session, message.id, job)

    def models(self, session: Session, message: Models) -> None:
        session.check_id(message.id)
        session.send(ModelList(id=message.id, models=[self._card]), message.id)

    def status(self, session: Session, message: Status) -> None:
        session.check_id(message.id)

        def answer(tree: dict[str, Any]) -> None:
            session.send(NodeStatus(id=message.id, status=tree), message.id)

        self._answer_status(answer)

    def fail(self, request: TextRequest, refusal: Refusal) -> None:
        """Ends a tokenize or detokenize request with an error."""
        self._texts.cancel(request.job)
        failed = TextFailed(request.job.message.key, refusal.code, refusal.message)
        self._text_done(request.session, request.client_id, failed)

    def _text_done(self, session: Session, client_id: int, answer: Answer) -> None:
        del session.requests[client_id]
        reply: msgspec.Struct
        if isinstance(answer, TextFailed):
            reply = Error(
                id=client_id,
                code=answer.code,
                message=answer.message,
                retry=answer.code == "unavailable",
            )
        elif isinstance(answer, Encoded):
            reply = Tokens(id=client_id, token_ids=answer.token_ids)
        else:
            reply = Text(id=client_id, text=answer.text)
        session.send(reply, client_id)
        self._ended()
