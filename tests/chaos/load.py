"""Requests without end, each of which must have the tokens of an undisturbed run."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec

from albireo.client import AlbireoError, AsyncClient

_SHORT, _LONG = 8, 300
_RECONNECT_S = 0.05
_GIVE_UP_S = 120.0


@dataclass(frozen=True)
class Story:
    """A request and the answer that it has when nothing happens."""

    prompt: Any
    params: dict[str, Any]
    long: bool
    tokens: tuple[int, ...] = ()
    text: str = ""


@dataclass
class Life:
    """One request: what has come of it, and when (time.monotonic()).

    ends: it must be one.  lost: it ended with its connection.
    """

    story: Story
    http: bool
    began: float = field(default_factory=time.monotonic)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    times: list[float] = field(default_factory=list)
    ends: int = 0
    over: float | None = None
    lost: str | None = None
    wrong: str | None = None

    @property
    def phase(self) -> str | None:
        """As in plan.PHASES; None when it is over, or between two of them."""
        if self.over is not None or self.ends:
            return None
        if not self.times:
            return "prefill" if self.story.long else "queued"
        if len(self.times) == self.story.params["max_tokens"] - 1:
            return "ending"
        return "stream"


def stories(rng: random.Random, count: int) -> list[Story]:
    """Long and short prompts, greedy and sampled, with penalties and stop strings."""
    made = []
    for number in range(count):
        long = number % 3 == 2
        length = _LONG if long else _SHORT
        prompt: Any = [rng.randrange(300, 20_000) for _ in range(length)]
        if number % 5 == 4:
            prompt = "Once upon a time there was " + " ".join(map(str, prompt[:3]))
            long = False
        params: dict[str, Any] = {"max_tokens": 14, "seed": number, "ignore_eos": True}
        if number % 2:
            params |= {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.1}
        made.append(Story(prompt, params, long))
    return made


async def undisturbed(node: str, story: Story) -> Story:
    """The story with its answer."""
    async with await AsyncClient.connect(node=node) as client:
        answer = await client.generate(story.prompt, **story.params)
    return Story(story.prompt, story.params, story.long, tuple(answer.token_ids), answer.text)


class Load:
    """Workers that ask one request after the other, over the socket or HTTP (every fourth)."""

    def __init__(self, node: str, http: tuple[str, int], known: list[Story], workers: int) -> None:
        self._node = node
        self._http = http
        self._next = itertools.cycle(known)
        self._over = False
        self.lives: list[Life] = []
        self.finished: list[Life] = []
        self._clients: dict[int, AsyncClient] = {}
        self._tasks = [
            asyncio.create_task(self._work(number, number % 4 == 3)) for number in range(workers)
        ]

    async def finish(self) -> None:
        """No new requests; waits for the ends of those in flight."""
        self._over = True
        await asyncio.gather(*self._tasks)

    def disconnect(self, phase: str) -> bool:
        """Breaks the connection of a request in that phase, without a word.

        Its client connects again: a request without a token goes on, a stream ends.
        """
        for number, life in enumerate(self.lives):
            client = self._clients.get(number)
            wire = None if client is None else client._link._wire
            if life.phase == phase and wire is not None:
                wire.abort()
                return True
        return False

    async def _work(self, number: int, http: bool) -> None:
        while len(self.lives) <= number:
            self.lives.append(Life(next(self._next), http))
        while not self._over:
            life = self.lives[number] = Life(next(self._next), http)
            try:
                async with asyncio.timeout(_GIVE_UP_S):
                    await (self._ask_http(life) if http else self._ask(number, life))
            except TimeoutError:
                life.wrong = f"no end within {_GIVE_UP_S:g} s"
            except (AlbireoError, OSError, EOFError, asyncio.IncompleteReadError) as error:
                life.lost = life.lost or f"{type(error).__name__}: {error}"
                if (client := self._clients.pop(number, None)) is not None:
                    await client.close()
                await asyncio.sleep(_RECONNECT_S)
            life.over = time.monotonic()
            self.finished.append(life)

    async def _ask(self, number: int, life: Life) -> None:
        client = self._clients.get(number)
        if client is None:
            client = self._clients[number] = await AsyncClient.connect(node=self._node)
        async for delta in client.stream(life.story.prompt, **life.story.params):
            if delta.index != len(life.tokens):
                life.wrong = f"index {delta.index} after {len(life.tokens)} tokens"
            life.tokens += delta.token_ids
            life.text += delta.text
            life.times += [time.monotonic()] * len(delta.token_ids)
            life.ends += delta.end is not None

    async def _ask_http(self, life: Life) -> None:
        """One request on a connection of its own; its tokens are not told, their text is."""
        reader, writer = await asyncio.open_connection(*self._http)
        try:
            body = msgspec.json.encode(
                {"model": "m", "prompt": life.story.prompt, "stream": True, **life.story.params}
            )
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            status = await reader.readline()
            if b" 200 " not in status:
                raise EOFError(status.decode(errors="replace") + (await reader.read()).decode())
            while not (line := await reader.readline()).startswith(b"data: [DONE]"):
                if not line:
                    raise EOFError("the stream ended without [DONE]")
                if line.startswith(b"data: "):
                    self._take_event(life, msgspec.json.decode(line[6:]))
        finally:
            writer.close()

    @staticmethod
    def _take_event(life: Life, event: dict[str, Any]) -> None:
        if "error" in event:
            raise EOFError(str(event["error"]))
        for choice in event["choices"]:
            life.text += choice["text"]
            life.times.append(time.monotonic())
            life.ends += choice["finish_reason"] is not None
