"""A server on a Unix socket that sends what a test tells it to, byte for byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from albireo.bench.serving.connection import Target

Script = Callable[[bytes], list[bytes | float]]
"""A request to what is written, and how long it waits, in seconds, in between."""


def event(**fields: object) -> bytes:
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"


def text(words: str, finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": words, "finish_reason": finish}])


def usage(prompt: int, new: int) -> bytes:
    return event(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": new})


DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def chunked(body: bytes, size: int = 1 << 20) -> bytes:
    """A whole answer with its body in chunks of at most `size` bytes."""
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"


def sized(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


class PlayedServer:
    """bodies: of the requests that came.  connections: made so far."""

    def __init__(self, script: Script) -> None:
        self.bodies: list[bytes] = []
        self.heads: list[bytes] = []
        self.connections = self.running = self.most_running = 0
        self.closes = False
        self._script = script

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                length = 0
                for line in head.split(b"\r\n"):
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                self.bodies.append(await reader.readexactly(length))
                self.running += 1
                self.most_running = max(self.most_running, self.running)
                for part in self._script(self.bodies[-1]):
                    if isinstance(part, float):
                        await asyncio.sleep(part)
                    else:
                        writer.write(part)
                        await writer.drain()
                self.running -= 1
                if self.closes:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def playing(path: Path, script: Script) -> AsyncIterator[tuple[PlayedServer, Target]]:
    played = PlayedServer(script)
    server = await asyncio.start_unix_server(played.serve, str(path))
    async with server:
        yield played, Target("localhost", 80, str(path))
