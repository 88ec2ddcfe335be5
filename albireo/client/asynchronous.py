"""AsyncClient: a node's services for asyncio programs.

One connection, any number of requests in flight.  A client belongs to the
event loop on which it was connected.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, cast, overload

import msgspec

from albireo.ipc.params import SamplingParams
from albireo.ipc.paths import DEFAULT_NODE
from albireo.ipc.protocol import (
    Cancel,
    Delta,
    Detokenize,
    ModelCard,
    ModelList,
    Models,
    NodeStatus,
    Status,
    Text,
    Tokens,
    Welcome,
)
from albireo.ipc.template import TemplateOptions
from albireo.ipc.tools import Tools

from .async_link import AsyncLink
from .endpoint import ANSWER_TIMEOUT_S, Endpoint
from .errors import AlbireoError, ConnectionLost, TimedOut
from .reconnect import RECONNECT_S
from .replies import Handler, Replies, Reply, as_error
from .requests import (
    Messages,
    Prompt,
    RequestKeywords,
    chat_message,
    frame,
    generate_message,
    resolve_keywords,
    token_ids,
    tokenize_message,
)
from .results import Collector, Completion, with_tool_calls

_Answer = TypeVar("_Answer", Tokens, Text, ModelList, NodeStatus)


class AsyncDeltaStream:
    """The new tokens of a request as they come: an async iterator of Deltas.

    Iteration raises an AlbireoError when the request fails.  Leaving early
    (aclose(), the end of `async with`, or dropping the last reference) cancels
    the request; cancel() does too, but lets its last Delta come.
    """

    def __init__(
        self, client: AsyncClient, make: Callable[[int], msgspec.Struct], n: int = 1
    ) -> None:
        self._client = client
        self._inbox = _Inbox()
        self._open = n
        self._over = False
        self.id = -1
        self.id = client.request(make, self._inbox.put)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        if self._over:
            raise StopAsyncIteration
        reply = await self._inbox.get()
        if reply is None:
            raise StopAsyncIteration
        if isinstance(reply, Delta):
            self._open -= reply.end is not None
            self._over = not self._open
            return reply
        self._over = True
        raise as_error(reply)

    def cancel(self) -> None:
        """Asks for an early end; iteration goes on to the Delta that says so."""
        self._client.cancel(self.id)

    async def aclose(self) -> None:
        """Ends iteration, and the request if it is still running."""
        self._over = True
        self._client.abandon(self.id)
        self._inbox.put(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if self.id >= 0 and self._client._replies.expects(self.id):
            self._client._abandon_soon(self.id)


class _Inbox:
    """Replies that wait for the iterator of a stream.

    Apart from the stream, which is to be found unused while the connection
    still knows where its replies go.
    """

    __slots__ = ("_replies", "_waiter")

    def __init__(self) -> None:
        self._replies: deque[Reply | None] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, reply: Reply | None) -> None:
        """Adds a reply; None says that iteration is to end."""
        self._replies.append(reply)
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def get(self) -> Reply | None:
        while not self._replies:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._replies.popleft()


class AsyncClient:
    """A connection to a node.  Make one with `await AsyncClient.connect()`.

    It is made again when it breaks.  What is in flight then goes on, on a node with a
    journal; on another one what had no token yet is asked again, as is a whole answer
    (generate()), and a stream raises ConnectionLost.
    """

    def __init__(self, link: AsyncLink, replies: Replies) -> None:
        self._loop = asyncio.get_running_loop()
        self._link = link
        self._replies = replies

    @classmethod
    async def connect(
        cls,
        path: str | None = None,
        *,
        node: str = DEFAULT_NODE,
        client_name: str = "",
        api_key: str = "",
        ca: str | None = None,
        reconnect_s: float = RECONNECT_S,
    ) -> Self:
        """Connects to the socket at `path`, to "tls://HOST:PORT", or to the node of that name.

        api_key: that a node asks for over TCP.  ca: PEM file of whom to trust there, instead of
            the system's authorities.
        reconnect_s: when the connection breaks later on, so long it is tried again before
            requests in flight end.

        Raises NodeNotRunning, AuthenticationError, ProtocolMismatch, or another AlbireoError.
        """
        replies = Replies()
        link = AsyncLink(Endpoint.of(path, node, ca), client_name, api_key, reconnect_s, replies)
        await link.open()
        return cls(link, replies)

    @property
    def welcome(self) -> Welcome:
        """What the node has said of itself: model, context length, version."""
        return self._link.welcome

    @property
    def in_flight(self) -> int:
        """How many of its requests have not ended yet."""
        return len(self._replies)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> Completion:
        """Continues a text, or token ids; waits for the whole answer.

        Keywords are fields of SamplingParams, which go before `params`, and priority, tenant
        and cache_salt (docs/protocol.md).
        """
        chosen, terms = resolve_keywords(params, keywords)
        return await self._collect(
            lambda number: generate_message(number, prompt, chosen, terms), chosen.n
        )

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> AsyncDeltaStream:
        """Like generate(), but gives the new tokens as they come."""
        chosen, terms = resolve_keywords(params, keywords)
        return AsyncDeltaStream(
            self, lambda number: generate_message(number, prompt, chosen, terms), chosen.n
        )

    @overload
    async def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
        template: TemplateOptions | None = None,
        stream: Literal[False] = False,
        **keywords: Unpack[RequestKeywords],
    ) -> Completion: ...
    @overload
    async def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
        template: TemplateOptions | None = None,
        stream: Literal[True],
        **keywords: Unpack[RequestKeywords],
    ) -> AsyncDeltaStream: ...
    async def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
        template: TemplateOptions | None = None,
        stream: bool = False,
        **keywords: Unpack[RequestKeywords],
    ) -> Completion | AsyncDeltaStream:
        """Answers a conversation: the whole answer, or with `stream` an iterator of Deltas.

        tools: that it may call; a whole answer has its tool_calls, a stream their text
            (albireo.client.ToolCallReader reads it, by welcome.tool_style).
        template: what the model's chat template is told besides.
        """
        chosen, terms = resolve_keywords(params, keywords)

        def make(number: int) -> msgspec.Struct:
            return chat_message(number, messages, chosen, terms, tools, template)

        if stream:
            return AsyncDeltaStream(self, make, chosen.n)
        answer = await self._collect(make, chosen.n)
        return with_tool_calls(answer, tools, self.welcome.tool_style)

    def submit(
        self,
        prompt: Prompt,
        on_reply: Callable[[Delta | AlbireoError], None],
        params: SamplingParams | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> int:
        """Starts a generate request and returns its id; for load generators.

        `on_reply` is called on the event loop with each Delta, up to the last
        with an end, or with the error that ended the request.  That spares the
        queue and the wake-up that a stream costs per Delta.  It must not raise.
        """
        chosen, terms = resolve_keywords(params, keywords)
        return self.request(
            lambda number: generate_message(number, prompt, chosen, terms), _tokens_only(on_reply)
        )

    def cancel(self, request_id: int) -> None:
        """Ends a request early; its last Delta has finish_reason "cancelled"."""
        encoded = self._replies.cancel(request_id)
        if encoded is not None:
            self._link.write(encoded)

    async def tokenize(
        self, text: str | Messages, *, add_special_tokens: bool = True, tenant: str = "",
        template: TemplateOptions | None = None,
    ) -> list[int]:  # fmt: skip
        """The ids of a text, or of a conversation through the chat template, told this."""
        answer = await self._ask(
            Tokens,
            lambda number: tokenize_message(number, text, add_special_tokens, tenant, template),
        )
        return answer.token_ids

    async def detokenize(
        self, ids: Sequence[int], *, skip_special_tokens: bool = False, tenant: str = ""
    ) -> str:
        """The text of token ids."""
        numbers = token_ids(ids)
        answer = await self._ask(
            Text,
            lambda number: Detokenize(
                id=number,
                token_ids=numbers,
                skip_special_tokens=skip_special_tokens,
                tenant=tenant,
            ),
        )
        return answer.text

    async def models(self) -> list[ModelCard]:
        """The models that the node serves."""
        return (await self._ask(ModelList, lambda number: Models(id=number))).models

    async def status(self) -> dict[str, Any]:
        """The state of the node; docs/protocol.md describes the tree."""
        return (await self._ask(NodeStatus, lambda number: Status(id=number))).status

    async def close(self) -> None:
        """Closes the connection; what is in flight raises ConnectionLost, and is cancelled."""
        closed = ConnectionLost("the connection was closed by this client")
        if cancels := self._replies.close(closed):
            self._link.write(cancels)
        await self._link.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def request(self, make: Callable[[int], msgspec.Struct], handler: Handler) -> int:
        """Sends the message that `make` gives for an id, and returns the id.

        `handler` is called on the event loop with each reply, and must not raise.
        """
        request_id, pending = self._replies.prepare(make, handler, self.welcome.max_frame_bytes)
        self._replies.begin(request_id, pending)
        self._link.ask(pending.frame)
        return request_id

    def abandon(self, request_id: int) -> None:
        """Cancels a request whose replies nobody wants any more."""
        if self._replies.forget(request_id):
            self._link.write(frame(Cancel(id=request_id)))

    def _abandon_soon(self, request_id: int) -> None:
        """The same from any thread: the garbage collector may run on another one."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.abandon, request_id)

    async def _collect(self, make: Callable[[int], msgspec.Struct], n: int) -> Completion:
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        request_id = self.request(make, Collector(n, _resolver(future)))
        try:
            return await future
        except asyncio.CancelledError:
            self.abandon(request_id)
            raise

    async def _ask(self, kind: type[_Answer], make: Callable[[int], msgspec.Struct]) -> _Answer:
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        request_id = self.request(make, _resolver(future))
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                reply = await future
        except TimeoutError:
            raise TimedOut(f"no answer within {ANSWER_TIMEOUT_S:g} s", retry=True) from None
        finally:
            self._replies.forget(request_id)
        if isinstance(reply, kind):
            return reply
        raise as_error(reply)


def _resolver(future: asyncio.Future[Any]) -> Callable[[Any], None]:
    """A callback that gives a future its result, or its exception."""

    def resolve(result: Any) -> None:
        if future.done():
            return
        if isinstance(result, AlbireoError):
            future.set_exception(result)
        else:
            future.set_result(result)

    return resolve


def _tokens_only(on_reply: Callable[[Delta | AlbireoError], None]) -> Handler:
    """The caller's callback as a Handler: a generate request has no other replies."""
    return cast(Handler, on_reply)
