"""Requests, each of which must have the tokens of an undisturbed run."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from albireo.client import AlbireoError, AsyncClient
from albireo.ipc.paths import api_socket

from .wire import Wire

SHORT, LONG = 8, 60
"""Tokens of a prompt."""
TOKENS = 6
"""Of an answer."""


@dataclass(frozen=True)
class Story:
    """A request and the answer that it has when nothing happens."""

    prompt: Any
    params: dict[str, Any]
    kind: str
    tokens: tuple[int, ...] = ()
    text: str = ""


@dataclass
class Life:
    """One request: what has come of it, and when (time.monotonic()).

    ends: it must be one.  lost: it ended with an error.
    """

    story: Story
    number: int
    http: bool
    began: float = field(default_factory=time.monotonic)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    times: list[float] = field(default_factory=list)
    ends: int = 0
    over: float | None = None
    lost: str | None = None
    wrong: str | None = None


def stories(rng: random.Random, count: int) -> dict[str, list[Story]]:
    """So many of each kind, "short" and "long" prompts of token ids, and "text"; greedy and
    sampled ones, with penalties."""
    made: dict[str, list[Story]] = {"short": [], "long": [], "text": []}
    for kind, number in ((kind, number) for kind in made for number in range(count)):
        length = LONG if kind == "long" else SHORT
        prompt: Any = [rng.randrange(300, 20_000) for _ in range(length)]
        if kind == "text":
            prompt = "Once upon a time there was " + " ".join(map(str, prompt[:3]))
        params: dict[str, Any] = {"max_tokens": TOKENS, "seed": number, "ignore_eos": True}
        if number % 2:
            params |= {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.1}
        made[kind].append(Story(prompt, params, kind))
    return made


async def undisturbed(node: str, story: Story) -> Story:
    """The story with its answer."""
    async with await AsyncClient.connect(node=node) as client:
        answer = await client.generate(story.prompt, **story.params)
    return Story(story.prompt, story.params, story.kind, tuple(answer.token_ids), answer.text)


class Load:
    """Clients by number: each asks one request at a time, over HTTP or a socket of its own, which
    is a wire that can be cut.

    give_up_s: a request without an end for so long has none.
    """

    def __init__(self, node: str, http: tuple[str, int], wires: Path, give_up_s: float) -> None:
        self._node = node
        self._http = http
        self._directory = wires
        self.give_up_s = give_up_s
        self._wires: dict[int, Wire] = {}
        self._clients: dict[int, AsyncClient] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.finished: list[Life] = []

    def ask(self, number: int, story: Story, http: bool) -> Life:
        """Begins a request."""
        life = Life(story, number, http)
        task = asyncio.create_task(self._live(life))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return life

    async def settle(self) -> None:
        """Waits for the ends of all requests in flight."""
        await asyncio.gather(*self._tasks)

    def cut(self, number: int) -> bool:
        """Cuts a client's connection; whether it had one.  It connects again."""
        wire = self._wires.get(number)
        return wire is not None and wire.cut() > 0

    async def close(self) -> None:
        await self.settle()
        for client in self._clients.values():
            await client.close()
        for wire in self._wires.values():
            wire.close()

    async def _live(self, life: Life) -> None:
        try:
            async with asyncio.timeout(self.give_up_s):
                await (self._ask_http(life) if life.http else self._ask(life))
        except TimeoutError:
            life.wrong = f"no end within {self.give_up_s:g} s"
        except (AlbireoError, OSError, EOFError, asyncio.IncompleteReadError) as error:
            life.lost = f"{type(error).__name__}: {error}"
        life.over = time.monotonic()
        if (life.lost or life.wrong) and (client := self._clients.pop(life.number, None)):
            with contextlib.suppress(AlbireoError):
                await client.close()
        self.finished.append(life)

    async def _ask(self, life: Life) -> None:
        client = await self._client(life.number)
        async for delta in client.stream(life.story.prompt, **life.story.params):
            if delta.index != len(life.tokens):
                life.wrong = f"index {delta.index} after {len(life.tokens)} tokens"
            life.tokens += delta.token_ids
            life.text += delta.text
            life.times += [time.monotonic()] * len(delta.token_ids)
            life.ends += delta.end is not None

    async def _client(self, number: int) -> AsyncClient:
        if number not in self._wires:
            path = self._directory / f"{number}.sock"
            self._wires[number] = await Wire.open(path, Path(api_socket(self._node)))
        if number not in self._clients:
            path = self._wires[number].path
            self._clients[number] = await AsyncClient.connect(str(path))
        return self._clients[number]

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
