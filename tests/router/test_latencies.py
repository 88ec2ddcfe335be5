"""Histograms of what requests take: values land in their buckets, sums and counts agree."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.ipc.histogram import Histogram
from albireo.router.groups import GroupTable
from albireo.router.latencies import GroupLatencies, StreamTimes


@given(st.lists(st.floats(0, 10), max_size=50))
def test_a_value_is_counted_at_the_first_bound_that_is_not_below_it(values: list[float]) -> None:
    histogram = Histogram((0.5, 1.0, 5.0))
    for each in values:
        histogram.record(each)
    assert histogram.counts == [
        sum(v <= 0.5 for v in values),
        sum(0.5 < v <= 1.0 for v in values),
        sum(1.0 < v <= 5.0 for v in values),
        sum(v > 5.0 for v in values),
    ]
    assert histogram.total == pytest.approx(sum(values))


def test_the_times_of_an_answer() -> None:
    latencies = GroupLatencies()
    times = StreamTimes(arrived=10.0)
    latencies.tokens(times, 1, now=10.3)
    latencies.tokens(times, 1, now=10.32)
    latencies.tokens(times, 2, now=10.36)
    latencies.end(times, "stop", now=10.4)
    latencies.batch(2, more=True)
    latencies.batch(1, more=False)
    tree = latencies.tree()
    sums = {name: (sum(found["counts"]), found["sum"]) for name, found in tree.items()}
    assert sums == {
        "time_to_first_token_seconds": (1, pytest.approx(0.3)),
        "inter_token_latency_seconds": (2, pytest.approx(0.06)),
        "request_time_per_output_token_seconds": (1, pytest.approx(0.02)),
        "e2e_request_latency_seconds": (1, pytest.approx(0.4)),
        "iteration_tokens_total": (1, 3),
    }
    assert latencies.finished == {"stop": 1}


def test_a_step_that_came_in_part_is_none_of_the_next_life() -> None:
    table = GroupTable(1, 4, 2)
    (group,) = table
    table.joined(b"g0.0", 0, 0)
    group.latencies.batch(64, more=True)
    table.down(0, 0)
    table.joined(b"g0.1", 0, 1)
    group.latencies.batch(1, more=False)
    counted = group.latencies.tree()["iteration_tokens_total"]
    assert (sum(counted["counts"]), counted["sum"]) == (1, 1)


def test_an_answer_of_one_token_has_no_time_per_output_token() -> None:
    latencies = GroupLatencies()
    times = StreamTimes(arrived=0.0)
    latencies.tokens(times, 1, now=1.0)
    latencies.end(times, "length", now=1.0)
    assert sum(latencies.tree()["request_time_per_output_token_seconds"]["counts"]) == 0
