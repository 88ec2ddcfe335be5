"""Moments in which a machine is slow are found, and steps at other times are told apart."""

from __future__ import annotations

import itertools
import statistics
import time

import pytest

from albireo.bench import disturbance
from albireo.bench.disturbance import Moment, Watcher, _count_ns, slow_moments
from albireo.bench.streams import Round, TimedStream, step_times

MS = 1_000_000


def test_slow_samples_in_a_row_are_one_moment() -> None:
    samples = [(number * MS, 50_000) for number in range(20)]
    samples[5:8] = [(number * MS, 400_000) for number in range(5, 8)]
    samples[12] = (12 * MS, 151_000)
    samples[15] = (15 * MS, 149_000)  # not three times the usual
    samples[19] = (19 * MS, 500_000)  # the last one ends itself
    samples[6] = (6 * MS, 600_000)
    first, second, third = slow_moments(samples)
    assert first == pytest.approx((0.004, 0.008, 12.0))
    assert second == pytest.approx((0.011, 0.013, 3.02))
    assert third == pytest.approx((0.018, 0.0195, 10.0))
    assert slow_moments([]) == []


def test_the_watch_covers_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def all_of_them(samples: list[tuple[int, int]]) -> list[Moment]:
        seen.extend(samples)
        return [Moment(at * 1e-9, (at + took) * 1e-9, 3.0) for at, took in samples]

    monkeypatch.setattr(disturbance, "slow_moments", all_of_them)
    with Watcher() as watcher:
        began = time.perf_counter()
        time.sleep(0.25)
        ended = time.perf_counter()
        moments = watcher.slow_moments()
    inside = [each for each in moments if began < each.begin < each.end < ended]
    assert len(inside) > 5 and all(took > 0 for _, took in seen)
    # Every millisecond, or nearly, where it gets a core.
    apart = [after.begin - before.begin for before, after in itertools.pairwise(inside)]
    assert 0.0009 < statistics.median(apart) < 0.01
    assert inside[0].begin < began + 0.1 and inside[-1].end > ended - 0.1
    with Watcher():
        pass  # whoever does not ask ends it, too


def test_counting_takes_cpu_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it counts, and not what passes on the clock meanwhile."""
    few, many = (min(_count_ns(range(count)) for _ in range(20)) for count in (1_000, 20_000))
    assert 5 * few < many < 80 * few
    times = iter((0, 70, 100, 130, 200, 250))
    monkeypatch.setattr(disturbance.time, "thread_time_ns", lambda: next(times))
    assert _count_ns(range(1)) == 30  # the least of 70, 30 and 50


def test_disturbed_steps_are_counted_and_left_out_of_one_figure() -> None:
    """Twenty steps of 10 ms; one comes 8 ms late, so that the next one seems short."""
    streams = []
    for _ in range(2):
        stream = TimedStream()
        stream.arrivals = [(0.01 * number, 1) for number in range(21)]
        stream.arrivals[10] = (0.108, 1)
        streams.append(stream)
    row = step_times([Round(streams)], 21)
    assert (row["step_ms_p99"], row["steps_disturbed"]) == (18.0, 0.0)
    assert row["step_ms_p99_undisturbed"] == 18.0
    assert row["slowdown_max"] == 1.0
    row = step_times([Round(streams, [Moment(0.1, 0.109, 12.34)])], 21)
    assert row["slowdown_max"] == 12.3
    assert (row["step_ms_p99"], row["steps_disturbed"]) == (18.0, 2.0)
    assert row["step_ms_p99_undisturbed"] == 10.0
    assert row["step_ms_median"] == 10.0
    before, within, behind = ((-2.0, -1.0, 30.0), (0.19, 0.3, 7.0), (0.25, 0.3, 20.0))
    rounds = [Round(streams, [Moment(*before), Moment(*within), Moment(0.1, 0.2, 4.0)])]
    assert step_times([*rounds, Round(streams, [Moment(*behind)])], 21)["slowdown_max"] == 7.0
    row = step_times([Round(streams, [Moment(-1.0, 1.0, 3.0)])], 21)
    assert (row["steps_disturbed"], row["step_ms_p99_undisturbed"]) == (20.0, None)


def test_the_steps_of_a_round_in_their_order() -> None:
    """Steps of 1 to 40 ms; the stream that began last saw only those of 11 ms and more."""
    streams = []
    for begins in (0, 10):
        stream = TimedStream()
        stream.arrivals = [(n * (n + 1) / 2e3, 1) for n in range(begins, 41)]
        streams.append(stream)
    row = step_times([Round(streams)], 41)
    assert row["slowest_of_rounds"] == [[(29, 40.0), (28, 39.0), (27, 38.0), (26, 37.0)]]
    assert row["median_ms_of_quarters"] == [14.5, 22.0, 29.5, 37.0]


def test_rounds_are_taken_together() -> None:
    """Of 4 x 100 steps the four latest are P99's: here one late step of a round is not."""
    rounds = []
    for late in (0.005, 0.0, 0.0, 0.001):
        stream = TimedStream()
        stream.arrivals = [(0.01 * n + (late if n > 50 else 0.0), 1) for n in range(101)]
        rounds.append(Round([stream]))
    row = step_times(rounds, 101)
    assert row["p99_ms_of_rounds"] == [10.0] * 4
    assert (row["steps"], row["step_ms_p99"]) == (400, 10.0)
    assert row["slowest_of_rounds"][0][0] == (50, 15.0)
    assert row["slowest_of_rounds"][3][0] == (50, 11.0)
    assert row["median_ms_of_quarters"] == [10.0] * 4
    rounds[1] = Round([stream], [Moment(0.0, 0.5, 3.0)])
    assert step_times(rounds, 101)["steps_disturbed"] == 50.0
