"""POST /v1/chat/completions."""

from __future__ import annotations

import time

import msgspec

from albireo.client.tool_calls import read_tool_calls
from albireo.ipc.tools import Tools

from .answering import asked, check_model, usage_of
from .answers import AnswerMessage, ChatChoice, ChatCompletion
from .conversation import chat_messages, template_options
from .decode import decode
from .errors import invalid
from .events import ChatEvents, stream
from .formats import grammar_name
from .http import Request
from .inbox import Piece
from .link import Ask, NodeLink
from .logprobs import ChatLogprobs, chat_logprobs, prompt_logprobs
from .requests import ChatRequest, StreamOptions
from .sampling import chat_params
from .tool_events import ToolEvents, answered_calls
from .tools import tools_of


async def chat_completions(request: Request, link: NodeLink) -> None:
    """Answers one request.  Raises HttpError, AlbireoError, ClientGone."""
    ask = decode(ChatRequest, await request.body())
    check_model(link, ask.model)
    request.adopt_id(ask.request_id)
    params = chat_params(ask, link.welcome.sampling_defaults)
    tools = tools_of(ask)
    if tools is not None and not tools.bind:
        tools = None
    request.grammar = grammar_name(ask) if tools is None else "tools"
    if tools is not None and params.grammar is not None:
        raise invalid(
            "tools and response_format cannot both bind the answer: give one, or tool_choice none",
            "response_format",
        )
    order = Ask(
        messages=chat_messages(ask.messages),
        params=params,
        priority=ask.priority or 0,
        tenant=request.tenant,
        cache_salt=ask.cache_salt or "",
        tools=tools,
        template=template_options(ask),
    )
    async with asked(request, link, [order], bool(ask.stream)) as inbox:
        if ask.stream:
            options = ask.stream_options or StreamOptions()
            about = (request.id, link.welcome.model, params.n, options)
            events = ChatEvents(*about)
            if tools is not None:
                names = [each.name for each in tools.functions]
                events = ToolEvents(*about, names, link.welcome.tool_style)
            await stream(request, inbox, events)
            return
        await inbox.wait_for_all()
        answer = _answer(request, link, ask, tools, params.n, inbox.take())
    await request.answer(200, msgspec.json.encode(answer))


def _answer(
    request: Request, link: NodeLink, ask: ChatRequest, tools: Tools | None, n: int,
    pieces: dict[int, Piece],
) -> ChatCompletion:  # fmt: skip
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
        message, reason = AnswerMessage(content=piece.text), end.finish_reason
        if tools is not None:
            message, reason = _with_calls(piece.text, reason, tools, link.welcome.tool_style)
        choices.append(
            ChatChoice(
                index=number,
                message=message,
                logprobs=logprobs,
                finish_reason=reason,
                stop_reason=end.stop_reason,
            )
        )
    scored = None
    if ask.prompt_logprobs is not None:
        scored = prompt_logprobs(pieces[0].prompt_logprobs or [])
    return ChatCompletion(
        id=f"chatcmpl-{request.id}",
        created=int(time.time()),
        model=link.welcome.model,
        choices=choices,
        usage=usage_of(ends, n),
        prompt_logprobs=scored,
    )


def _with_calls(text: str, reason: str, tools: Tools, style: str) -> tuple[AnswerMessage, str]:
    """A message with its calls, and why it ended."""
    names = [each.name for each in tools.functions]
    text, calls, reason = read_tool_calls(text, reason, names, style)
    if not calls:
        return AnswerMessage(content=text), reason
    message = AnswerMessage(content=text or None, tool_calls=answered_calls(calls))
    return message, reason
