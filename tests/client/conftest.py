"""A node for the client library: the real router, with everything behind it played."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..router.fakes import Automatic, RouterThread, make_spec


class PlayedNode:
    """A router with two groups and a tokenizer as Automatic plays them."""

    def __init__(self, runtime_dir: Path) -> None:
        self.router = RouterThread(make_spec(runtime_dir, num_groups=2, max_num_queued_reqs=16))
        self.path = self.router.path
        self.automatic = Automatic(self.router.spec)
        self._running = True

    def stop(self) -> None:
        if self._running:
            self._running = False
            self.automatic.stop()
            self.router.stop()


@pytest.fixture
def node() -> Iterator[PlayedNode]:
    with tempfile.TemporaryDirectory(prefix="alb") as path:
        node = PlayedNode(Path(path))
        yield node
        node.stop()
