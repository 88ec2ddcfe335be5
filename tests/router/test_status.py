"""The status tree has the shape that docs/protocol.md promises."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from albireo.ipc.histogram import WHOLE_REQUEST_S
from albireo.ipc.messages import GroupStats, SchedulerStats
from albireo.ipc.stages import Stage
from albireo.ipc.timeline import DEVICE, DIRECTORY, Recorder
from albireo.router import stage_times
from albireo.router.stage_times import StageTimes
from albireo.trace.rows import NodeTimelines
from albireo.trace.stages import group_stages

from ..trace.synthetic import write_group
from .conftest import Neighbourhood

DOC = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()


def test_the_status_tree_is_the_one_in_the_doc(
    neighbourhood: Neighbourhood, runtime_dir: Path
) -> None:
    write_group(runtime_dir, 5)
    neighbourhood.start()
    neighbourhood.supervisor().topology("ready")
    group = neighbourhood.group()
    client = neighbourhood.client()
    group.send(GroupStats(0, SchedulerStats(0, 0, 0, 64, 0, 0, 0, 0, 0, 0.0, 0.0)))
    while True:
        client.send(type="status", id=1)
        status = client.receive()["status"]
        if status["actors"] and status["groups"][0]["scheduler"]:
            break
    assert outline(status) == [
        (len(line) - len(line.lstrip()), line.split()[0])
        for line in DOC.split("## The status tree")[1].split("```")[1].splitlines()
        if line.strip()
    ]


def test_gpus_and_queue_times_of_each_group(start: Callable[..., Neighbourhood]) -> None:
    near = start(num_groups=2, group_gpus=(("GPU-a", "GPU-b"), ("GPU-c",)))
    near.supervisor().topology("ready", "ready")
    groups = [near.group(number) for number in range(2)]
    counts = [0] * (len(WHOLE_REQUEST_S) + 1)
    counts[3] = 5
    stats = SchedulerStats(0, 0, 0, 64, 0, 0, 0, 0, 0, 0.0, 0.0)
    stats = msgspec.structs.replace(stats, queue_counts=counts, queue_sum_s=0.125)
    groups[1].send(GroupStats(1, stats))
    client = near.client()
    while True:
        client.send(type="status", id=1)
        found = client.receive()["status"]["groups"]
        if found[1]["scheduler"]:
            break
    assert [each["gpus"] for each in found] == [["GPU-a", "GPU-b"], ["GPU-c"]]
    queue = [each["latencies"]["request_queue_time_seconds"] for each in found]
    assert (sum(queue[0]["counts"]), queue[0]["sum"]) == (0, 0.0)
    assert (queue[1]["counts"], queue[1]["sum"]) == (counts, 0.125)
    assert queue[1]["bounds"] == list(WHOLE_REQUEST_S)


def test_stages_are_summed_up_only_after_new_steps(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summed: list[int] = []

    def counted(sources: Any, last: int) -> Any:
        sources = list(sources)
        summed.append(sources[0].group)
        return group_stages(sources, last)

    monkeypatch.setattr(stage_times, "group_stages", counted)
    monkeypatch.setattr(stage_times, "MAX_AGE_S", 0.0)

    async def trees() -> list[Any]:
        done = asyncio.get_running_loop().create_future()
        times.when_fresh(lambda: done.set_result(times.trees))
        return list(await asyncio.wait_for(done, 10))

    async def run() -> None:
        nonlocal times
        write_group(runtime_dir, 5)
        write_group(runtime_dir, 5, group=1)
        times = StageTimes(NodeTimelines(runtime_dir), 2)
        first = await trees()
        assert summed == [0, 1] and first[0]["steps"] == 4
        assert await trees() == first and summed == [0, 1]
        recorder_of(runtime_dir).record(Stage.FORWARD, 6, 6_020_000, 6_900_000)
        await trees()
        assert summed == [0, 1, 0]

    times: StageTimes
    asyncio.run(run())


def test_stages_are_there_again_after_there_was_no_room_for_a_thread(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def run() -> None:
        write_group(runtime_dir, 5)
        times = StageTimes(NodeTimelines(runtime_dir), 1)
        answered: list[Any] = []
        with monkeypatch.context() as short, pytest.raises(RuntimeError, match="new thread"):
            short.setattr(threading.Thread, "start", start)
            times.when_fresh(lambda: answered.append("at once"))
        done = asyncio.get_running_loop().create_future()
        times.when_fresh(lambda: done.set_result(times.trees))
        (tree,) = await asyncio.wait_for(done, 10)
        assert tree["steps"] == 4 and not answered

    asyncio.run(run())


def recorder_of(runtime_dir: Path) -> Recorder:
    """Writes on into the device's track of group 0."""
    with open(runtime_dir / DIRECTORY / "g0.worker0.0", "r+b") as file:
        return Recorder(file.fileno(), DEVICE)


def outline(tree: dict[str, Any], depth: int = 0) -> list[tuple[int, str]]:
    """Indentation and name of every key, in order; of a list, those of its first element."""
    found = []
    for name, value in tree.items():
        found.append((depth, name))
        inner = value[0] if isinstance(value, list) and value else value
        if isinstance(inner, dict):
            found += outline(inner, depth + 2)
    return found
