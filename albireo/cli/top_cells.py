"""Words, numbers and bars of `albireo top`: what stands in a cell of top_screen.py."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from albireo.live.percentiles import Percentiles

FAINT = "bright_black"
NONE = Text("–", FAINT)
"""Instead of what is not known."""
_TRACK = "#3d4657"
_SPARKS = "▁▂▃▄▅▆▇█"


def bar(width: int, parts: Sequence[tuple[float, str]]) -> Text:
    """Parts of a line as shares of `width` cells, one after the other; the last ends in half
    cells, and shows if there is any of it."""
    text, share, drawn = Text(no_wrap=True), 0.0, 0
    parts = [part for part in parts if part[0] > 0] or [(0.0, "")]
    for each, style in parts[:-1]:
        share += each
        cells = min(width, round(share * width)) - drawn
        text.append("━" * cells, style)
        drawn += cells
    each, style = parts[-1]
    halves = min(2 * width, round((share + each) * 2 * width)) - 2 * drawn
    if each > 0 and drawn < width:
        halves = max(1, halves)
    whole, half = divmod(max(0, halves), 2)
    text.append("━" * whole + "╸" * half, style)
    return text.append("─" * (width - drawn - whole - half), _TRACK)


def meter(share: float, width: int) -> Text:
    colour = "#37bd9b" if share < 0.75 else "#eab04f" if share < 0.92 else "#ee7f9a"
    return bar(width, [(share, colour)]).append(
        f" {share:4.0%}" if share >= 0.1 or not share else f" {share:.1%}", "" if share else FAINT
    )


def sparks(values: Sequence[float], width: int) -> str:
    values = values[-width:]
    most = max(values, default=0.0)
    if most <= 0:
        return "▁" * len(values)
    return "".join(_SPARKS[round(value / most * (len(_SPARKS) - 1))] for value in values)


def latency(found: Percentiles | None, whole: bool) -> RenderableType:
    """P50, or P50/P95/P99."""
    if found is None:
        return NONE
    if not whole:
        return ms(found.p50_ms)
    return "/".join(_short(value) for value in (found.p50_ms, found.p95_ms, found.p99_ms)) + " ms"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def ms(value: float) -> str:
    return f"{value / 1000:.2f} s" if value >= 1000 else f"{_short(value)} ms"


def us(value: float) -> str:
    if value >= 1000:
        return f"{value / 1000:,.{2 if value < 1e4 else 1 if value < 1e5 else 0}f} ms"
    return f"{value:.0f} µs" if value >= 100 or value < 0.05 else f"{value:.1f} µs"


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.1f}"


def or_none(value: int | None) -> RenderableType:
    return NONE if value is None else f"{value:,}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def faint(text: str) -> Text:
    return Text(text, FAINT)
