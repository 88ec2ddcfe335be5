"""The figures as a picture: distributions of the times, and the load over time."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Protocol

from .histogram import Histogram

_KINDS = (".png", ".svg", ".pdf")


class PlotError(RuntimeError):
    """There is nothing to draw with, or nowhere to; the text is for the user."""


class Drawable(Protocol):
    """samples: (s, requests running, waiting)."""

    ttft: Histogram
    tpot: Histogram
    itl: Histogram
    samples: list[tuple[float, int, int]]


def require_plot(path: Path) -> None:
    """Raises PlotError when draw() would: to be asked before what takes long."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotError("plots need matplotlib: pip install 'albireo[plot]'")
    if path.suffix not in _KINDS:
        raise PlotError(f"the plot {path}: its name must end in {', '.join(_KINDS)}")
    if not path.parent.is_dir():
        raise PlotError(f"the plot {path}: there is no directory {path.parent}")


def draw(figures: Drawable, title: str, path: Path) -> None:
    """Writes a picture, of the kind that the name's end says.  Raises PlotError."""
    require_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    (first, second), (third, fourth) = figure.subplots(2, 2)
    for axes, name, histogram in (
        (first, "TTFT", figures.ttft), (second, "TPOT", figures.tpot), (third, "ITL", figures.itl),
    ):  # fmt: skip
        bounds, shares = histogram.curve()
        axes.step(bounds * 1e3, shares, where="post")
        axes.set(xlabel=f"{name}, ms", ylabel="share of requests", ylim=(0, 1.02))
        if len(bounds):
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
    third.set_ylabel("share of tokens")
    times = [at for at, _, _ in figures.samples]
    fourth.plot(times, [running for _, running, _ in figures.samples], label="running")
    fourth.plot(times, [waiting for _, _, waiting in figures.samples], label="waiting")
    fourth.set(xlabel="s", ylabel="requests")
    fourth.legend()
    fourth.grid(alpha=0.3)
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise PlotError(f"the plot cannot be written to {path}: {error}") from None
