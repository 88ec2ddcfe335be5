"""HTTP/1.1 connections that read server-sent events, cheap enough not to be what is measured.

One asyncio Protocol a connection: httptools (C) takes HTTP apart, msgspec reads
of an event only what counts.  One clock reading stamps all events of a read.
A connection is kept for the next request as long as the server keeps it.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec

from ..nodes import BenchError

_MAX_BODY_BYTES = 1 << 20


class Target(msgspec.Struct, frozen=True):
    """A server.  uds: the path of its Unix socket, in place of host and port.

    prefix: of every path.
    """

    host: str
    port: int
    uds: str | None = None
    tls: bool = False
    prefix: str = ""
    api_key: str | None = None

    @classmethod
    def parse(cls, base_url: str, uds: str | None, api_key: str | None) -> Target:
        """Raises BenchError."""
        parts = urlsplit(base_url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise BenchError(f"--base-url {base_url!r}: give http://HOST:PORT or https://HOST:PORT")
        tls = parts.scheme == "https"
        port = port or (443 if tls else 80)
        return cls(parts.hostname, port, uds, tls, parts.path.rstrip("/"), api_key)

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """A whole request, headers and body."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"{method} {self.prefix}{path} HTTP/1.1",
            f"Host: {host}:{self.port}",
            "User-Agent: albireo-bench",
        ]
        if self.api_key:
            lines.append(f"Authorization: Bearer {self.api_key}")
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join((*lines, "", "")).encode() + body

    def __str__(self) -> str:
        return self.uds or f"http{'s' if self.tls else ''}://{self.host}:{self.port}{self.prefix}"


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[msgspec.Raw] | None = None

    @property
    def says_something(self) -> bool:
        return bool(self.content or self.reasoning_content or self.reasoning or self.tool_calls)


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode_event = msgspec.json.Decoder(_Event).decode


class Answer:
    """A request and what has come of it; times are of time.perf_counter().

    began: when it was sent.  first: the first event with text.  last: the last event of a choice.
    gaps: between events with text, in seconds.  events: with text.
    prompt_tokens, completion_tokens: as the server counts them.
    error: why it is no whole answer.
    body: of an answer that is no stream of events.
    """

    __slots__ = (
        "_at", "_rest", "_stream", "began", "body", "completion_tokens", "error", "events",
        "finished", "first", "gaps", "last", "prompt_tokens", "status",
    )  # fmt: skip

    def __init__(self, stream: bool) -> None:
        self.began = time.perf_counter()
        self.first = self.last = self._at = 0.0
        self.gaps: list[float] = []
        self.events = 0
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.error: str | None = None
        self.finished = not stream
        self.status = 0
        self.body = bytearray()
        self._stream = stream
        self._rest = b""

    @property
    def new_tokens(self) -> int:
        """As the server counts; where it does not, events with text."""
        return self.events if self.completion_tokens is None else self.completion_tokens

    @property
    def has_times(self) -> bool:
        """Whether it is whole, and there was text, without which it has no first event."""
        return self.error is None and self.events > 0

    def feed(self, data: bytes, now: float) -> None:
        """Bytes of the body, as they come."""
        if self.status != 200 or not self._stream:
            self.body += data[: _MAX_BODY_BYTES - len(self.body)]
            return
        if self._rest:
            data = self._rest + data
        *lines, self._rest = data.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def end(self) -> None:
        """The body is whole."""
        if self.status != 200:
            self.error = f"HTTP {self.status}: {_reason(bytes(self.body))}"
        elif not self.finished and self.error is None:
            self.error = "the answer has no end: neither a finish_reason nor [DONE] has come"

    def _event(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            self.finished = True
            return
        try:
            event = _decode_event(payload)
        except msgspec.MsgspecError as error:
            self.error = f"an event cannot be read: {error}: {payload[:200]!r}"
            return
        for choice in event.choices or ():
            if choice.text or (choice.delta is not None and choice.delta.says_something):
                if self.events:
                    self.gaps.append(now - self._at)
                else:
                    self.first = now
                self.events += 1
                self._at = now
            self.last = now
            if choice.finish_reason is not None:
                self.finished = True
        if event.usage is not None:
            self.prompt_tokens = event.usage.prompt_tokens
            self.completion_tokens = event.usage.completion_tokens
        if event.error is not None:
            self.error = _message(event.error)


class Connection(asyncio.Protocol):
    """One connection with at most one request on it."""

    def __init__(self) -> None:
        self.usable = False
        self.untouched = True
        self._transport: asyncio.Transport
        self._parser: Any
        self._answer: Answer | None = None
        self._done: asyncio.Future[None] | None = None
        self._now = 0.0

    async def ask(self, request: bytes, answer: Answer) -> None:
        """Sends a request and waits for the end of its answer.

        untouched: afterwards, whether the connection broke before anything came.
        """
        self._answer = answer
        self._done = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self.usable = False
        self.untouched = True
        self._transport.write(request)
        try:
            await self._done
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._answer = None

    def close(self) -> None:
        self.usable = False
        self._transport.close()

    # ------------------------------------------------------------------ asyncio calls
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        self.untouched = False
        if self._answer is None:
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"the server does not speak HTTP/1.1: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        if error is None and self._answer is not None and self._answer.finished:
            # Of a body without a length it is the end.
            self._end()
        self._fail(f"the connection broke{f': {error}' if error else ''}")

    # ------------------------------------------------------------------ the parser calls
    def on_headers_complete(self) -> None:
        if self._answer is not None:
            self._answer.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        if self._answer is not None:
            self._answer.feed(data, self._now)

    def on_message_complete(self) -> None:
        self.usable = self._parser.should_keep_alive()
        if not self.usable:
            self._transport.close()
        self._end()

    # ------------------------------------------------------------------ the end of an answer
    def _end(self) -> None:
        if self._answer is not None and self._done is not None and not self._done.done():
            self._answer.end()
            self._done.set_result(None)

    def _fail(self, reason: str) -> None:
        if self._answer is not None and self._done is not None and not self._done.done():
            self._answer.error = reason
            self._done.set_result(None)
            self._transport.close()


class Connections:
    """Connections to one server, made when none is free."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._free: list[Connection] = []
        self._tls = ssl.create_default_context() if target.tls else None

    async def ask(self, request: bytes, timeout_s: float, *, stream: bool = True) -> Answer:
        """The answer, or what went wrong instead of it, as its `error`.

        Its time begins here: where no connection is free, making one is part of it.
        """
        answer = Answer(stream)
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    kept = self._take()
                    connection = kept or await self._connect()
                    await connection.ask(request, answer)
                    if answer.error is None or kept is None or not connection.untouched:
                        break
                    # The server had closed a kept connection just then.
                    answer.error = None
        except TimeoutError:
            answer.error = f"no whole answer within {timeout_s:g} s"
        except OSError as error:
            answer.error = f"no connection to {self._target}: {error}"
        else:
            if connection.usable:
                self._free.append(connection)
        return answer

    def close(self) -> None:
        for connection in self._free:
            connection.close()
        self._free.clear()

    def _take(self) -> Connection | None:
        while self._free:
            connection = self._free.pop()
            if connection.usable:
                return connection
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        target = self._target
        if target.uds is not None:
            _, made = await loop.create_unix_connection(
                Connection, target.uds, ssl=self._tls,
                server_hostname=target.host if self._tls else None,
            )  # fmt: skip
        else:
            _, made = await loop.create_connection(
                Connection, target.host, target.port, ssl=self._tls
            )
        return made


def _reason(body: bytes) -> str:
    """The message of an error's body, or the body."""
    try:
        tree = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        return body.decode(errors="replace").strip() or "no body"
    return _message(tree.get("error", tree) if isinstance(tree, dict) else tree)


def _message(error: Any) -> str:
    """An error of whatever form as a text."""
    if isinstance(error, dict):
        found = error.get("message") or error.get("detail")
        if isinstance(found, str):
            return found
    return error if isinstance(error, str) else msgspec.json.encode(error).decode()
