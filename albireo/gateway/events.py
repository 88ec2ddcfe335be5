"""Streams of server-sent events: the hot path of the gateway.

An event is `data: <chunk>\\n\\n`.  All of a chunk but the new text is the same for
a choice from its second event on, so it is made once, and an event costs one
encoding of a string and one write.  All choices of a step leave in one write;
while the client does not read, the inbox merges.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from albireo.client import AlbireoError, Delta, End

from .answering import usage_of
from .answers import Usage
from .errors import http_error
from .http import ChunkWriter, Request
from .inbox import Inbox, Piece, tokens_so_far
from .logprobs import Offsets, chat_logprobs, completion_logprobs, echo_logprobs
from .requests import StreamOptions

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


async def stream(request: Request, inbox: Inbox, events: ChatEvents | CompletionEvents) -> None:
    """Writes all events of an answer, up to [DONE].

    Raises AlbireoError when the node refuses the request before its first token:
    that is an answer with a status of its own.  Raises ClientGone.
    """
    inbox.interval = request.stream_interval
    await inbox.wait()
    while inbox.error is None and not events.ready(inbox.pending):
        await inbox.wait_for_more()
    if inbox.error is not None:
        raise inbox.error
    await request.start_events()
    if inbox.choices == 1 and request.chunks is not None and inbox.interval == 1:
        inbox.direct = _writer(events, request.chunks)
    while inbox.open:
        data = events.of(inbox.take())
        if data:
            await request.send_events(data)
        if inbox.error is not None:
            await request.send_events(error_event(inbox.error) + DONE, last=True)
            return
        if inbox.open:
            await inbox.wait()
    await request.send_events(events.of(inbox.take()) + events.usage() + DONE, last=True)


def _writer(events: ChatEvents | CompletionEvents, chunks: ChunkWriter) -> Callable[[Delta], bool]:
    """Writes the events of a request's one choice as its Deltas come."""

    def direct(delta: Delta) -> bool:
        if not chunks.can_write():
            return False
        data = events.of({0: delta})
        if data:
            chunks.write_chunk(data)
        return True

    return direct


def error_event(error: AlbireoError) -> bytes:
    return b"data: " + http_error(error).body() + b"\n\n"


class _Events:
    """Chunks of one HTTP request.

    before: the part of a choice ahead of its text; after: behind it.
    """

    def __init__(
        self, answer_id: str, kind: str, model: str, n: int, options: StreamOptions,
        before: bytes, after: bytes,
    ) -> None:  # fmt: skip
        head = {"id": answer_id, "object": kind, "created": int(time.time()), "model": model}
        self._head = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._before = before
        self._after = after
        self._n = n
        self._include_usage = bool(options.include_usage)
        self._counts = bool(options.continuous_usage_stats)
        self._prompt_tokens: dict[int, int] = {}
        self._end_with(b',"usage":null' if self._include_usage else b"")
        self._prefixes: dict[int, bytes] = {}
        self._ends: list[tuple[int, End]] = []

    def ready(self, pieces: dict[int, Piece]) -> bool:
        """Whether the first event can be made."""
        return True

    def of(self, pieces: dict[int, Piece]) -> bytes:
        """The events of what has come."""
        if len(pieces) == 1:
            for choice, piece in pieces.items():
                return self._event(choice, piece)
        return b"".join([self._event(choice, piece) for choice, piece in pieces.items()])

    def usage(self) -> bytes:
        """The chunk without choices, where it is asked for."""
        if not self._include_usage:
            return b""
        usage = _encode(usage_of(self._ends, self._n))
        return self._head + b'],"usage":' + usage + b"}\n\n"

    def _event(self, choice: int, piece: Piece) -> bytes:
        prefix = self._prefixes.get(choice)
        text = piece.text
        if prefix is not None and piece.end is None and not piece.logprobs and not self._counts:
            return prefix + _encode(text) + self._plain_end if text else b""
        first = self._begin(choice, piece) if prefix is None else b""
        if self._counts:
            self._count(choice, piece, tokens_so_far(piece))
        if not text and piece.end is None and not piece.logprobs:
            return first
        return first + self._full(choice, text, self._logprobs(choice, piece), piece.end)

    def _begin(self, choice: int, piece: Piece) -> bytes:
        """The first word of a choice: what goes ahead of its tokens."""
        if self._counts:
            self._count(choice, piece, 0)
        self._prefixes[choice] = b'%s{"index":%d,%s' % (self._head, choice, self._before)
        return self._first(choice, piece)

    def _count(self, choice: int, piece: Piece, tokens: int) -> None:
        """Has the next chunks say that the choice has so many tokens."""
        prompt = self._prompt_tokens.setdefault(choice, piece.prompt_tokens)
        usage = Usage(prompt_tokens=prompt, completion_tokens=tokens, total_tokens=prompt + tokens)
        self._end_with(b',"usage":' + _encode(usage))

    def _end_with(self, usage: bytes) -> None:
        """Sets what chunks have behind their choice."""
        self._tail = usage + b"}\n\n"
        self._plain_end = self._after + b',"logprobs":null,"finish_reason":null}]' + self._tail

    def _full(self, choice: int, text: str, logprobs: Any, end: End | None) -> bytes:
        """An event with everything that it may have."""
        finish = stop = b"null"
        if end is not None:
            self._ends.append((choice, end))
            finish, stop = _encode(end.finish_reason), _encode(end.stop_reason)
        return b'%s%s%s,"logprobs":%s,"finish_reason":%s,"stop_reason":%s}]%s' % (
            self._prefixes[choice], _encode(text), self._after, _encode(logprobs), finish, stop,
            self._tail,
        )  # fmt: skip

    def _first(self, choice: int, piece: Piece) -> bytes:
        """An event ahead of a choice's first tokens, or nothing."""
        raise NotImplementedError

    def _logprobs(self, choice: int, piece: Piece) -> Any:
        raise NotImplementedError


class ChatEvents(_Events):
    """Chunks of /v1/chat/completions; the first of each choice has the role."""

    def __init__(self, request_id: str, model: str, n: int, options: StreamOptions) -> None:
        super().__init__(
            f"chatcmpl-{request_id}", "chat.completion.chunk", model, n, options,
            b'"delta":{"content":', b"}",
        )  # fmt: skip

    def _first(self, choice: int, piece: Piece) -> bytes:
        return b'%s{"index":%d,"delta":{"role":"assistant","content":""%s' % (
            self._head, choice, self._plain_end,
        )  # fmt: skip

    def _logprobs(self, choice: int, piece: Piece) -> Any:
        return chat_logprobs(piece.logprobs) if piece.logprobs else None


class CompletionEvents(_Events):
    """Chunks of /v1/completions.

    echoes: what each prompt's answers begin with.
    first_tokens: with echo and logprobs, the text of each prompt's first token.
    scores_only: the tokens themselves are not shown.
    offsets: of an answer whose text begins there.
    """

    def __init__(
        self, request_id: str, model: str, n: int, options: StreamOptions,
        echoes: list[str], first_tokens: list[str], scores_only: bool,
        offsets: Callable[[int], Offsets],
    ) -> None:  # fmt: skip
        super().__init__(
            f"cmpl-{request_id}", "text_completion", model, n, options, b'"text":', b""
        )
        self._echoes = echoes
        self._first_tokens = first_tokens
        self._scores_only = scores_only
        self._new_offsets = offsets
        self._offsets: dict[int, Offsets] = {}
        self._prompt_rows: dict[int, Any] = {}

    def ready(self, pieces: dict[int, Piece]) -> bool:
        # A prompt's log-probabilities come ahead of the first token of its first answer.
        firsts = (pieces.get(at * self._n) for at in range(len(self._first_tokens)))
        return all(each and (each.logprobs or each.end) for each in firsts)

    def of(self, pieces: dict[int, Piece]) -> bytes:
        if self._first_tokens:
            for choice, piece in pieces.items():
                if piece.prompt_logprobs is not None:
                    self._prompt_rows[choice // self._n] = piece.prompt_logprobs
        if self._scores_only:
            pieces = {choice: without_tokens(piece) for choice, piece in pieces.items()}
        return super().of(pieces)

    def _first(self, choice: int, piece: Piece) -> bytes:
        if not self._echoes:
            return b""
        prompt = choice // self._n
        logprobs = None
        text = self._echoes[prompt]
        if self._first_tokens:
            first = self._first_tokens[prompt]
            logprobs = echo_logprobs(self._prompt_rows.get(prompt, []), text, first)
        return self._full(choice, text, logprobs, None)

    def _logprobs(self, choice: int, piece: Piece) -> Any:
        if not piece.logprobs:
            return None
        offsets = self._offsets.get(choice)
        if offsets is None:
            begin = len(self._echoes[choice // self._n]) if self._echoes else 0
            offsets = self._offsets[choice] = self._new_offsets(begin)
        return completion_logprobs(piece.logprobs, offsets)


def without_tokens(piece: Piece) -> Delta:
    """Of a request that is for its prompt alone."""
    end = piece.end
    if end is not None:
        end = End("length", None, end.prompt_tokens, 0)
    return Delta(0, 0, [], "", end, prompt_tokens=piece.prompt_tokens)
