"""POST /v1/chat/completions."""

from __future__ import annotations

import time

import msgspec

from .answering import asked, check_model, usage_of
from .answers import AnswerMessage, ChatChoice, ChatCompletion
from .conversation import chat_messages
from .decode import decode
from .events import ChatEvents, stream
from .http import Request
from .inbox import Piece
from .link import Ask, NodeLink
from .logprobs import ChatLogprobs, chat_logprobs, prompt_logprobs
from .requests import ChatRequest
from .sampling import chat_params


async def chat_completions(request: Request, link: NodeLink) -> None:
    """Answers one request.  Raises HttpError, AlbireoError, ClientGone."""
    ask = decode(ChatRequest, await request.body())
    check_model(link, ask.model)
    request.adopt_id(ask.request_id)
    params = chat_params(ask)
    order = Ask(
        messages=chat_messages(ask.messages),
        params=params,
        priority=ask.priority or 0,
        tenant=request.tenant,
        cache_salt=ask.cache_salt or "",
    )
    async with asked(request, link, [order]) as inbox:
        if ask.stream:
            usage = ask.stream_options is not None and bool(ask.stream_options.include_usage)
            await stream(
                request, inbox, ChatEvents(request.id, link.welcome.model, params.n, usage)
            )
            return
        await inbox.wait_for_all()
        answer = _answer(request, link, ask, params.n, inbox.take())
    await request.answer(200, msgspec.json.encode(answer))


def _answer(
    request: Request, link: NodeLink, ask: ChatRequest, n: int, pieces: dict[int, Piece]
) -> ChatCompletion:
    ends = []
    choices = []
    for number in sorted(pieces):
        piece = pieces[number]
        end = piece.end
        assert end is not None
        ends.append((number, end))
        logprobs: ChatLogprobs | None = None
        if ask.logprobs:
            logprobs = chat_logprobs(piece.logprobs or [])
        choices.append(
            ChatChoice(
                index=number,
                message=AnswerMessage(content=piece.text),
                logprobs=logprobs,
                finish_reason=end.finish_reason,
                stop_reason=end.stop_reason,
            )
        )
    rows = pieces[0].prompt_logprobs
    return ChatCompletion(
        id=f"chatcmpl-{request.id}",
        created=int(time.time()),
        model=link.welcome.model,
        choices=choices,
        usage=usage_of(ends, n),
        prompt_logprobs=None if rows is None else prompt_logprobs(rows),
    )
