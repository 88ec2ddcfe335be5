"""Counts of values by upper bound, as Prometheus has them.

Recording costs a binary search among some twenty bounds.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

WHOLE_REQUEST_S = (
    0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0,
)  # fmt: skip
"""Bounds, in seconds, for what a request waits for or takes as a whole."""


class Histogram:
    """Counts of values by upper bound (counts has one more: above all), and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def record(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def tree(self) -> dict[str, Any]:
        """As the status tree has it."""
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.total}
