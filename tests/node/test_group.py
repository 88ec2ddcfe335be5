"""A group's keeper, with processes that are played: what is asked for at any moment happens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from albireo.ipc.actor import NUM_BLOCKS, SWAP_BLOCK_NS
from albireo.ipc.config import ActorSpec, EngineConfig
from albireo.node.children import StartError
from albireo.node.group import Group, GroupTimes
from albireo.node.operations import OperationError, Operations, Order

from ..specs import ENGINE, MODEL

WAIT_S = 5.0
SPEC = ActorSpec(
    role="", name="", node="", incarnation=0, runtime_dir="", threads=1, log_level="info",
    model=MODEL, engine=ENGINE,
)  # fmt: skip


class Played:
    """A process that is ready at once, and takes its time to die."""

    def __init__(self, spec: ActorSpec, fails: bool = False) -> None:
        self.spec = spec
        self.name = spec.name
        self.detail: dict[str, Any] = {}
        self._fails = fails
        self.exited: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.killed = self.blames = False
        self.last_words: str | None = None

    @property
    def alive(self) -> bool:
        return not self.exited.done()

    def kill(self) -> None:
        self.killed = True
        if self._fails:
            self.end()

    def end(self) -> None:
        if self.alive:
            self.exited.set_result(f"{self.name} was killed")

    def epitaph(self) -> str:
        return self.exited.result()

    async def wait_ready(self, timeout_s: float) -> None:
        if self._fails:
            raise StartError("not today")

    async def silence(self, timeout_s: float) -> None:
        await asyncio.shield(self.exited)


def played_group(
    failures: int = 0,
    engine: EngineConfig = ENGINE,
    blocks: Callable[[int, int], int] | None = None,
) -> Group:
    """failures: so many first lives end before it is ready.  blocks(incarnation, rank): those that
    a worker finds that it has memory for."""

    async def start(spec: ActorSpec, fds: dict[str, int]) -> Any:
        played = Played(spec, group.incarnation < failures)
        if blocks and spec.role == "worker":
            played.detail[NUM_BLOCKS] = blocks(spec.incarnation, spec.rank)
            played.detail[SWAP_BLOCK_NS] = 100 + spec.rank
        return played

    def spec(role: str, name: str, incarnation: int, group: int, rank: int) -> ActorSpec:
        return msgspec.structs.replace(
            SPEC, role=role, name=name, incarnation=incarnation, rank=rank
        )

    def nothing(*_: Any) -> None:
        pass

    times = GroupTimes(12, WAIT_S, WAIT_S)
    group = Group(0, engine, 0, times, spec, start, nothing, nothing)
    return group


async def until(true: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < WAIT_S
        await asyncio.sleep(0.001)


async def begin_to_die(group: Group) -> list[Any]:
    """One process has died, and the others are about to; returns them all."""
    await until(lambda: group.state == "ready" and bool(group.actors))
    actors: list[Any] = group.actors
    actors[0].end()
    await until(lambda: all(actor.killed for actor in actors))
    return actors


def test_a_start_that_somebody_waits_for_has_no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it fails again; and where the group is given up, whoever waits is told."""
    monkeypatch.setattr("albireo.node.group._FIRST_DELAY_S", 600.0)
    monkeypatch.setattr("albireo.node.group._MAX_DELAY_S", 600.0)

    async def drained(group: int, timeout_s: float) -> None:
        raise AssertionError(f"nobody asked to drain group {group}")

    async def start_order(group: Group) -> None:
        order = Order(action="start", group=0, timeout_s=0.0)
        operations = Operations([group], drained, lambda text: None)
        await asyncio.wait_for(operations.carry_out(order, lambda answer: None), WAIT_S)

    async def live(failures: int) -> Group:
        group = played_group(failures)
        task = asyncio.create_task(group.run())
        await until(lambda: group.incarnation == 2)  # after the second failure it waits
        try:
            await start_order(group)
        finally:
            task.cancel()
        return group

    assert asyncio.run(live(6)).incarnation == 6
    with pytest.raises(OperationError, match="has failed: not today"):
        asyncio.run(live(100))


@pytest.mark.parametrize(
    ("ask", "state"),
    [(lambda group: group.leave(False), "stopped"), (lambda group: group.start(), "ready")],
    ids=["leave", "start"],
)
@pytest.mark.parametrize("when", ["while it dies", "while it waits"])
def test_what_is_asked_of_a_group_that_keeps_dying_does_not_wait_for_its_next_try(
    monkeypatch: pytest.MonkeyPatch, when: str, ask: Callable[[Group], None], state: str
) -> None:
    monkeypatch.setattr("albireo.node.group._FIRST_DELAY_S", 600.0)
    monkeypatch.setattr("albireo.node.group._MAX_DELAY_S", 600.0)

    async def live() -> None:
        group = played_group()
        task = asyncio.create_task(group.run())
        for incarnation in (0, 1):  # after the second death it waits
            actors = await begin_to_die(group)
            assert group.incarnation == incarnation
            if incarnation == 1 and when == "while it dies":
                ask(group)
            for actor in actors:
                actor.end()
            await until(lambda seen=incarnation: group.incarnation > seen)
        if when == "while it waits":
            await asyncio.sleep(0.01)
            assert group.state == "restarting"
            ask(group)
        await until(lambda: group.state == state)
        task.cancel()

    asyncio.run(live())


def test_the_others_know_as_many_blocks_as_each_worker_has_room_for() -> None:
    """In every life what is found then; workers are told what was planned."""
    engine = msgspec.structs.replace(ENGINE, tp=2, num_blocks=100)
    known: list[int] = []

    def blocks(incarnation: int, rank: int) -> int:
        """A worker of the first life, then of the second, starts: until it is ready nobody knows
        better than by the life before."""
        known.append(group.engine.num_blocks)
        return (60, 70, 50, 90)[2 * incarnation + rank]

    async def live() -> None:
        nonlocal group
        group = played_group(0, engine, blocks)
        task = asyncio.create_task(group.run())
        for incarnation, found in enumerate((60, 50)):
            await until(lambda: group.state == "ready")
            told = {actor.name: actor.spec.engine.num_blocks for actor in group.actors}
            assert told == {
                "g0.worker0": 100, "g0.worker1": 100,
                "g0.detokenizer": found, "g0.scheduler": found,
            }  # fmt: skip
            if incarnation == 0:
                for actor in await begin_to_die(group):
                    actor.end()
                await until(lambda: group.incarnation == 1)
        task.cancel()

    group: Group
    asyncio.run(live())
    assert known == [100, 100, 60, 60]
    assert group.engine.swap_block_ns == 100, "as the first rank found"
