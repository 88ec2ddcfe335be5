"""Timelines made by hand: records from tuples, and files of a node's runtime directory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from albireo.ipc.stages import Stage
from albireo.ipc.timeline import (
    DIRECTORY,
    RECORD,
    WORKER_TRACKS,
    Recorder,
    Records,
    create_timeline,
)

Span = tuple[Stage, int, int, int]
"""Stage, step, start_ns, end_ns."""


def records(spans: Iterable[Span]) -> Records:
    return np.array(
        [(start, end, step, 1, n, stage, 0) for n, (stage, step, start, end) in enumerate(spans)],
        RECORD,
    )


def write(directory: Path, name: str, *tracks: Iterable[Span]) -> None:
    """A plain file does as well as the link to a memfd."""
    fd = create_timeline(name, WORKER_TRACKS if "worker" in name else 1)
    for track, spans in enumerate(tracks):
        recorder = Recorder(fd, track)
        for stage, step, start, end in spans:
            recorder.record(stage, step, start, end, 1)
    (directory / DIRECTORY).mkdir(exist_ok=True)
    size = os.fstat(fd).st_size
    (directory / DIRECTORY / name).write_bytes(os.pread(fd, size, 0))
    os.close(fd)


def steady_group(steps: int, begin_ns: int = 1_000_000) -> dict[str, list[Span]]:
    """Steps of 1,000 us: 900 forward, 80 sampling, 20 idle, of which T1 takes 5, T2 4 and T5 8.

    A step's plan, input and output besides run while the device computes.
    """
    found: dict[str, list[Span]] = {"scheduler": [], "worker": [], "device": [], "detokenizer": []}
    for step in range(1, steps + 1):
        idle = begin_ns + (step - 1) * 1_000_000
        begin, forwarded, done = idle + 20_000, idle + 920_000, idle + 1_000_000
        found["scheduler"] += [
            (Stage.APPLY, step - 1, idle + 1_000, idle + 6_000),
            (Stage.PLAN, step + 1, begin + 50_000, begin + 80_000),
        ]
        # T2 overlaps T1 for 1 us, which is T1's.
        found["worker"].append((Stage.INPUT, step, idle + 5_000, idle + 10_000))
        found["detokenizer"].append((Stage.DETOKENIZE, step - 1, idle + 12_000, idle + 40_000))
        found["device"] += [
            (Stage.FORWARD, step, begin, forwarded),
            (Stage.SAMPLE, step, forwarded, done),
        ]
    return found


def write_group(directory: Path, steps: int, group: int = 0) -> None:
    spans = steady_group(steps)
    write(directory, f"g{group}.scheduler.0", spans["scheduler"])
    write(directory, f"g{group}.worker0.0", spans["worker"], spans["device"])
    write(directory, f"g{group}.detokenizer.0", spans["detokenizer"])
