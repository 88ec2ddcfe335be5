"""The keeper of a router, tokenizer or gateway, with processes that are played."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from albireo.node import single
from albireo.node.group import doubled
from albireo.node.single import Single

from .test_group import Played


def lives(monkeypatch: pytest.MonkeyPatch, lasting_s: list[float]) -> list[float]:
    """Before each life of processes that last so long: for how long there was none, in seconds."""
    now = 0.0
    paused: list[float] = []

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        paused[-1] += seconds

    async def start(spec: Any, fds: dict[str, int]) -> Any:
        return Played(spec)

    def changed() -> None:
        """It is ready: it lives for its time."""
        nonlocal now
        assert keeper.actor is not None
        now += lasting_s[len(paused) - 1]
        keeper.actor.end()  # type: ignore[attr-defined]

    def died(keeper: Single, incarnation: int, why: str) -> None:
        assert incarnation == len(paused) - 1 and why == "router was killed"
        paused.append(0.0)
        if len(paused) > len(lasting_s):
            raise asyncio.CancelledError

    async def run() -> None:
        paused.append(0.0)
        with pytest.raises(asyncio.CancelledError):
            await keeper.run()

    def spec(role: str, name: str, incarnation: int) -> Any:
        return SimpleNamespace(name=name)

    monkeypatch.setattr(single, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(single.asyncio, "sleep", sleep)
    keeper = Single("router", "router", {}, 5.0, 5.0, spec, start, changed, died)
    asyncio.run(run())
    return paused[:-1]


def test_one_that_keeps_dying_waits_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lives(monkeypatch, [1.0] * 11) == [
        0.0, 0.0, 0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0,
    ]  # fmt: skip


def test_a_wait_that_has_doubled_for_days() -> None:
    assert [doubled(0.5, times, 30.0) for times in (0, 1, 5, 6, 5000)] == [0.5, 1, 16, 30, 30]


def test_deaths_that_are_far_apart_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lives(monkeypatch, [11.0] * 6) == [0.0] * 6
    assert lives(monkeypatch, [1.0, 1.0, 1.0, 11.0, 1.0, 1.0, 1.0]) == [
        0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.1,
    ]  # fmt: skip
