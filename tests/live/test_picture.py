"""Rates, percentiles and shares of samples whose answers are known."""

from __future__ import annotations

import pytest

from albireo.live.history import KEPT_S, History, grown
from albireo.live.machine import GpuReading
from albireo.live.percentiles import Percentiles, gained, percentiles
from albireo.live.picture import Energy, picture

from .trees import actor, group, sample, scheduler


def history(*samples: object) -> History:
    found = History()
    for each in samples:
        found.add(each)  # type: ignore[arg-type]
    return found


def test_of_one_sample_rates_are_not_known() -> None:
    found = picture(history(sample(1.0, group(tokens=50))))
    assert found.rates.tokens_per_s is None and found.rates.ttft is None
    assert found.groups[0].running == 3 and found.groups[0].kv_usage == 0.5
    assert found.actors[0].cpu is None


def test_rates_are_of_the_last_three_seconds() -> None:
    found = picture(history(
        sample(0.0, group(tokens=0)),
        sample(10.0, group(tokens=100)),
        sample(11.0, group(tokens=200, scheduler=scheduler(prompt_tokens=140))),
        sample(14.0, group(tokens=320, answers=6,
                           scheduler=scheduler(prompt_tokens=200, prefix_hit_tokens=30,
                                               prefix_queried_tokens=60))),
    ))  # fmt: skip
    assert found.span_s == 3.0
    assert found.rates.tokens_per_s == 40.0
    assert found.rates.prompt_tokens_per_s == 10.0
    assert found.rates.answers_per_s == 2.0
    assert found.groups[0].prefix_hit_rate == 0.5


def test_latencies_are_of_the_last_half_minute() -> None:
    first, later = group(tokens=10), group(tokens=10)
    assert picture(history(sample(0.0, first), sample(1.0, later))).rates.ttft is None
    found = picture(history(sample(0.0, group()), sample(1.0, group(tokens=101)))).rates
    assert found.ttft == Percentiles(1, 80.0, 98.0, 99.6)
    assert found.itl is not None and found.itl.count == 100
    # 20 ms lies on a bucket's upper bound; below it the bucket begins at 15 ms.
    assert 15.0 < found.itl.p50_ms < found.itl.p95_ms < found.itl.p99_ms <= 30.0


def test_percentiles_of_histograms() -> None:
    bounds = (1.0, 2.0, 4.0)
    assert percentiles([]) is None and percentiles([(bounds, [0, 0, 0, 0])]) is None
    found = percentiles([(bounds, [0, 50, 0, 0]), (bounds, [0, 0, 45, 5])])
    assert found is not None and (found.count, found.p50_ms) == (100, 2000.0)
    assert found.p95_ms == 4000.0
    assert found.p99_ms == 4000.0, "above the last bound nothing is known but the bound"


def test_a_histogram_that_began_anew_counts_whole() -> None:
    old = {"bounds": [1.0], "counts": [5, 5], "sum": 1.0}
    new = {"bounds": [1.0], "counts": [2, 1], "sum": 1.0}
    assert gained(new, old) == ([1.0], [2, 1])
    assert gained(old, new) == ([1.0], [3, 4])


def test_a_group_that_began_anew_counts_from_0() -> None:
    assert grown(5, 3) == 2 and grown(3, 5) == 3
    found = picture(history(
        sample(0.0, group(scheduler=scheduler(prompt_tokens=1000))),
        sample(3.0, group(scheduler=scheduler(prompt_tokens=30))),
    ))  # fmt: skip
    assert found.rates.prompt_tokens_per_s == 10.0


def test_a_group_that_is_away() -> None:
    found = picture(history(
        sample(0.0, group()),
        sample(1.0, group(state="restarting", scheduler=None, stages=None)),
    ))  # fmt: skip
    assert found.groups[0].state == "restarting"
    assert found.groups[0].running is None and found.groups[0].kv_usage is None
    assert found.groups[0].stages is None


@pytest.mark.parametrize(
    "later",
    [
        {"uptime_s": 0.5},
        {"actors": [actor("router", pid=99)]},
        {"node": "another"},
    ],
)
def test_a_new_router_begins_a_new_history(later: dict[str, object]) -> None:
    found = history(sample(1.0, group(tokens=9)), sample(2.0, group(tokens=1), **later))
    assert len(found) == 1 and picture(found).rates.tokens_per_s is None


def test_history_is_bounded_and_covers_the_half_minute() -> None:
    found = history(*(sample(at, group()) for at in range(1, 200)))
    assert len(found) == KEPT_S + 1
    oldest = found.before(KEPT_S)
    assert oldest is not None and oldest.at_s == 199 - KEPT_S


def test_cpu_is_of_the_same_process() -> None:
    old = sample(0.0, group(), cpu_s={"router": 1.0, "g0.worker0": 4.0})
    new = sample(2.0, group(), cpu_s={"router": 1.5, "g0.worker0": 7.0})
    assert [each.cpu for each in picture(history(old, new)).actors] == [0.25, 1.5]
    replaced = sample(2.0, group(), cpu_s={"router": 1.5, "g0.worker0": 0.1},
                      actors=[actor("router", 10), actor("g0.worker0", 77, 0)])  # fmt: skip
    assert [each.cpu for each in picture(history(old, replaced)).actors] == [0.25, None]


def gpu(uuid: str, energy_j: float | None, power_w: float | None = 300.0) -> dict[str, GpuReading]:
    return {uuid: GpuReading(uuid=uuid, name="GPU", energy_j=energy_j, power_w=power_w)}


def test_energy_is_of_the_gpus_counters() -> None:
    first = group(tokens=0, gpus=["a", "b"]), group(1, gpus=["c"])
    then = group(tokens=600, gpus=["a", "b"]), group(1, gpus=["c"])
    found = picture(history(
        sample(0.0, *first, gpus=gpu("a", 100.0) | gpu("b", 0.0) | gpu("c", 0.0)),
        sample(3.0, *then, gpus=gpu("a", 700.0) | gpu("b", 600.0) | gpu("c", 300.0)),
    ))  # fmt: skip
    assert found.no_gpu == ""
    assert found.groups[0].energy == Energy(power_w=400.0, j_per_token=2.0)
    assert found.groups[1].energy == Energy(power_w=100.0, j_per_token=None)
    assert found.energy == Energy(power_w=500.0, j_per_token=2.5)


def test_energy_without_a_counter_is_power_times_time() -> None:
    found = picture(history(
        sample(0.0, group(gpus=["a"]), gpus=gpu("a", None)),
        sample(2.0, group(tokens=100, gpus=["a"]), gpus=gpu("a", None)),
    ))  # fmt: skip
    assert found.energy == Energy(power_w=300.0, j_per_token=6.0)


def test_what_is_not_there_is_said() -> None:
    found = picture(history(sample(0.0, group())))
    assert found.energy is None and found.groups[0].gpus == []
    assert found.no_gpu == "the cpu device has no GPU: no utilisation, power or energy"
    found = picture(history(sample(0.0, group(gpus=["a"]))), "nvidia-ml-py is not installed")
    assert found.energy is None and found.no_gpu == "nvidia-ml-py is not installed"
