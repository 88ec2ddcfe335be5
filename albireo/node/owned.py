"""A node that belongs to the process which starts it: for `LLM`, and for the benches.

owner ── starts ──▶ supervisor ──▶ fork server, actors
  ╎                    │
  └╌╌╌ pidfd ╌╌╌╌╌╌╌╌╌╌┘  the owner's end, also by SIGKILL, stops the node
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from albireo.ipc.paths import log_path

from .events import Event, NodeFailed, NodeReady, NodeStopped
from .launch import start_detached
from .options import NodeOptions

_STOP_TIMEOUT_S = 30.0
_BETWEEN_SIGNALS_S = 0.05
_event_decoder = msgspec.json.Decoder(Event)


class NodeStartError(RuntimeError):
    """The node did not start; the text is its own explanation."""


class OwnedNode:
    """A running node; stop() ends it, and so does the end of this process.

    name: under which clients of this machine find it.
    """

    def __init__(
        self, options: NodeOptions, say: Callable[[Event], None] = lambda event: None
    ) -> None:
        """Starts a node and waits until it is ready; `say` gets what it tells meanwhile.

        Raises NodeStartError.
        """
        self.name = options.name
        self._owner = os.getpid()
        self._log = Path(log_path(options.name))
        self._process = start_detached(options, self._owner)
        try:
            self._await_ready(say)
        except BaseException:
            self._end()
            raise

    def stop(self) -> None:
        """Ends the node without waiting for requests, and removes its log.  May be called twice.

        Does nothing in a process that was forked from the owner.
        """
        if os.getpid() != self._owner or self._process.returncode is not None:
            return
        if self._end() == 0:
            self._log.unlink(missing_ok=True)

    def _await_ready(self, say: Callable[[Event], None]) -> None:
        reason = "it said nothing; `albireo node logs` may tell why"
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                event = _event_decoder.decode(line)
                say(event)
                if isinstance(event, NodeReady):
                    return
                if isinstance(event, NodeFailed):
                    reason = event.reason
                elif isinstance(event, NodeStopped):
                    reason = "it was stopped"
        raise NodeStartError(f"the node did not start: {reason}")

    def _end(self) -> int:
        """The supervisor's exit status.  One that does not leave is killed; its processes, too,
        by the kernel, and the janitor clears away."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
            time.sleep(_BETWEEN_SIGNALS_S)
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
