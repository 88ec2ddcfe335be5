"""Requests that are to finish: what the router is asked, and which of its answers counts."""

from __future__ import annotations

import asyncio
import time

from albireo.ipc.messages import Drain, Drained
from albireo.node.drains import Drains


def test_the_answer_to_its_own_number_ends_a_drain() -> None:
    """One that comes late, when the time of its drain was over, does not end the group's next."""
    asked: list[Drain] = []
    drains = Drains(asked.append)

    async def story() -> None:
        first = asyncio.create_task(drains.finished(30.0, 0))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        second = asyncio.create_task(drains.finished(30.0, 0))
        node = asyncio.create_task(drains.finished(20.0))
        await asyncio.sleep(0)
        assert [(each.timeout_s, each.group) for each in asked] == [
            (30.0, 0),
            (30.0, 0),
            (20.0, -1),
        ]
        drains.answered(Drained(0, asked[0].number))
        await asyncio.sleep(0.01)
        assert not second.done() and not node.done()
        drains.answered(Drained(0, asked[1].number))
        await asyncio.wait_for(second, 10)
        assert not node.done()
        drains.answered(Drained(3, asked[2].number))
        await asyncio.wait_for(node, 10)

    asyncio.run(story())


def test_without_an_answer_it_ends_with_its_time_and_the_grace() -> None:
    drains = Drains(lambda drain: None)
    began = time.monotonic()
    asyncio.run(drains.finished(0.1, 1))
    assert 1.0 < time.monotonic() - began < 10


def test_a_new_router_is_asked_for_what_is_left_of_the_time() -> None:
    asked: list[Drain] = []
    drains = Drains(asked.append)

    async def story() -> None:
        drain = asyncio.create_task(drains.finished(30.0, 1))
        await asyncio.sleep(0.05)
        drains.ask_again()
        first, again = asked
        assert (again.group, again.number) == (1, first.number)
        assert 0 < again.timeout_s < 29.96
        drains.answered(Drained(0, again.number))
        await asyncio.wait_for(drain, 10)
        drains.ask_again()
        assert len(asked) == 2

    asyncio.run(story())
