"""A small storm, a short soak, and a check that growth is seen where there is some."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace

import psutil
import pytest

from . import soak as soak_module
from . import storm as storm_module
from .node import running
from .soak import soak
from .storm import storm
from .watch import Series, Watch, slope


@pytest.mark.node
def test_of_a_small_storm_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storm_module, "_SPREAD_S", 0.5)
    monkeypatch.setattr(storm_module, "MOST_BYTES", 1 << 40)  # so few clients say nothing of it
    assert storm(clients=100, rounds=1, warm_up=1, seed=3) == []
    said = capsys.readouterr().out
    for way in ("http", "socket", "tls"):
        assert f"{way}: had its answer" in said and f"{way}: vanished while tokens came" in said


@pytest.mark.node
def test_in_a_short_soak_every_request_ends_as_it_should(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(soak_module, "_SAMPLE_S", 1.0)
    monkeypatch.setattr(soak_module, "_CLIENT_LIVES", 4)
    monkeypatch.setattr(soak_module, "MOST_BYTES", 1 << 40)  # so short a time says nothing of them
    monkeypatch.setattr(soak_module, "MOST_FDS", 1 << 10)
    with running("soak", sim_step_ms=5.0) as node:
        assert asyncio.run(soak(node, seconds=5, rate=40, seed=4)) == []
    said = capsys.readouterr().out
    for kind in ("cancel", "chat", "http leaves", "refused", "stream", "tokenize"):
        assert f"  {kind:40} " in said


def watched(uss: list[int], fds: list[int]) -> Watch:
    watch = Watch({})
    times = [float(number) for number in range(len(uss))]
    watch.series["router"] = Series(1, times, uss, fds)
    return watch


def test_growth_is_seen_through_noise_and_steps_are_not_growth() -> None:
    rng = random.Random(1)
    noise = [rng.randrange(500_000) for _ in range(100)]
    flat = [20_000_000 + each for each in noise]
    leak = [each + 60_000 * number for number, each in enumerate(flat)]
    step = [each + (2_000_000 if number > 90 else 0) for number, each in enumerate(flat)]
    assert watched(flat, [9] * 100).faults(4 << 20, 0) == []
    assert watched(step, [9] * 100).faults(1 << 20, 0) == []
    assert 5.5 < watched(leak, [9] * 100).series["router"].growth_bytes / 2**20 < 6.0
    (fault,) = watched(leak, [9] * 100).faults(4 << 20, 0)
    assert "router has grown" in fault
    assert slope([0.0, 1.0, 2.0], [5, 7, 9]) == 2.0


def test_files_that_stay_open_are_seen() -> None:
    assert watched([1] * 4, [9, 12, 10, 9]).faults(1, 0)
    assert watched([1] * 4, [9, 9, 9, 11]).faults(1, 0) == [
        "router had 9 open files, and has 11"
    ]  # fmt: skip
    assert watched([1] * 4, [9, 9, 9, 9]).faults(1, 0) == []


def test_what_is_closed_in_a_moment_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([9, 11, 10, 9, 11, 11])

    class Process:
        def __init__(self, pid: int) -> None:
            self.memory_full_info = lambda: SimpleNamespace(uss=1)
            self.num_fds = lambda: next(counts)

    monkeypatch.setattr(psutil, "Process", Process)
    watch = Watch({"router": 1})
    for settle_s in (0.0, 30.0, 0.0):
        watch.sample(settle_s)
    assert watch.series["router"].fds == [9, 9, 11]
