"""A running router, its fakes, and clients that are closed again."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .fakes import (
    FakeGroup,
    FakeSpoke,
    FakeSupervisor,
    FakeTokenizer,
    RawClient,
    RouterThread,
    make_spec,
)


class Neighbourhood:
    """Starts the router and whatever the test wants around it; ends all of it."""

    def __init__(self, runtime_dir: Path, stack: contextlib.ExitStack) -> None:
        self._runtime_dir = runtime_dir
        self._stack = stack
        self.router: RouterThread

    def start(self, **changes: Any) -> RouterThread:
        self.router = RouterThread(make_spec(self._runtime_dir, **changes))
        self._stack.callback(self.router.stop)
        return self.router

    def group(self, number: int = 0, incarnation: int = 0, join: bool = True) -> FakeGroup:
        return self._add(FakeGroup(self.router.spec, number, incarnation), join)

    def tokenizer(self, incarnation: int = 0, join: bool = True) -> FakeTokenizer:
        return self._add(FakeTokenizer(self.router.spec, incarnation), join)

    def supervisor(self) -> FakeSupervisor:
        return self._add(FakeSupervisor(self.router.spec), True)

    def client(self, hello: bool = True) -> RawClient:
        client = RawClient(self.router, hello)
        self._stack.callback(client.close)
        return client

    def _add(self, spoke: Any, join: bool) -> Any:
        assert isinstance(spoke, FakeSpoke)
        self._stack.callback(spoke.close)
        if join:
            spoke.join()
        return spoke


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """A directory whose socket paths are short enough."""
    with tempfile.TemporaryDirectory(prefix="alb") as path:
        yield Path(path)


@pytest.fixture
def neighbourhood(runtime_dir: Path) -> Iterator[Neighbourhood]:
    with contextlib.ExitStack() as stack:
        yield Neighbourhood(runtime_dir, stack)


@pytest.fixture
def start(neighbourhood: Neighbourhood) -> Callable[..., Neighbourhood]:
    """start(**changes of the spec): a neighbourhood with a running router."""

    def start_one(**changes: Any) -> Neighbourhood:
        neighbourhood.start(**changes)
        return neighbourhood

    return start_one
