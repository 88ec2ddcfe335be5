"""Percentiles out of what histograms gained, as Prometheus' histogram_quantile has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec


class Percentiles(msgspec.Struct, frozen=True):
    """In milliseconds, of `count` values: linear within the bucket that a percentile falls in."""

    count: int
    p50_ms: float
    p95_ms: float
    p99_ms: float


def gained(
    new: Mapping[str, Any], old: Mapping[str, Any] | None
) -> tuple[Sequence[float], list[int]]:
    """(bounds, counts) of what came between two states of a histogram of the status tree."""
    counts: list[int] = list(new["counts"])
    if old is not None and sum(old["counts"]) <= sum(counts):
        counts = [max(0, a - b) for a, b in zip(counts, old["counts"], strict=True)]
    return new["bounds"], counts


def percentiles(found: Iterable[tuple[Sequence[float], list[int]]]) -> Percentiles | None:
    """Of several histograms with the same bounds (seconds) together; None without a value."""
    bounds: Sequence[float] = ()
    total: list[int] = []
    for of_all, counts in found:
        bounds = of_all
        total = [a + b for a, b in zip(total, counts, strict=True)] if total else counts
    count = sum(total)
    if not count:
        return None
    values = (_at(bounds, total, share * count) * 1e3 for share in (0.5, 0.95, 0.99))
    return Percentiles(count, *(round(value, 3) for value in values))


def _at(bounds: Sequence[float], counts: list[int], rank: float) -> float:
    """The value below which `rank` of the counted ones lie; above the last bound, that bound."""
    below = 0
    for place, bound in enumerate(bounds):
        inside = counts[place]
        if inside and below + inside >= rank:
            least = bounds[place - 1] if place else 0.0
            return least + (bound - least) * (rank - below) / inside
        below += inside
    return bounds[-1]
