"""Stage times, exposed times and the serial fraction of timelines whose answers are known."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from albireo.ipc.stages import Stage
from albireo.trace.rows import NodeTimelines
from albireo.trace.stages import StageStats, TaskStats, _Cover, group_stages, measure

from .synthetic import Span, records, steady_group, write_group

EVER = 0, 2**62


def measured(spans: dict[str, list[Span]], last: int = 1000) -> StageStats | None:
    actors = [each for name, found in spans.items() if name != "device" for each in found]
    return measure(records(spans["device"]), records(actors), last, *EVER)


def test_a_steady_group() -> None:
    stats = measured(steady_group(101))
    assert stats is not None
    assert stats == StageStats(
        steps=100,
        step_us_mean=1000.0,
        step_us_median=1000.0,
        step_us_p99=1000.0,
        idle_us_mean=20.0,
        idle_us_p99=20.0,
        serial_fraction=0.1,
        planned_ahead=1.0,
        schedule=TaskStats(34.95, 35.0, 5.0),
        input=TaskStats(5.0, 5.0, 4.0),
        forward=TaskStats(900.0, 900.0, 900.0),
        sample=TaskStats(80.0, 80.0, 80.0),
        # The result of the last step has not been applied, nor its text made, yet.
        output=TaskStats(27.72, 28.0, 8.0),
        other_exposed_us=3.0,
    )


def test_the_last_steps_alone() -> None:
    spans = steady_group(101)
    # Far slower at first.
    spans["device"][0] = (Stage.FORWARD, 1, -90_000_000, -50_000_000)
    stats = measured(spans, last=50)
    assert stats is not None and stats.steps == 50 and stats.step_us_p99 == 1000.0


def test_a_pause_without_work_is_not_idle_time() -> None:
    spans = steady_group(11)
    pause = 60_000_000
    for name, found in spans.items():
        spans[name] = [
            (stage, step, *(at + pause * (at > 6_000_000) for at in when))
            for stage, step, *when in found
        ]
    slow = measured(spans)
    assert slow is not None and slow.steps == 10 and slow.idle_us_mean == pytest.approx(6020)
    spans["scheduler"].append((Stage.NO_WORK, 0xFFFFFFFF, 6_002_000, 66_000_000))
    stats = measured(spans)
    assert stats is not None and stats.steps == 9 and stats.idle_us_mean == 20.0


def test_a_late_plan_is_seen() -> None:
    spans = steady_group(5)
    late = [
        (stage, step, *((at + 970_000 if stage is Stage.PLAN and step == 4 else at) for at in when))
        for stage, step, *when in spans["scheduler"]
    ]
    stats = measured(spans | {"scheduler": late})
    assert stats is not None and stats.planned_ahead == 0.75


def test_too_few_steps() -> None:
    assert measured(steady_group(2)) is None
    assert measured({"device": [], "scheduler": []}) is None


def test_cover_is_the_union() -> None:
    rng = np.random.default_rng(0)
    start = rng.integers(0, 900, 60)
    end = start + rng.integers(0, 30, 60)
    taken = np.zeros(1000, np.int64)
    for a, b in zip(start, end, strict=True):
        taken[a:b] = 1
    cover = _Cover(start, end)
    begin = rng.integers(0, 900, 200)
    until = begin + rng.integers(0, 99, 200)
    expected = [taken[a:b].sum() for a, b in zip(begin, until, strict=True)]
    assert cover.within(begin, until).tolist() == expected
    nothing = _Cover(start[:0], end[:0])
    assert not nothing.within(begin, until).any()


def test_from_files(tmp_path: Path) -> None:
    """As the router reads them, in some milliseconds."""
    write_group(tmp_path, 1500)
    timelines = NodeTimelines(tmp_path)
    stats = group_stages(timelines.group(0), 1000)
    assert stats is not None
    assert (stats.steps, stats.serial_fraction, stats.schedule.exposed_us) == (1000, 0.1, 5.0)
    took = []
    for _ in range(5):
        began = time.perf_counter()
        group_stages(timelines.group(0), 1000)
        took.append(time.perf_counter() - began)
    assert min(took) < 0.02
    begin = 1_000_000 + 200 * 1_000_000
    cut = group_stages(timelines.group(0), 1000, (begin, begin + 100 * 1_000_000))
    assert cut is not None and cut.steps == 99
    assert group_stages(timelines.group(1), 1000) is None


def test_rows_of_a_node(tmp_path: Path) -> None:
    write_group(tmp_path, 3)
    (tmp_path / "timeline" / "g0.scheduler.0").rename(tmp_path / "timeline" / "g0.scheduler.2")
    timelines = NodeTimelines(tmp_path)
    write_group(tmp_path, 3)
    (tmp_path / "timeline" / "router.0").write_bytes(b"no timeline")
    found = [(each.name, each.incarnation, each.ended) for each in timelines.sources()]
    assert found == [
        ("g0.scheduler", 0, True),
        ("g0.scheduler", 2, False),
        ("g0.worker0", 0, False),
        ("g0.device0", 0, False),
        ("g0.results0", 0, False),
        ("g0.detokenizer", 0, False),
    ]
    assert [each.name for each in timelines.group(0)].count("g0.scheduler") == 1
    assert NodeTimelines(tmp_path / "nowhere").sources() == []
