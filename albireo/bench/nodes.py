"""A node of its own for a measurement: started, awaited, and stopped afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import msgspec

from albireo.node.events import Event
from albireo.node.options import NodeOptions
from albireo.node.owned import NodeStartError, OwnedNode


class BenchError(RuntimeError):
    """The measurement could not be made; the text is for the user."""


@contextlib.contextmanager
def running_node(
    options: NodeOptions, say: Callable[[Event], None] = lambda event: None
) -> Iterator[str]:
    """Runs a node under a name of its own for the block, or until this process dies.

    Yields that name.  Raises BenchError with the node's own explanation when it does not start.
    """
    options = msgspec.structs.replace(options, name=f"bench-{os.getpid()}")
    try:
        node = OwnedNode(options, say)
    except NodeStartError as error:
        raise BenchError(str(error)) from None
    try:
        yield node.name
    finally:
        node.stop()
