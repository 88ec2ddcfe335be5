"""Values by the thousand million in little memory: buckets whose bounds are 1% apart."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_LEAST = 1e-6
_RATIO = 1.01
_BUCKETS = 2400
"""From a microsecond to over six hours."""
_LOG_RATIO = math.log(_RATIO)

Float64Array = npt.NDArray[np.float64]


class Histogram:
    """Seconds.  Percentiles are within 1%, the mean is exact."""

    def __init__(self) -> None:
        self.counts = np.zeros(_BUCKETS, np.int64)
        self.total = 0.0
        self.count = 0

    @classmethod
    def of(cls, counts: bytes, total: float) -> Histogram:
        """One that was made elsewhere: its buckets, int64, and the sum of its values."""
        made = cls()
        made.counts = np.frombuffer(counts, np.int64).copy()
        made.total = total
        made.count = int(made.counts.sum())
        return made

    def merge(self, other: Histogram) -> None:
        self.counts += other.counts
        self.total += other.total
        self.count += other.count

    def add(self, value: float) -> None:
        self.counts[_place(value)] += 1
        self.total += value
        self.count += 1

    def add_all(self, values: Float64Array) -> None:
        """Of one step, say: [n] float64; mostly they are all the same."""
        if not len(values):
            return
        least = float(values.min())
        if float(values.max()) == least:
            self.counts[_place(least)] += len(values)
            self.total += least * len(values)
            self.count += len(values)
            return
        places = np.log(np.maximum(values, _LEAST) / _LEAST)
        places /= _LOG_RATIO
        np.add.at(self.counts, np.minimum(places.astype(np.int64), _BUCKETS - 1), 1)
        self.total += float(values.sum())
        self.count += len(values)

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def percentile(self, percent: float) -> float:
        """The value that so many percent do not exceed; 0 when there is none."""
        if not self.count:
            return 0.0
        wanted = max(1, math.ceil(self.count * percent / 100))
        place = int(np.searchsorted(np.cumsum(self.counts), wanted))
        return float(_LEAST * _RATIO ** (place + 0.5))

    def curve(self) -> tuple[Float64Array, Float64Array]:
        """(upper bounds, share of the values below them) of the buckets that are not empty."""
        there = np.flatnonzero(self.counts)
        bounds: Float64Array = _LEAST * np.power(_RATIO, there + 1.0)
        shares: Float64Array = np.cumsum(self.counts)[there] / max(1, self.count)
        return bounds, shares

    def tree(self) -> dict[str, float]:
        """Mean and percentiles in milliseconds."""
        found = {"mean": self.mean} | {f"p{p}": self.percentile(p) for p in (50, 90, 99)}
        return {name: round(value * 1e3, 3) for name, value in found.items()}


def _place(value: float) -> int:
    return min(int(math.log(max(value, _LEAST) / _LEAST) / _LOG_RATIO), _BUCKETS - 1)
