"""The gateway's connection to the router: one for all HTTP requests.

The client library makes it anew when it breaks.  When the router has died, what is
in flight goes on, with a journal; or what had no token yet, or is no stream, is asked
again, and streams that have begun end with an error event.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from typing import Any

import msgspec

from albireo.client import AsyncClient, ChatMessage, NodeNotRunning, Unavailable, Welcome
from albireo.ipc.params import SamplingParams
from albireo.ipc.protocol import Chat, Generate
from albireo.ipc.template import PLAIN, TemplateOptions
from albireo.ipc.tools import Tools
from albireo.live.watch import AsyncWatch

STATUS_AGE_S = 0.1
_STATUS_S = 2.0
_RETRY_S = 0.02
_CLIENT_NAME = "gateway"

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
    template: TemplateOptions = PLAIN

    def message(self, request_id: int) -> Generate | Chat:
        if self.messages is not None:
            return Chat(
                id=request_id, messages=self.messages, params=self.params, priority=self.priority,
                tenant=self.tenant, cache_salt=self.cache_salt, tools=self.tools,
                template=self.template,
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

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
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
                return cls(await AsyncClient.connect(path, client_name=_CLIENT_NAME))
            except NodeNotRunning:
                await asyncio.sleep(_RETRY_S)

    @property
    def welcome(self) -> Welcome:
        """What the node says of itself."""
        return self._client.welcome

    def submit(self, ask: Ask, on_reply: Callable[[Any], None]) -> Abandon:
        """Starts a request; `on_reply` is called with each Delta, or with an AlbireoError.

        Returns what ends it early; after that nothing is called.  Raises AlbireoError.
        """
        client = self._client
        number = client.request(ask.message, on_reply)
        return functools.partial(client.abandon, number)

    async def tokenize(
        self, text: str | list[ChatMessage], tenant: str, *, add_special_tokens: bool = True,
        template: TemplateOptions = PLAIN,
    ) -> list[int]:  # fmt: skip
        return await self._client.tokenize(
            text, add_special_tokens=add_special_tokens, tenant=tenant, template=template
        )

    async def detokenize(self, ids: list[int], tenant: str) -> str:
        """With special tokens in the text."""
        return await self._client.detokenize(ids, tenant=tenant)

    async def status(self) -> dict[str, Any]:
        """The status tree, at most STATUS_AGE_S old: probes need no key, and the router has
        better things to do.  Raises AlbireoError, Unavailable when there is no router."""
        async with self._asking_status:
            if time.monotonic() > self._status_until:
                try:
                    async with asyncio.timeout(_STATUS_S):
                        self._status = await self._client.status()
                except TimeoutError:
                    raise Unavailable(
                        "the node's router does not answer, and may just be started again",
                        retry=True,
                    ) from None
                self._status_until = time.monotonic() + STATUS_AGE_S
            return self._status

    async def close(self) -> None:
        await self._client.close()
