"""What the timelines say about a group's steps: stage times, exposed times, the serial fraction.

    device   | T3 forward n-1 | T4 |  idle  | T3 forward n | T4 |
                                   ^        ^
                               end of n-1   begin of n

The time of step n is from the end of step n-1 to its own: idle, forward,
sampling.  Only the forward pass scales with the number of GPUs, so the serial
fraction is 1 - forward time / step time.  Idle time is blamed on what ran in
the group meanwhile: T1, else T2, else T5, else "other" (waking up, launching).
That is the exposed time of these tasks; what they take beside the forward pass
costs nothing.  Sampling is exposed whole.

A pause in which the scheduler had no request is nobody's fault: the step after
it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from albireo.ipc.stages import Stage, Task
from albireo.ipc.timeline import RECORD, Records

from .rows import Source

Int64Array = npt.NDArray[np.int64]

_BLAMED = (Task.SCHEDULE, Task.INPUT, Task.OUTPUT)
"""Whom idle time is blamed on, in this order."""
_TASK_OF = np.zeros(1 << 16, np.uint8)
for _stage in Stage:
    _TASK_OF[_stage] = _stage.task
_RAW = np.dtype(f"V{RECORD.itemsize}")
_MIN_STEPS = 2
_DEVICE_RECORDS, _RECORDS_PER_STEP = 2, 10
"""What a device writes for a step, and an actor at most for nearly every one; where it is more,
fewer steps are seen."""


class TaskStats(msgspec.Struct, frozen=True):
    """mean_us, p99_us: of its time in a step.  exposed_us: mean of what the device waited for."""

    mean_us: float
    p99_us: float
    exposed_us: float


class StageStats(msgspec.Struct, frozen=True, kw_only=True):
    """Of `steps` steps.  step: from end to end on the device.  idle: of the device, in a step.

    planned_ahead: share of the steps whose plan was there before the step before ended.
    other_exposed_us: idle time while no task of the group ran.
    """

    steps: int
    step_us_mean: float
    step_us_median: float
    step_us_p99: float
    idle_us_mean: float
    idle_us_p99: float
    serial_fraction: float
    planned_ahead: float
    schedule: TaskStats
    input: TaskStats
    forward: TaskStats
    sample: TaskStats
    output: TaskStats
    other_exposed_us: float


def group_stages(
    sources: Iterable[Source], last: int, window_ns: tuple[int, int] | None = None
) -> StageStats | None:
    """Of the newest `last` steps of a group (within the window, where there is one).

    sources: the group's rows.  None when there are too few steps.
    """
    most = (last + 2) * _RECORDS_PER_STEP
    device: Records | None = None
    actors: list[Records] = []
    since = 0
    for source in sources:
        records = source.newest() if window_ns else source.newest(most)
        if source.device:
            if source.rank == 0:
                device = records
            continue
        if window_ns is None and len(records) == most:
            # Older records than these were not read: older steps would look less exposed.
            since = max(since, int(records["end_ns"][0]))
        actors.append(records)
    if device is None or not len(device) or not actors:
        return None
    if window_ns is None:
        # Who writes little was read far beyond these steps.
        device = device[-_DEVICE_RECORDS * (last + 2) :]
        actors = [each[each["end_ns"] >= device["start_ns"][0]] for each in actors]
    begin, end = window_ns or (since, np.iinfo(np.int64).max)
    # As bytes: fields would be copied one by one.
    joined = np.concatenate([each.view(_RAW) for each in actors]).view(RECORD)
    return measure(device, joined, last, begin, end)


def measure(
    device: Records, actors: Records, last: int, begin_ns: int, end_ns: int
) -> StageStats | None:
    """device: FORWARD and SAMPLE of one rank.  actors: records of all others of the group."""
    steps = Steps(device, last, begin_ns, end_ns)
    if len(steps.number) < _MIN_STEPS:
        return None
    pauses = actors[actors["stage"] == Stage.NO_WORK]
    idle = _Cover(pauses["start_ns"], pauses["end_ns"]).within(steps.before, steps.begin)
    steps.keep(idle == 0)
    if len(steps.number) < _MIN_STEPS:
        return None
    tasks = _TASK_OF[actors["stage"]]
    by_task = {task: actors[tasks == task] for task in _BLAMED}
    exposed = _blame(by_task, steps)
    gap, took = steps.begin - steps.before, steps.done - steps.before
    forward, sample = steps.forwarded - steps.begin, steps.done - steps.sampling
    unblamed = took.mean() - forward.mean() - sample.mean() - sum(exposed.values())
    return StageStats(
        steps=len(took),
        step_us_mean=_us(took.mean()),
        step_us_median=_us(np.median(took)),
        step_us_p99=_us(_p99(took)),
        idle_us_mean=_us(gap.mean()),
        idle_us_p99=_us(_p99(gap)),
        serial_fraction=round(float(1 - forward.sum() / max(1, took.sum())), 5),
        planned_ahead=round(_planned_ahead(actors, steps), 4),
        forward=_task(forward, forward.mean()),
        sample=_task(sample, sample.mean()),
        other_exposed_us=_us(max(0.0, unblamed)),
        **{
            task.name.lower(): _task(_times(by_task[task], steps), exposed[task])
            for task in _BLAMED
        },
    )


class Steps:
    """Times of steps on the device, [K] ns each: end of the step before, begin, end of the
    forward pass, begin of sampling, end.

    device: FORWARD and SAMPLE of one rank.  Of the newest `last` steps within begin_ns and end_ns
    that have both, and one before them there.
    """

    def __init__(self, device: Records, last: int, begin_ns: int, end_ns: int) -> None:
        forward = device[device["stage"] == Stage.FORWARD]
        sample = device[device["stage"] == Stage.SAMPLE]
        if not np.array_equal(forward["step"], sample["step"]):
            _, at, sampled = np.intersect1d(forward["step"], sample["step"], return_indices=True)
            forward, sample = forward[at], sample[sampled]
        number = forward["step"]
        inside = (forward["start_ns"] >= begin_ns) & (sample["end_ns"] <= end_ns)
        forward, sample, number = forward[inside], sample[inside], number[inside]
        recent = slice(max(1, len(number) - last), None)
        self.number: npt.NDArray[Any] = number[recent]
        self.before: Int64Array = sample["end_ns"][max(0, recent.start - 1) : -1]
        self.forwarded: Int64Array = forward["end_ns"][recent]
        self.sampling: Int64Array = sample["start_ns"][recent]
        self.done: Int64Array = sample["end_ns"][recent]
        # Clocks of two devices: what overlaps by a rounding error does not.
        self.begin: Int64Array = np.maximum(forward["start_ns"][recent], self.before)

    def keep(self, wanted: npt.NDArray[np.bool_]) -> None:
        if wanted.all():
            return
        for name in ("number", "before", "begin", "forwarded", "sampling", "done"):
            setattr(self, name, getattr(self, name)[wanted])


class _Cover:
    """The union of spans, and how much of it lies between two times."""

    def __init__(self, start: Int64Array, end: Int64Array) -> None:
        order = np.argsort(start, kind="stable")
        start, end = start[order], np.maximum.accumulate(end[order])
        first = np.ones(len(start), np.bool_)
        first[1:] = start[1:] > end[:-1]
        self._start = start[first]
        self._end = end[np.append(first[1:], True)] if len(end) else end
        self._sum = np.concatenate([[0], np.cumsum(self._end - self._start)])

    def until(self, at: Int64Array) -> Int64Array:
        """Covered time before each of the times, [K]."""
        if not len(self._start):
            return np.zeros(len(at), np.int64)
        spans = np.searchsorted(self._start, at, side="right")
        beyond = np.where(spans > 0, self._end[np.maximum(spans, 1) - 1] - at, 0)
        return np.asarray(self._sum[spans] - np.maximum(beyond, 0))

    def within(self, begin: Int64Array, end: Int64Array) -> Int64Array:
        """Covered time from begin[k] to end[k], [K]."""
        return self.until(end) - self.until(begin)


def _blame(by_task: dict[Task, Records], steps: Steps) -> dict[Task, float]:
    """Mean exposed ns a step of T1, T2, T5: what of the idle time each of them covers alone, or
    together with a later one of them."""
    exposed: dict[Task, float] = {}
    so_far = 0.0
    for number, task in enumerate(_BLAMED, 1):
        found = [by_task[each] for each in _BLAMED[:number]]
        start, end = (np.concatenate([each[at] for each in found]) for at in ("start_ns", "end_ns"))
        covered = _Cover(start, end).within(steps.before, steps.begin).mean()
        exposed[task], so_far = float(covered) - so_far, float(covered)
    return exposed


def _times(chosen: Records, steps: Steps) -> Int64Array:
    """ns that a task's records took in each of the steps, [K], all actors added up."""
    place = np.searchsorted(steps.number, chosen["step"])
    place[place == len(steps.number)] = 0
    chosen, place = _matching(chosen, place, steps)
    took = (chosen["end_ns"] - chosen["start_ns"]).astype(np.float64)
    return np.bincount(place, took, len(steps.number)).astype(np.int64)


def _matching(
    records: Records, place: npt.NDArray[np.intp], steps: Steps
) -> tuple[Records, npt.NDArray[np.intp]]:
    """Without the records of other steps than these."""
    same = steps.number[place] == records["step"]
    return records[same], place[same]


def _planned_ahead(actors: Records, steps: Steps) -> float:
    plans = actors[actors["stage"] == Stage.PLAN]
    place = np.searchsorted(steps.number, plans["step"])
    place[place == len(steps.number)] = 0
    plans, place = _matching(plans, place, steps)
    return float((plans["end_ns"] <= steps.before[place]).mean()) if len(plans) else 0.0


def _task(times: Int64Array, exposed_ns: float) -> TaskStats:
    return TaskStats(_us(times.mean()), _us(_p99(times)), _us(exposed_ns))


def _p99(values: Int64Array) -> float:
    place = math.ceil(len(values) * 0.99) - 1
    return float(np.partition(values, place)[place])


def _us(nanoseconds: float) -> float:
    return round(float(nanoseconds) / 1000, 2)
