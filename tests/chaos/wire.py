"""A way to the node that can be cut: a Unix socket in front of the node's own."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

_CHUNK = 1 << 16


class Wire:
    """`await Wire.open(path, node)`: who connects to `path` is connected to `node`, a socket."""

    def __init__(self, path: Path, node: Path) -> None:
        self.path = path
        self._node = node
        self._ends: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server

    @classmethod
    async def open(cls, path: Path, node: Path) -> Wire:
        wire = cls(path, node)
        wire._server = await asyncio.start_unix_server(wire._connect, str(path))
        return wire

    def cut(self) -> int:
        """Ends all connections, without a word and whatever is under way; how many there were."""
        count = len(self._ends) // 2
        for end in self._ends:
            end.transport.abort()
        return count

    def close(self) -> None:
        self._server.close()
        self.cut()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            node_reader, node_writer = await asyncio.open_unix_connection(str(self._node))
        except OSError:  # it is about to be there again
            writer.transport.abort()
            return
        ends = {writer, node_writer}
        self._ends |= ends
        try:
            await asyncio.gather(_pass(reader, node_writer), _pass(node_reader, writer))
        finally:
            self._ends -= ends


async def _pass(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """From one end to the other, until one of them is closed."""
    with contextlib.suppress(OSError):
        while data := await source.read(_CHUNK):
            sink.write(data)
            await sink.drain()
    sink.close()
