"""A device's steps are found in the timeline of its node, and those of a stretch alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from albireo.bench.device_steps import DeviceSteps, DeviceTimes
from albireo.bench.streams import Round, TimedStream, step_times
from albireo.ipc.stages import Stage

from ..trace.synthetic import Span, write

MS = 1_000_000


def steps_of(lengths: list[int], idle: int = 1) -> list[Span]:
    """Steps of so many ms each, from 0 on: idle, the forward pass, half as long sampling."""
    spans: list[Span] = []
    end = 0
    for step, length in enumerate(lengths):
        begin, end = (end + idle) * MS, end + length
        sampling = begin + (length - idle) * MS * 2 // 3
        spans += [
            (Stage.FORWARD, step, begin, sampling), (Stage.SAMPLE, step, sampling, end * MS)
        ]  # fmt: skip
    return spans


def test_the_steps_before_an_end(tmp_path: Path) -> None:
    """They end at 5, 11, 18, 26 and 35 ms."""
    others = steps_of([2] * 20)
    write(tmp_path, "g0.scheduler.0", others)
    write(tmp_path, "g0.worker0.0", others)  # of an incarnation that has ended
    write(tmp_path, "g0.worker0.1", others, steps_of([5, 6, 7, 8, 9]))
    write(tmp_path, "g0.worker1.1", others, others)
    write(tmp_path, "g1.worker0.0", others, others)
    steps = DeviceSteps(tmp_path)
    assert steps.before(1.0, 9).steps == pytest.approx([0.006, 0.007, 0.008, 0.009])
    assert steps.before(1.0, 9).idle == pytest.approx([0.001] * 4)
    assert steps.before(0.030, 2).steps == pytest.approx([0.007, 0.008])
    assert steps.before(0.026, 1).steps == pytest.approx([0.008])
    assert steps.before(0.004, 5) == steps.before(1.0, 0) == ([], [])
    assert DeviceSteps(tmp_path / "none").before(1.0, 5) == ([], [])


def test_what_the_ring_has_lost_is_left_out(tmp_path: Path) -> None:
    """It has room for 32,768 records, a half step at each end: the newest is still at work."""
    spans = steps_of([3] * 17_000)
    write(tmp_path, "g0.worker0.0", [], spans[:-1])
    steps = DeviceSteps(tmp_path).before(60.0, 100_000)
    assert 16_300 < len(steps.steps) < 16_384
    assert steps.steps == pytest.approx([0.003] * len(steps.steps))
    assert steps.idle == pytest.approx([0.001] * len(steps.idle))


def test_they_stand_beside_those_at_the_client() -> None:
    stream = TimedStream()
    stream.arrivals = [(0.01 * number, 1) for number in range(21)]
    first = Round([stream], (), DeviceTimes([0.009, 0.010, 0.010], [0.0, 0.001, 0.002]))
    second = Round([stream], (), DeviceTimes([0.010, 0.031, 0.010], [0.0, 0.020, 0.0]))
    for rounds in ([first, second], [second, first]):
        row = step_times(rounds, 21)
        assert (row["device_ms_median"], row["device_ms_p99"]) == (10.0, 31.0)
        assert row["device_idle_ms_p99"] == 20.0
        assert row["step_ms_p99"] == pytest.approx(10.0)
    row = step_times([Round([stream])], 21)
    assert row["device_ms_median"] is row["device_ms_p99"] is row["device_idle_ms_p99"] is None
