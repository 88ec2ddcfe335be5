"""A node of its own for a measurement: started, awaited, and stopped afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import msgspec

from albireo.node.events import Event, NodeFailed
from albireo.node.launch import run_detached, stop_node
from albireo.node.options import NodeOptions


class BenchError(RuntimeError):
    """The measurement could not be made; the text is for the user."""


@contextlib.contextmanager
def running_node(
    options: NodeOptions, say: Callable[[Event], None] = lambda event: None
) -> Iterator[str]:
    """Runs a detached node under a name of its own for the block; yields that name.

    Raises BenchError with the node's own explanation when it does not start.
    """
    options = msgspec.structs.replace(options, name=f"bench-{os.getpid()}")
    reasons: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, NodeFailed):
            reasons.append(event.reason)
        say(event)

    if run_detached(options, listen) != 0:
        raise BenchError("the node did not start: " + (reasons or ["it said nothing"])[-1])
    try:
        yield options.name
    finally:
        stop_node(options.name, now=True)
