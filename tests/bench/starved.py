"""A played client of a busy machine."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from types import SimpleNamespace

from albireo.client import Delta, SamplingParams
from albireo.ipc.protocol import End


class Starved:
    """A client that gets all tokens of a stream at once, and then the next stream's, as one does
    that had no core meanwhile; after so many batches they come in turn."""

    welcome = SimpleNamespace(vocab_size=1000)

    def __init__(self, batch: int, starved: int) -> None:
        self.batches = 0
        self.collects = False
        self._batch, self._starved = batch, starved
        self._waiting: list[tuple[Callable[[Delta], None], int]] = []

    def submit(
        self, prompt: list[int], receive: Callable[[Delta], None], params: SamplingParams
    ) -> None:
        self._waiting.append((receive, params.max_tokens))
        if len(self._waiting) == self._batch:
            streams, self._waiting = self._waiting, []
            self.batches += 1
            asyncio.get_running_loop().call_soon(self._serve, streams)

    def _serve(self, streams: list[tuple[Callable[[Delta], None], int]]) -> None:
        self.collects |= gc.isenabled()
        turns = [[each] for each in streams] if self.batches <= self._starved else [streams]
        for together in turns:
            for count in range(together[0][1]):
                for receive, tokens in together:
                    end = End("length", None, 8, tokens) if count + 1 == tokens else None
                    receive(Delta(1, count, [5], "x", end))
