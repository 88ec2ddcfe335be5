"""A node of its own for a measurement: started, awaited, and stopped afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from albireo.node.events import Event
from albireo.node.options import NodeOptions
from albireo.node.owned import NodeStartError, OwnedNode
from albireo.offline import LLM


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


def workers_phases(facts: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of each worker, what its start took its time for, in seconds; facts: as in node.json."""
    return {name: taken for name, taken in facts.get("phases_s", {}).items() if ".worker" in name}


@contextlib.contextmanager
def running_llm(options: NodeOptions) -> Iterator[LLM]:
    """The same with an LLM, whose node has a name of its own anyway."""
    fields = msgspec.structs.asdict(options)
    del fields["name"]
    try:
        llm = LLM(**fields)
    except NodeStartError as error:
        raise BenchError(str(error)) from None
    with llm:
        yield llm
