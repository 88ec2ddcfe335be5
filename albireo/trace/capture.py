"""A stretch of a running node, cut out of its timelines: what chrome.py and page.py draw."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from albireo.ipc.stages import Stage
from albireo.ipc.timeline import CAPACITY, Records

from .rows import NodeTimelines, Source
from .stages import StageStats, group_stages

MAX_STEPS = CAPACITY // 16
"""A timeline surely still holds that many."""
_POLL_S = 0.02
_SETTLE_S = 0.02
"""For the output of the last step, which runs behind it."""


class CaptureError(RuntimeError):
    """There is nothing to show; the text is for the user."""


@dataclass(frozen=True)
class Row:
    """name: of the actor or device.  records: those that reach into the stretch, by their start.

    ended: the process is dead; these are its last records.
    """

    name: str
    role: str
    group: int
    device: bool
    ended: bool
    records: Records


@dataclass(frozen=True)
class Stretch:
    """begin_ns, end_ns: CLOCK_MONOTONIC.  steps: of the group that made the most of them.

    stats: of each group with steps in it.
    """

    node: str
    begin_ns: int
    end_ns: int
    steps: int
    rows: list[Row]
    stats: dict[int, StageStats]


def capture(
    runtime_dir: Path,
    steps: int,
    *,
    last: bool,
    timeout_s: float,
    seen: Callable[[int], None] = lambda count: None,
) -> Stretch:
    """The next `steps` steps of the busiest group, or the last ones.

    seen(count): called while steps are awaited.  Raises CaptureError where
    there are no steps, or too few within the time.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise CaptureError(f"--steps {steps}: 1 to {MAX_STEPS:,} steps can be shown")
    timelines = NodeTimelines(runtime_dir)
    if last:
        begin_ns, end_ns, found = _last(timelines, steps)
    else:
        begin_ns, end_ns, found = _next(timelines, steps, timeout_s, seen)
        time.sleep(_SETTLE_S)
    return cut(timelines, runtime_dir.name, begin_ns, end_ns, found)


def cut(timelines: NodeTimelines, node: str, begin_ns: int, end_ns: int, steps: int) -> Stretch:
    """What every actor did between two times."""
    sources = timelines.sources()
    rows = []
    for source in sources:
        records = source.newest()
        inside = (records["end_ns"] > begin_ns) & (records["start_ns"] < end_ns)
        records = records[inside]
        if len(records):
            records = records[np.argsort(records["start_ns"], kind="stable")]
            rows.append(
                Row(source.name, source.role, source.group, source.device, source.ended, records)
            )
    stats = {}
    for group in sorted({source.group for source in sources} - {-1}):
        own = [each for each in sources if each.group == group and not each.ended]
        found = group_stages(own, MAX_STEPS, (begin_ns, end_ns))
        if found is not None:
            stats[group] = found
    return Stretch(node, begin_ns, end_ns, steps, rows, stats)


def _last(timelines: NodeTimelines, steps: int) -> tuple[int, int, int]:
    """(begin, end, number) of the newest steps there are."""
    best: Records | None = None
    for source in _devices(timelines):
        forward = _forward(source)
        if len(forward) and (best is None or forward["end_ns"][-1] > best["end_ns"][-1]):
            best = forward[-steps:]
    if best is None:
        raise CaptureError(
            "the node has not computed a step yet: send it requests first, "
            "`albireo generate hello` for one"
        )
    # The end: sampling and output of the last step, too.
    end_ns = min(time.monotonic_ns(), int(best["end_ns"][-1]) + round(_SETTLE_S * 1e9))
    return int(best["start_ns"][0]), end_ns, len(best)


def _next(
    timelines: NodeTimelines, steps: int, timeout_s: float, seen: Callable[[int], None]
) -> tuple[int, int, int]:
    begin_ns = time.monotonic_ns()
    deadline = time.monotonic() + timeout_s
    while True:
        best: Records | None = None
        for source in _devices(timelines):
            forward = _forward(source)
            forward = forward[forward["start_ns"] >= begin_ns]
            if best is None or len(forward) > len(best):
                best = forward
        count = 0 if best is None else len(best)
        seen(min(count, steps))
        if best is not None and count >= steps:
            end_ns = int(best["end_ns"][steps - 1]) + round(_SETTLE_S * 1e9)
            return int(best["start_ns"][0]), end_ns, steps
        if time.monotonic() > deadline:
            raise CaptureError(
                f"{count} of {steps} steps came in {timeout_s:g} s: the node has too little to do. "
                "Send it requests meanwhile, raise --timeout, or take --last for the steps before"
            )
        time.sleep(_POLL_S)


def _devices(timelines: NodeTimelines) -> list[Source]:
    return [
        each for each in timelines.sources() if each.device and each.rank == 0 and not each.ended
    ]


def _forward(source: Source) -> Records:
    records = source.newest()
    forward: Records = records[records["stage"] == Stage.FORWARD]
    return forward
