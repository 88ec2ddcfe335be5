"""A bounded run of the fuzzer, and a check that it sees what it looks for."""

from __future__ import annotations

import asyncio
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest

from albireo.router.router import Router
from albireo.router.session import Session

from .__main__ import in_process
from .router import RouterTarget


@pytest.mark.parametrize("seed", [1, 2])
def test_a_short_run_finds_nothing_and_reaches_everything(seed: int) -> None:
    _, counts = asyncio.run(in_process(12_000, 0.2, random.Random(seed)))
    assert {"deltas", "other answers", "closed by the router"} <= set(counts)
    assert {"error invalid_request", "error too_large", "error protocol"} <= set(counts)
    assert {"status 200", "status 400"} <= set(counts)


def run_router(messages: int) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory(prefix="alb") as home:
            target = RouterTarget(Path(home), random.Random(1))
            try:
                sent = 0
                while sent < messages:
                    sent += target.connection()
                    await asyncio.sleep(0)
            finally:
                target.close()

    asyncio.run(run())


def test_a_handler_that_fails_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Router, session: Session, message: Any) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(Router, "handle", broken)
    with pytest.raises(AssertionError, match="internal"):
        run_router(3000)


def test_what_a_client_leaves_behind_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Router, "closed", lambda self, session: None)
    with pytest.raises(AssertionError):
        run_router(3000)
