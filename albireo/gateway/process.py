"""Entry of the role "gateway": one of several processes that share the HTTP port.

The fork server calls main() in the new process.  The listening sockets come as
the descriptors "http" and "uds"; what waits in their queues while a gateway is
started again is not lost.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Mapping

import uvloop

from albireo.ipc.actor import Actor
from albireo.ipc.keys import load_keys
from albireo.ipc.paths import API_SOCKET
from albireo.ipc.tls import server_context

from .app import make_app
from .link import NodeLink
from .server import HttpServer


def main(actor: Actor, fds: Mapping[str, int]) -> None:
    """Serves until the supervisor asks the actor to stop."""
    # They would warn of every malformed request, and of what is written to a client that has gone.
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(actor, fds))


async def _serve(actor: Actor, fds: Mapping[str, int]) -> None:
    config = actor.spec.gateway
    assert config is not None
    keys = load_keys(config.api_key, config.api_key_file)
    tls = None
    if config.ssl_certfile is not None and config.ssl_keyfile is not None:
        tls = server_context(config.ssl_certfile, config.ssl_keyfile)
    sockets = [socket.socket(fileno=fds[name]) for name in ("http", "uds") if name in fds]
    for each in sockets:
        each.setblocking(False)
    loop = asyncio.get_running_loop()
    actor.end_without_memory(loop)
    stopped = asyncio.Event()
    loop.add_reader(actor.stop_fd, stopped.set)
    loop.add_reader(actor.ping_fd, actor.answer_ping)
    connecting = asyncio.ensure_future(NodeLink.connect(f"{actor.spec.runtime_dir}/{API_SOCKET}"))
    stopping = asyncio.ensure_future(stopped.wait())
    await asyncio.wait((connecting, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not connecting.done():
        connecting.cancel()
        return
    link = connecting.result()
    server = HttpServer(
        make_app(link, keys, config.allowed_origins, config.stream_interval), sockets, tls
    )
    stopping.add_done_callback(lambda _: server.stop())
    actor.ready()
    await server.serve()
    await link.close()
