"""The figures of a run as the picture that the simulator draws of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from albireo.simulate.histogram import Histogram
from albireo.simulate.plot import draw

from .figures import times
from .run import Run

_SAMPLES = 500


class _Drawn:
    """Distributions, and the load over time."""

    def __init__(self, run: Run) -> None:
        found = times([answer for _, answer in run.answers])
        self.ttft, self.tpot, self.itl = (
            _histogram(found[name]) for name in ("ttft", "tpot", "itl")
        )
        self.samples = _load(run)


def draw_run(run: Run, path: Path) -> None:
    """Writes a picture, of the kind that the name's end says.  Raises PlotError."""
    result = run.result
    title = (
        f"{result['model']}: {result['completed']} requests, "
        f"{result['request_throughput']} a second, {result['output_throughput']:,} tokens a second"
    )
    draw(_Drawn(run), title, path)


def _histogram(values: Sequence[float]) -> Histogram:
    histogram = Histogram()
    histogram.add_all(np.asarray(values))
    return histogram


def _load(run: Run) -> list[tuple[float, int, int]]:
    """How many requests run, and wait for --max-concurrency, at times of even distance."""
    due = np.sort([at for at, _ in run.answers]) - run.began
    sent = np.sort([answer.began for _, answer in run.answers]) - run.began
    ended = np.sort([max(a.last, a.began) for _, a in run.answers]) - run.began
    points = np.linspace(0.0, float(ended[-1]), _SAMPLES)
    arrived, begun, over = (
        np.searchsorted(each, points, side="right") for each in (due, sent, ended)
    )
    return list(
        zip(points.tolist(), (begun - over).tolist(), (arrived - begun).tolist(), strict=True)
    )
