"""A node for the client library: the real router, with everything behind it played."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from albireo.client import Client

from ..router.fakes import Automatic, RouterThread, make_spec


def all_ready(client: Client) -> bool:
    """Until then, fewer requests are taken."""
    return all(group["state"] == "ready" for group in client.status()["groups"])


class PlayedNode:
    """A router with two groups and a tokenizer as Automatic plays them."""

    def __init__(self, runtime_dir: Path) -> None:
        self.router = RouterThread(make_spec(runtime_dir, num_groups=2, max_num_queued_reqs=16))
        self.path = self.router.path
        self.automatic = Automatic(self.router.spec)
        self._running = True
        with Client.connect(self.path) as client:
            eventually(lambda: all_ready(client))

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


class Node:
    """A router with its groups and tokenizer, which can die and come back."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._incarnation = -1
        self.journal = True
        self.path = str(home / "api.sock")
        self.start()

    def start(self) -> None:
        self._incarnation += 1
        journal: dict[str, Any] = {
            "resume_s": 10.0, "journal": str(self._home / "journal"), "journal_bytes": 1 << 26
        }  # fmt: skip
        self.router = RouterThread(
            make_spec(
                self._home, num_groups=2, max_num_seqs=512, incarnation=self._incarnation,
                **journal if self.journal else {},
            )
        )  # fmt: skip
        self.automatic = Automatic(self.router.spec)

    def die(self) -> None:
        self.router.die()
        self.automatic.stop()

    def restart(self) -> None:
        self.die()
        self.start()


@pytest.fixture
def mortal() -> Iterator[Node]:
    with tempfile.TemporaryDirectory(prefix="alb") as path:
        node = Node(Path(path))
        yield node
        node.die()


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
