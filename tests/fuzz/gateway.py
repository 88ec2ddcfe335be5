"""The gateway's application before a node that answers at once: no body has a status of 500."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from albireo.client import Delta, End
from albireo.gateway.app import make_app
from albireo.gateway.link import Ask
from albireo.ipc.keys import ApiKeys

from ..gateway.played import PlayedLink, row
from .mutate import http_bodies

_ANSWERS = (200, 400, 404)
_HEADERS = [(b"content-type", b"application/json")]


class _Link(PlayedLink):
    """Every choice has one token, at once."""

    def submit(self, ask: Ask, on_reply: Callable[[Any], None]) -> Callable[[], None]:
        params = ask.params
        rows = None if params.logprobs is None else [row("x", "y")]
        scored = None if params.prompt_logprobs is None else [row("p", "q")]
        for choice in range(params.n):
            end = End("length", None, 1, 1)
            on_reply(Delta(1, 0, [120], "x", end, choice, rows, None if choice else scored))
        return lambda: None

    async def tokenize(
        self, text: Any, tenant: str, *, add_special_tokens: bool = True, template: Any = None
    ) -> list[int]:
        return [1] * len(text)

    async def detokenize(self, ids: list[int], tenant: str) -> str:
        return "x" * len(ids)


class _Logged(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


class GatewayTarget:
    """counts: of statuses."""

    def __init__(self, rng: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self._app = make_app(_Link(), ApiKeys(), ())  # type: ignore[arg-type]
        self._bodies = http_bodies(rng)
        self._rng = rng
        self._logged = _Logged()
        logging.getLogger("albireo.gateway").addHandler(self._logged)

    def close(self) -> None:
        logging.getLogger("albireo.gateway").removeHandler(self._logged)

    async def request(self) -> None:
        """One POST.  Raises AssertionError for what must not be."""
        path, body = next(self._bodies)
        place = self._rng.randrange(len(body) + 1)
        pieces = [body[place:], body[:place]] if self._rng.getrandbits(3) == 0 else [body]
        status = 0

        async def receive() -> dict[str, Any]:
            if pieces:
                return {"type": "http.request", "body": pieces.pop(), "more_body": bool(pieces)}
            return {"type": "http.disconnect"} if self._rng.getrandbits(6) == 0 else await _never()

        async def send(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                assert not status, "two answers"
                status = message["status"]

        scope = {"type": "http", "method": "POST", "path": path, "headers": _HEADERS}
        await self._app(scope, receive, send)
        assert not self._logged.texts, (path, body, self._logged.texts)
        assert status in _ANSWERS or status == 0, (status, path, body)
        self.counts[f"status {status}" if status else "client gone"] += 1


async def _never() -> Any:
    await asyncio.get_running_loop().create_future()
