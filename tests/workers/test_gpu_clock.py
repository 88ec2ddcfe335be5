"""Steps of a GPU on the CPU's clock: gaps are exact, drift is held, pauses begin anew."""

from __future__ import annotations

import math
import queue
from typing import Any

import numpy as np
import pytest
import torch

from albireo.ipc.stages import Stage
from albireo.ipc.timeline import DEVICE, RESULTS, TimelineReader, create_timeline
from albireo.workers.engine.cuda import flights as flights_module
from albireo.workers.engine.cuda.event_waiter import EventTimes
from albireo.workers.engine.cuda.flights import Collector
from albireo.workers.engine.cuda.gpu_clock import FlightRecorder, GpuClock

MS = 1_000_000


def elapsed_ms(start_ms: float, end_ms: float) -> float:
    """As elapsed_time() gives it: a float32 between two times that are half a microsecond fine."""
    return float(np.float32(round(end_ms * 2000) / 2000 - round(start_ms * 2000) / 2000))


@pytest.mark.parametrize("drift", [0.0, 5e-5, -5e-5])
def test_a_long_run(drift: float) -> None:
    """20,000 steps launched a step ahead, while the clocks drift apart by 5 ms in all."""
    clock = GpuClock()
    rng = np.random.default_rng(1)

    def cpu_ns(at_ms: float) -> float:
        return 1e12 + at_ms * MS * (1 + drift)

    end, done_ns, gaps, errors = 0.0, None, [], []
    for step in range(20_000):
        begun = end + 0.012 + 0.001 * rng.random()
        forwarded = begun + 4.8 + rng.random() / 10
        done = forwarded + 0.1
        times = clock.place(
            round(cpu_ns(begun) - (4_000 if step == 0 else 3.5 * MS)),
            round(cpu_ns(done) + 15_000 + 20_000 * rng.random()),
            elapsed_ms(end, begun) if step else None,
            elapsed_ms(begun, forwarded),
            elapsed_ms(forwarded, done),
        )
        if done_ns is not None:
            gaps.append(times.begun_ns - done_ns - (begun - end) * MS)
        errors.append(times.begun_ns - cpu_ns(begun))
        done_ns, end = times.done_ns, done
    assert np.abs(gaps).max() < 2000 and np.percentile(np.abs(gaps), 99) < 750
    assert np.abs(errors).max() < 30_000


def test_a_step_begins_after_its_launch() -> None:
    clock = GpuClock()
    clock.place(0, 6 * MS, None, 5.0, 0.5)
    # The GPU's clock runs slow; the step was launched onto an idle GPU.
    times = clock.place(9 * MS, 16 * MS, 3.4, 5.0, 0.5)
    assert times == (9 * MS, 14 * MS, 14 * MS + MS // 2)


def test_a_step_ends_before_it_is_seen() -> None:
    times = GpuClock().place(10 * MS, 15 * MS, None, 5.0, 0.5)
    assert times == (9 * MS + MS // 2, 14 * MS + MS // 2, 15 * MS)


def test_a_long_pause_begins_anew() -> None:
    clock = GpuClock()
    clock.place(0, 6 * MS, None, 5.0, 0.5)
    assert clock.place(900_000 * MS, 900_009 * MS, 899_990.0, 5.0, 0.5).begun_ns == 900_000 * MS


class Event:
    def __init__(self, at_ms: float) -> None:
        self.at_ms = at_ms


class Waiter:
    """In place of an EventWaiter: all has happened."""

    def wait(
        self, before: Event | None, begun: Event, forwarded: Event, sampled: Event, done: Event
    ) -> EventTimes:
        return EventTimes(
            None if before is None else elapsed_ms(before.at_ms, begun.at_ms),
            elapsed_ms(begun.at_ms, forwarded.at_ms),
            elapsed_ms(forwarded.at_ms, sampled.at_ms),
        )


class Flight:
    def __init__(self, step: int, begun: float, forwarded: float, done: float) -> None:
        self.step, self.count, self.launched_ns = step, 8, round(begun * MS)
        self.begun, self.forwarded = Event(begun), Event(forwarded)
        self.sampled, self.done = Event(done), Event(math.nan)  # this one has no time


def test_flights_are_recorded() -> None:
    fd = create_timeline("g0.worker0", 3)
    recorder = FlightRecorder({"timeline": fd})
    before = None
    for step in range(3):
        flight = Flight(step, step * 5.0, step * 5 + 4.5, step * 5 + 4.9)
        seen = round((step * 5 + 4.95) * MS)
        times = Waiter().wait(before, flight.begun, flight.forwarded, flight.sampled, flight.done)
        recorder.landed(flight, times, seen)  # type: ignore[arg-type]
        before = flight.sampled
    reader = TimelineReader(f"/proc/self/fd/{fd}")
    device = reader.newest(DEVICE)
    assert device["stage"].tolist() == [Stage.FORWARD, Stage.SAMPLE] * 3
    assert device["start_ns"][0::2].tolist() == [0, 5 * MS, 10 * MS]
    assert (device["end_ns"] - device["start_ns"])[1::2].tolist() == [400_000] * 3
    assert reader.newest(RESULTS)["step"].tolist() == [0, 1, 2]


def test_a_flight_is_not_used_again_before_the_next_has_landed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gap behind a step is measured from its event, which a new launch would record again."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(flights_module, "EventWaiter", Waiter)
    flights: list[Any] = [Flight(step, step * 5.0, step * 5 + 4.5, step * 5 + 5) for step in (0, 1)]
    failures: list[str] = []
    landed: queue.SimpleQueue[int] = queue.SimpleQueue()
    collector = Collector(
        flights,
        lambda step, result, step_us: landed.put(step),
        failures.append,
        0.2,
        FlightRecorder({}),
    )
    for flight in flights:
        flight.result = lambda forward_us: None
        assert collector.take() is flight
    collector.send(flights[0])
    assert landed.get(timeout=5) == 0
    with pytest.raises(TimeoutError):
        collector.take()
    collector.send(flights[1])
    assert landed.get(timeout=5) == 1 and collector.take() is flights[0]
    collector.finish()
    assert failures == []
