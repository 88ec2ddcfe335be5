"""Entry of the role "router": one process for the node, asyncio on uvloop.

The fork server calls main() in the new process.  The listening socket for clients over TCP, where
there is one, comes as the descriptor "tcp".
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Mapping

import uvloop

from albireo.ipc.actor import Actor
from albireo.ipc.timeline import Recorder

from .journal import JournalError
from .server import serve


def main(actor: Actor, fds: Mapping[str, int]) -> None:
    """Runs the router until the supervisor asks it to stop."""
    # It would warn of what is written to a client that has just gone.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(_serve(actor, fds))
        except JournalError as error:
            actor.fatal(str(error))


async def _serve(actor: Actor, fds: Mapping[str, int]) -> None:
    loop = asyncio.get_running_loop()
    actor.end_without_memory(loop)
    loop.add_reader(actor.ping_fd, actor.answer_ping)
    tcp = socket.socket(fileno=fds["tcp"]) if "tcp" in fds else None
    await serve(actor.spec, actor.ready, actor.stop_fd, Recorder.of(fds), tcp)
