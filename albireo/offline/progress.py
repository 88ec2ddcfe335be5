"""What is shown on standard error when that is a terminal: a node's start, a bar for a batch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from albireo.node.events import Event, PhaseBegun

if TYPE_CHECKING:
    from rich.console import Console


@contextlib.contextmanager
def starting(wanted: bool) -> Iterator[Callable[[Event], None]]:
    """Shows the phases of a node's start; gives what takes them."""
    console = _console(wanted)
    if console is None:
        yield lambda event: None
        return
    with console.status("starting the node ...") as status:

        def show(event: Event) -> None:
            if isinstance(event, PhaseBegun):
                status.update(f"{event.text} ...")

        yield show


@contextlib.contextmanager
def counting(wanted: bool, total: int) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar of `total` requests; gives what takes tokens in and out of one that has ended."""
    console = _console(wanted)
    if console is None:
        yield lambda tokens_in, tokens_out: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[tokens]}"),
        TimeElapsedColumn(), TextColumn("<"), TimeRemainingColumn(),
    )  # fmt: skip
    all_in = all_out = 0
    with Progress(*columns, console=console, refresh_per_second=4) as bar:
        task = bar.add_task("", total=total, tokens="")

        def show(tokens_in: int, tokens_out: int) -> None:
            nonlocal all_in, all_out
            all_in += tokens_in
            all_out += tokens_out
            seconds = max(bar.tasks[0].elapsed or 0.0, 1e-3)
            rates = f"in {all_in / seconds:,.0f}, out {all_out / seconds:,.0f} tokens/s"
            bar.update(task, advance=1, tokens=rates)

        yield show


def _console(wanted: bool) -> Console | None:
    if not wanted or not sys.stderr.isatty():
        return None
    from rich.console import Console

    return Console(stderr=True, highlight=False)
