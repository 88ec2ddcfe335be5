"""Streams of answers that may call tools: text as content, calls as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from albireo.client import End
from albireo.client.tool_calls import Said, ToolCallReader

from .answers import (
    CalledFunction,
    CalledFunctionDelta,
    MessageDelta,
    ToolCallAnswer,
    ToolCallDelta,
)
from .events import ChatEvents, _encode
from .inbox import Piece, tokens_so_far
from .requests import StreamOptions


class ToolEvents(ChatEvents):
    """Chunks of a chat answer with tools; names: of the functions; style: Welcome.tool_style."""

    def __init__(
        self, request_id: str, model: str, n: int, options: StreamOptions, names: Sequence[str],
        style: str,
    ) -> None:  # fmt: skip
        super().__init__(request_id, model, n, options)
        self._before = b'"delta":'
        self._names = names
        self._style = style
        self._readers: dict[int, ToolCallReader] = {}

    def _event(self, choice: int, piece: Piece) -> bytes:
        first = b""
        reader = self._readers.get(choice)
        if reader is None:
            reader = self._readers[choice] = ToolCallReader(self._names, self._style)
            first = self._begin(choice, piece)
        if self._counts:
            self._count(choice, piece, tokens_so_far(piece))
        said = reader.add(piece.text)
        end = piece.end
        if end is not None:
            said += reader.finish()
        logprobs = self._logprobs(choice, piece)
        if not said and end is None and logprobs is None:
            return first
        deltas = [_delta(each) for each in said] or [MessageDelta(content="")]
        chunks = [self._chunk(choice, each, None, None) for each in deltas[:-1]]
        if end is not None:
            reason = reader.finish_reason(end.finish_reason)
            end = End(reason, end.stop_reason, end.prompt_tokens, end.completion_tokens)
        chunks.append(self._chunk(choice, deltas[-1], logprobs, end))
        return first + b"".join(chunks)

    def _chunk(self, choice: int, delta: MessageDelta, logprobs: Any, end: End | None) -> bytes:
        finish = stop = None
        if end is not None:
            self._ends.append((choice, end))
            finish, stop = end.finish_reason, end.stop_reason
        return b'%s%s,"logprobs":%s,"finish_reason":%s,"stop_reason":%s}]%s' % (
            self._prefixes[choice], _encode(delta), _encode(logprobs), _encode(finish),
            _encode(stop), self._tail,
        )  # fmt: skip


def _delta(said: Said) -> MessageDelta:
    if said.call < 0:
        return MessageDelta(content=said.text)
    if said.begun is None:
        function = CalledFunctionDelta(arguments=said.text)
        return MessageDelta(tool_calls=[ToolCallDelta(index=said.call, function=function)])
    number, name = said.begun
    function = CalledFunctionDelta(name=name, arguments="")
    call = ToolCallDelta(index=said.call, id=number, type="function", function=function)
    return MessageDelta(tool_calls=[call])


def answered_calls(calls: Sequence[Any]) -> list[ToolCallAnswer]:
    """ToolCalls as an answer has them."""
    return [
        ToolCallAnswer(
            id=call.id, function=CalledFunction(name=call.name, arguments=call.arguments)
        )
        for call in calls
    ]
