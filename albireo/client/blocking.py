"""Client: a node's services for programs with threads, or with just one.

A reader thread takes replies off the connection and hands them to the calls
that wait for them, so many threads can share a client.  Frames are written by
whichever other thread has one: blocking_link.py says how.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload

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

from .blocking_link import Link
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


class DeltaStream:
    """The new tokens of a request as they come: an iterator of Deltas.

    Iteration raises an AlbireoError when the request fails.  Leaving early
    (close(), the end of `with`, or dropping the last reference) cancels the
    request; cancel() does too, but lets its last Delta come.
    """

    def __init__(
        self,
        client: Client,
        make: Callable[[int], msgspec.Struct],
        timeout_s: float | None,
        n: int = 1,
    ) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._replies: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        self._open = n
        self._over = False
        self.id = -1
        self.id = client.request(make, self._replies.put)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        if self._over:
            raise StopIteration
        try:
            reply = self._replies.get(timeout=self._timeout_s)
        except queue.Empty:
            self.close()
            raise TimedOut(f"no new token within {self._timeout_s} s", retry=True) from None
        if reply is None:
            raise StopIteration
        if isinstance(reply, Delta):
            self._open -= reply.end is not None
            self._over = not self._open
            return reply
        self._over = True
        raise as_error(reply)

    def cancel(self) -> None:
        """Asks for an early end; iteration goes on to the Delta that says so."""
        self._client.cancel(self.id)

    def close(self) -> None:
        """Ends iteration, and the request if it is still running."""
        self._over = True
        if self.id >= 0:
            self._client.abandon(self.id)
            self._replies.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Client:
    """A connection to a node, for any number of threads.  Make one with `Client.connect()`.

    It is made again when it breaks.  What is in flight then goes on, on a node with a
    journal; on another one what had no token yet is asked again, as is a whole answer
    (generate()), and a stream raises ConnectionLost.

    It does not survive a fork: a child process needs a connection of its own.
    """

    def __init__(self, link: Link, replies: Replies) -> None:
        self._link = link
        self._replies = replies
        self._process = os.getpid()
        # The thread must not hold the client: one that nobody uses is to be closed.
        self._reader = threading.Thread(target=link.run, name="albireo client", daemon=True)
        self._reader.start()

    @classmethod
    def connect(
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
        link = Link(Endpoint.of(path, node, ca), client_name, api_key, reconnect_s, replies)
        link.open()
        return cls(link, replies)

    @property
    def welcome(self) -> Welcome:
        """What the node has said of itself: model, context length, version."""
        return self._link.welcome

    @property
    def in_flight(self) -> int:
        """How many of its requests have not ended yet."""
        return len(self._replies)

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> Completion:
        """Continues a text, or token ids; waits for the whole answer.

        Keywords are fields of SamplingParams, which go before `params`, and priority, tenant
        and cache_salt (docs/protocol.md).
        """
        chosen, terms = resolve_keywords(params, keywords)
        return self._collect(
            lambda number: generate_message(number, prompt, chosen, terms), timeout_s, chosen.n
        )

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> DeltaStream:
        """Like generate(), but gives the new tokens as they come.

        timeout_s: longest wait for the next of them.
        """
        chosen, terms = resolve_keywords(params, keywords)
        return DeltaStream(
            self,
            lambda number: generate_message(number, prompt, chosen, terms),
            timeout_s,
            chosen.n,
        )

    @overload
    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
        template: TemplateOptions | None = None,
        stream: Literal[False] = False,
        timeout_s: float | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
        template: TemplateOptions | None = None,
        stream: Literal[True],
        timeout_s: float | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> DeltaStream: ...
    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
        template: TemplateOptions | None = None,
        stream: bool = False,
        timeout_s: float | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> Completion | DeltaStream:
        """Answers a conversation: the whole answer, or with `stream` an iterator of Deltas.

        tools: that it may call; a whole answer has its tool_calls, a stream their text
            (albireo.client.ToolCallReader reads it, by welcome.tool_style).
        template: what the model's chat template is told besides.
        """
        chosen, terms = resolve_keywords(params, keywords)

        def make(number: int) -> msgspec.Struct:
            return chat_message(number, messages, chosen, terms, tools, template)

        if stream:
            return DeltaStream(self, make, timeout_s, chosen.n)
        answer = self._collect(make, timeout_s, chosen.n)
        return with_tool_calls(answer, tools, self.welcome.tool_style)

    def cancel(self, request_id: int) -> None:
        """Ends a request early; its last Delta has finish_reason "cancelled"."""
        encoded = self._replies.cancel(request_id)
        if encoded is not None:
            self._link.write(encoded)

    def tokenize(
        self, text: str | Messages, *, add_special_tokens: bool = True, tenant: str = "",
        template: TemplateOptions | None = None,
    ) -> list[int]:  # fmt: skip
        """The ids of a text, or of a conversation through the chat template, told this."""
        return self._ask(
            Tokens,
            lambda number: tokenize_message(number, text, add_special_tokens, tenant, template),
        ).token_ids

    def detokenize(
        self, ids: Sequence[int], *, skip_special_tokens: bool = False, tenant: str = ""
    ) -> str:
        """The text of token ids."""
        numbers = token_ids(ids)
        return self._ask(
            Text,
            lambda number: Detokenize(
                id=number,
                token_ids=numbers,
                skip_special_tokens=skip_special_tokens,
                tenant=tenant,
            ),
        ).text

    def models(self) -> list[ModelCard]:
        """The models that the node serves."""
        return self._ask(ModelList, lambda number: Models(id=number)).models

    def status(self) -> dict[str, Any]:
        """The state of the node; docs/protocol.md describes the tree."""
        return self._ask(NodeStatus, lambda number: Status(id=number)).status

    def close(self) -> None:
        """Closes the connection; what is in flight raises ConnectionLost, and is cancelled."""
        closed = ConnectionLost("the connection was closed by this client")
        if cancels := self._replies.close(closed):
            self._link.write(cancels)
        self._link.close()
        if threading.current_thread() is not self._reader:
            self._reader.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # The copy in a forked child is not to end the parent's connection.
        if self._process == os.getpid():
            self._replies.close(ConnectionLost("the connection was closed by this client"))
            self._link.close()

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._replies.closed is not None

    def request(self, make: Callable[[int], msgspec.Struct], handler: Handler) -> int:
        """Sends the message that `make` gives for an id, and returns the id.

        `handler` is called on the reader's thread with each reply, and must not raise.
        """
        request_id, pending = self._replies.prepare(make, handler, self.welcome.max_frame_bytes)
        try:
            self._link.ask(request_id, pending)
        except BaseException:
            self.abandon(request_id)
            raise
        return request_id

    def abandon(self, request_id: int) -> None:
        """Cancels a request whose replies nobody wants any more."""
        if self._replies.forget(request_id):
            self._link.write(frame(Cancel(id=request_id)))

    def _collect(
        self, make: Callable[[int], msgspec.Struct], timeout_s: float | None, n: int
    ) -> Completion:
        results: queue.SimpleQueue[Completion | AlbireoError] = queue.SimpleQueue()
        request_id = self.request(make, Collector(n, results.put))
        result: Completion | AlbireoError = self._wait(request_id, results, timeout_s)
        if isinstance(result, AlbireoError):
            raise result
        return result

    def _ask(self, kind: type[_Answer], make: Callable[[int], msgspec.Struct]) -> _Answer:
        replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        reply = self._wait(self.request(make, replies.put), replies, ANSWER_TIMEOUT_S)
        if isinstance(reply, kind):
            return reply
        raise as_error(reply)

    def _wait(
        self, request_id: int, results: queue.SimpleQueue[Any], timeout_s: float | None
    ) -> Any:
        try:
            return results.get(timeout=timeout_s)
        except queue.Empty:
            raise TimedOut(f"no answer within {timeout_s} s", retry=True) from None
        finally:
            # After a time-out, or an interrupt of the wait; after an answer it does nothing.
            self.abandon(request_id)
