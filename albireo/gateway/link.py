"""The gateway's connection to the router: one for all HTTP requests, made anew when it is lost.

What is in flight when the router dies ends with an error (503, or an error
event in a stream); the next request finds the new router.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec

from albireo.client import (
    AlbireoError,
    AsyncClient,
    ChatMessage,
    ConnectionLost,
    NodeNotRunning,
    Unavailable,
    Welcome,
)
from albireo.ipc.params import SamplingParams
from albireo.ipc.protocol import Chat, Generate
from albireo.ipc.tools import Tools
from albireo.live.watch import AsyncWatch

STATUS_AGE_S = 0.1
_RECONNECT_S = 2.0
_RETRY_S = 0.02
_CLIENT_NAME = "gateway"

_T = TypeVar("_T")
Abandon = Callable[[], None]


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A request for tokens: a text, token ids, or a conversation."""

    prompt: str | list[int] | None = None
    messages: list[ChatMessage] | None = None
    params: SamplingParams
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    tools: Tools | None = None

    def message(self, request_id: int) -> Generate | Chat:
        if self.messages is not None:
            return Chat(
                id=request_id, messages=self.messages, params=self.params, priority=self.priority,
                tenant=self.tenant, cache_salt=self.cache_salt, tools=self.tools,
            )  # fmt: skip
        text = isinstance(self.prompt, str)
        return Generate(
            id=request_id,
            prompt=self.prompt if text else None,  # type: ignore[arg-type]
            prompt_ids=None if text else self.prompt,  # type: ignore[arg-type]
            params=self.params,
            priority=self.priority,
            tenant=self.tenant,
            cache_salt=self.cache_salt,
        )


class NodeLink:
    """Make one with `await NodeLink.connect(path)`."""

    def __init__(self, path: str, client: AsyncClient) -> None:
        self._path = path
        self._client = client
        self._mending = asyncio.Lock()
        self._asking_status = asyncio.Lock()
        self._status: dict[str, Any] = {}
        self._status_until = 0.0
        self.watch = AsyncWatch(self.status)
        """What there is to see of the node, for whoever looks."""

    @classmethod
    async def connect(cls, path: str) -> NodeLink:
        """Waits for the router, however long it takes to start."""
        while True:
            try:
                return cls(path, await AsyncClient.connect(path, client_name=_CLIENT_NAME))
            except NodeNotRunning:
                await asyncio.sleep(_RETRY_S)

    @property
    def welcome(self) -> Welcome:
        """What the node says of itself."""
        return self._client.welcome

    async def submit(self, ask: Ask, on_reply: Callable[[Any], None]) -> Abandon:
        """Starts a request; `on_reply` is called with each Delta, or with an AlbireoError.

        Returns what ends it early; after that nothing is called.  Raises AlbireoError.
        """
        try:
            return self._begin(ask, on_reply)
        except ConnectionLost:
            await self._mend(self._client)
            return self._begin(ask, on_reply)

    async def tokenize(
        self, text: str | list[ChatMessage], *, add_special_tokens: bool = True
    ) -> list[int]:
        return await self._call(
            lambda client: client.tokenize(text, add_special_tokens=add_special_tokens)
        )

    async def detokenize(self, ids: list[int]) -> str:
        """With special tokens in the text."""
        return await self._call(lambda client: client.detokenize(ids))

    async def status(self) -> dict[str, Any]:
        """The status tree, at most STATUS_AGE_S old: probes need no key, and the router has
        better things to do."""
        async with self._asking_status:
            if time.monotonic() > self._status_until:
                self._status = await self._call(lambda client: client.status())
                self._status_until = time.monotonic() + STATUS_AGE_S
            return self._status

    async def close(self) -> None:
        await self._client.close()

    def _begin(self, ask: Ask, on_reply: Callable[[Any], None]) -> Abandon:
        client = self._client
        number = client.request(ask.message, on_reply)
        return functools.partial(client.abandon, number)

    async def _call(self, method: Callable[[AsyncClient], Awaitable[_T]]) -> _T:
        """These can be asked twice: a router that dies in between is not noticed."""
        client = self._client
        try:
            return await method(client)
        except ConnectionLost:
            await self._mend(client)
            return await method(self._client)

    async def _mend(self, broken: AsyncClient) -> None:
        """Connects again, once for all who have noticed.  Raises Unavailable."""
        async with self._mending:
            if self._client is not broken:
                return
            deadline = time.monotonic() + _RECONNECT_S
            while True:
                try:
                    self._client = await AsyncClient.connect(self._path, client_name=_CLIENT_NAME)
                    return
                except AlbireoError as error:
                    if time.monotonic() > deadline:
                        raise Unavailable(
                            f"the node's router does not answer, and is started again: {error}",
                            retry=True,
                        ) from None
                await asyncio.sleep(_RETRY_S)
