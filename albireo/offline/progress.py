"""What an LLM shows on standard error when that is a terminal: its start, and a bar for a batch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from albireo.client import Completion
from albireo.node.events import Event, PhaseBegun

from .batch import Result

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
def answering(wanted: bool, total: int) -> Iterator[Callable[[Result], None]]:
    """Shows a bar of `total` requests; gives what takes their results."""
    console = _console(wanted)
    if console is None:
        yield lambda result: None
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
    prompt_tokens = new_tokens = 0
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total, tokens="")

        def show(result: Result) -> None:
            nonlocal prompt_tokens, new_tokens
            if isinstance(result, Completion):
                prompt_tokens += result.usage.prompt_tokens
                new_tokens += result.usage.completion_tokens
            seconds = max(bar.tasks[0].elapsed or 0.0, 1e-3)
            rates = f"in {prompt_tokens / seconds:,.0f}, out {new_tokens / seconds:,.0f} tokens/s"
            bar.update(task, advance=1, tokens=rates)

        yield show


def _console(wanted: bool) -> Console | None:
    if not wanted or not sys.stderr.isatty():
        return None
    from rich.console import Console

    return Console(stderr=True, highlight=False)
