"""A node that belongs to the process which starts it: for `LLM`, and for the benches.

owner ── starts ──▶ supervisor ──▶ fork server, actors
  ╎                    │
  └╌╌╌ pidfd ╌╌╌╌╌╌╌╌╌╌┘  the owner's end, also by SIGKILL, stops the node

A node that ends as it should takes its log with it: nothing of it is left.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import msgspec

from albireo.ipc.paths import node_dir

from .events import Event, NodeFailed, NodeReady, NodeStopped
from .launch import end_detached, start_detached
from .options import NodeOptions

_event_decoder = msgspec.json.Decoder(Event)


class NodeStartError(RuntimeError):
    """The node did not start; the text is its own explanation."""


class OwnedNode:
    """A running node; stop() ends it, and so does the end of this process.

    name: under which `albireo node status`, `trace` and clients of this machine find it.
    facts: what it said of itself when it was ready, as in node.json.
    """

    def __init__(
        self, options: NodeOptions, say: Callable[[Event], None] = lambda event: None
    ) -> None:
        """Starts a node and waits until it is ready; `say` gets what it tells meanwhile.

        Raises NodeStartError, and PathError when the name or the directories cannot be used.
        """
        node_dir(options.name)
        self.name = options.name
        self._owner = os.getpid()
        self.facts: dict[str, Any] = {}
        self._process = start_detached(options, self._owner)
        try:
            self._await_ready(say)
        except BaseException:
            end_detached(self._process)
            raise

    def stop(self) -> None:
        """Ends the node without waiting for requests.  May be called twice.

        Does nothing in a process that was forked from the owner.
        """
        if os.getpid() == self._owner and self._process.returncode is None:
            end_detached(self._process)

    @property
    def alive(self) -> bool:
        """Whether its supervisor runs."""
        return self._process.poll() is None

    def _await_ready(self, say: Callable[[Event], None]) -> None:
        reason = f"it said nothing; `albireo node logs --name {self.name}` may tell why"
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                event = _event_decoder.decode(line)
                say(event)
                if isinstance(event, NodeReady):
                    self.facts = event.facts
                    return
                if isinstance(event, NodeFailed):
                    reason = event.reason
                elif isinstance(event, NodeStopped):
                    reason = "it was stopped"
        raise NodeStartError(f"the node did not start: {reason}")
