"""A device's steps are found in the timeline of its node, and those of a stretch alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from albireo.bench.device_steps import DeviceSteps
from albireo.bench.streams import Round, TimedStream, step_times
from albireo.ipc.stages import Stage

from ..trace.synthetic import Span, write

MS = 1_000_000


def steps_of(lengths: list[int], stage: Stage = Stage.SAMPLE) -> list[Span]:
    """Steps of so many ms each, from 0 on, with a forward pass in each."""
    spans: list[Span] = []
    end = 0
    for step, length in enumerate(lengths):
        begin, end = end, end + length * MS
        spans += [(Stage.FORWARD, step, begin, end - 1), (stage, step, end - 1, end)]
    return spans


def test_the_steps_of_a_stretch(tmp_path: Path) -> None:
    write(tmp_path, "g0.scheduler.0", steps_of([1] * 20))
    write(tmp_path, "g0.worker0.0", steps_of([1] * 20))  # of an incarnation that has ended
    write(tmp_path, "g0.worker0.1", steps_of([1] * 20), steps_of([5, 6, 7, 8, 9]))
    write(tmp_path, "g0.worker1.1", steps_of([1] * 20), steps_of([1] * 20))
    steps = DeviceSteps(tmp_path)
    assert steps.between(0.0, 1.0) == [6, 7, 8, 9]
    assert steps.between(0.006, 0.026) == [7, 8]  # ends at 11, 18 and 26 ms
    assert steps.between(0.03, 0.02) == steps.between(1.0, 2.0) == []
    assert DeviceSteps(tmp_path / "none").between(0.0, 1.0) == []


def test_they_stand_beside_those_at_the_client() -> None:
    stream = TimedStream()
    stream.arrivals = [(0.01 * number, 1) for number in range(21)]
    row = step_times([Round([stream], (), [9.0, 10.0, 10.0, 31.0])] * 2, 21)
    assert (row["device_ms_median"], row["device_ms_p99"]) == (10.0, 31.0)
    assert row["step_ms_p99"] == pytest.approx(10.0)
    row = step_times([Round([stream])], 21)
    assert row["device_ms_median"] is row["device_ms_p99"] is None
