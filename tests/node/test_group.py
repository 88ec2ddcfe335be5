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
    """A process that is ready at once, or when it is told, and takes its time to die."""

    def __init__(self, spec: ActorSpec, fails: bool = False) -> None:
        self.loaded = asyncio.Event()
        self.loaded.set()
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
        await self.loaded.wait()

    async def silence(self, timeout_s: float) -> None:
        await asyncio.shield(self.exited)


def played_group(
    failures: int = 0,
    engine: EngineConfig = ENGINE,
    blocks: Callable[[int, int], int] | None = None,
    changed: Callable[[], None] = lambda: None,
    loads: str = "",
) -> Group:
    """failures: so many first lives end before it is ready.  blocks(incarnation, rank): those that
    a worker finds that it has memory for.  changed: called with each state.  loads: the process
    of that name is not ready before it is told."""

    async def start(spec: ActorSpec, fds: dict[str, int]) -> Any:
        played = Played(spec, group.incarnation < failures)
        if spec.name == loads:
            played.loaded.clear()
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
    group = Group(0, engine, 0, times, spec, start, changed, nothing)
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

    async def drained(timeout_s: float, group: int) -> None:
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


def test_a_process_that_dies_while_others_load_ends_the_start() -> None:
    """It has been ready, and nobody waits for it any more; but its peers may."""

    async def live() -> None:
        engine = msgspec.structs.replace(ENGINE, tp=2)
        group = played_group(engine=engine, loads="g0.worker1")
        task = asyncio.create_task(group.run())
        await until(lambda: len(group.actors) == 2)
        actors: list[Any] = list(group.actors)
        await asyncio.sleep(0.01)
        actors[0].end()
        await until(lambda: all(actor.killed for actor in actors))
        actors[1].end()
        await until(lambda: group.incarnation == 1)
        assert group.reason == "g0.worker0 was killed"
        task.cancel()

    asyncio.run(live())


def test_a_group_that_dies_while_it_is_to_stop_has_stopped() -> None:
    """It does not start again first, and get requests that it would give away at once."""
    states: list[str] = []

    async def live() -> None:
        group = played_group(changed=lambda: states.append(group.state))
        task = asyncio.create_task(group.run())
        await until(lambda: group.state == "ready")
        gone = asyncio.Event()

        async def drain(number: int, timeout_s: float) -> None:
            await gone.wait()

        operations = Operations([group], drain, lambda text: None)
        order = Order(action="drain", group=0, timeout_s=60.0)
        asked = asyncio.create_task(operations.carry_out(order, lambda answer: None))
        await until(lambda: group.state == "draining")
        actors: list[Any] = list(group.actors)
        actors[1].end()
        await until(lambda: all(actor.killed for actor in actors))
        for actor in actors:
            actor.end()
        await until(lambda: group.incarnation == 1)
        await asyncio.sleep(0.05)
        gone.set()
        await asyncio.wait_for(asked, WAIT_S)
        assert group.state == "stopped" and not group.actors
        started = asyncio.create_task(
            operations.carry_out(Order(action="start", group=0, timeout_s=0.0), lambda answer: None)
        )
        await asyncio.wait_for(started, WAIT_S)
        assert group.state == "ready" and group.incarnation == 1
        task.cancel()

    asyncio.run(live())
    assert states[states.index("draining") :].count("ready") == 1
