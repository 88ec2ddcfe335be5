"""Who asks the router, how often, and what happens when it is not there."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from albireo.client import AlbireoError
from albireo.live.history import Sample
from albireo.live.watch import AsyncWatch

from .trees import group, tree


def test_many_who_look_ask_once() -> None:
    asked = 0

    async def status() -> dict[str, Any]:
        nonlocal asked
        asked += 1
        return tree(group(tokens=10 * asked), uptime_s=float(asked), actors=[])

    async def look() -> None:
        watch = AsyncWatch(status)
        first = await asyncio.gather(*(watch.see() for _ in range(20)))
        assert asked == 2, "the first look takes two samples, for rates"
        assert all(each.rates.tokens_per_s and each.rates.tokens_per_s > 0 for each in first)
        assert isinstance(await watch.sample(), Sample) and asked == 2
        await watch.sample(0.0)
        assert asked == 3

    asyncio.run(look())


def test_a_failure_goes_to_whoever_looks_and_the_next_look_asks_again() -> None:
    answers: list[Any] = [AlbireoError("no router"), tree(group(), actors=[])]

    async def status() -> dict[str, Any]:
        found = answers.pop(0)
        if isinstance(found, AlbireoError):
            raise found
        return dict(found)

    async def look() -> None:
        watch = AsyncWatch(status)
        with pytest.raises(AlbireoError, match="no router"):
            await watch.sample()
        assert (await watch.sample()).tree["node"] == "n"

    asyncio.run(look())
